"""`dha convert`: the closed form, in one shot and without training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..conversion import convert as convert_model
from ..plan import DHAPlan
from ..search import Analysis, analyse
from ..texts import evaluate_loss
from . import options as o
from .console import banner, lines, note
from .loading import (
    calibration_batches,
    check_files,
    check_grouping,
    device_of,
    given_plan,
    load_base,
    validation_tokens,
)
from .measure import cache_bytes_per_token, head_similarity
from .output import check_free, new_folder
from .plan import show_plan
from .result import copy_config, facts_of, save_result
from .settings import Run


def convert(
    model: o.Model = None,
    output: o.Output = None,
    budget: o.Budget = None,
    text: o.Text = None,
    validation: o.Held = None,
    tokens: o.Tokens = None,
    config: o.Config = None,
    set_: o.Set = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    limit: o.Limit = None,
    dry_run: o.DryRun = False,
) -> None:
    """Convert a model in one shot (closed form, no training) and write it with its card and report."""
    run = o.make_run(
        config, set_, text=text, validation=validation, model=model, output=output, dha__head_budget=budget,
        calibration__tokens=tokens, device=device, dtype=dtype, limit=limit,
    )  # fmt: skip
    check_free(run.output)
    check_files(run)
    check_grouping(run)
    if dry_run:
        show_plan(run)
        note(f"dry run: nothing was written; {run.output} would be.")
        return
    run_convert(run, config)


def run_convert(run: Run, source: Path | None = None) -> Path:
    """The conversion that a run describes; returns the folder of the result."""
    torch.manual_seed(run.seed)
    with new_folder(run.output) as folder:
        tokenizer, base = load_base(run)
        given_plan(run, base)  # refuses one for another model before the calibration
        batches = calibration_batches(run, tokenizer)
        start_banner("convert", run, base, batches)
        begin = time.perf_counter()
        analysis = analyse(base, batches, run.config().grouping)
        small = convert_model(base, run.config(), analysis=analysis)
        seconds = time.perf_counter() - begin
        plan = DHAPlan.from_dict(small.config.dha_plan)
        note(plan.table(next(base.parameters()).element_size()))
        facts = facts_of(run, base, plan) | {"seconds": round(seconds, 2)}
        facts["calibration_tokens"] = analysis.statistics.tokens
        facts["losses"] = losses(run, tokenizer, base, small, analysis)
        facts["kv_bytes_measured"] = measured_cache(base, small)
        facts["similarity"] = head_similarity(analysis)
        save_result(folder, run, small, tokenizer, facts)
        copy_config(source, folder)
    finish(run, facts)
    return Path(run.output)


def start_banner(title: str, run: Run, base: nn.Module, batches: list | None, training: str = "") -> None:
    config = base.config
    heads = f"{config.num_hidden_layers} layers, {config.num_attention_heads} query heads, "
    heads += f"{getattr(config, 'num_key_value_heads', config.num_attention_heads)} KV heads"
    banner(title, {
        "model": f"{run.model} ({config.model_type}, {sum(p.numel() for p in base.parameters()):,} parameters)",
        "heads": heads,
        "budget": run.config().head_budget if run.config().plan is None else "as in `dha.plan`",
        "calibration": f"{sum(b['input_ids'].numel() for b in batches):,} tokens" if batches else "weights alone",
        "training": training,
        "device": f"{device_of(run)}, {next(base.parameters()).dtype}".replace("torch.", ""),
        "output": run.output,
    })  # fmt: skip


def losses(run: Run, tokenizer: Any, base: nn.Module, small: nn.Module, analysis: Analysis) -> dict[str, float]:
    """Held-out losses in nats per token of the base, of mean-pooled GQA at the same budget, and of the result."""
    ids = validation_tokens(run, tokenizer)
    if ids is None:
        return {}
    pooled = mean_pooled(base, analysis, DHAPlan.from_dict(small.config.dha_plan).kept)
    models = {"base": base, "mean-pooled GQA, no training": pooled, "closed form": small}
    return {name: evaluate_loss(model, ids, run.validation.length) for name, model in models.items()}


def mean_pooled(base: nn.Module, analysis: Analysis, budget: float) -> nn.Module:
    """The usual rival: neighbours averaged, equal counts in every layer; `budget` is the share of heads kept."""
    from ..adapter import DHAConfig
    from .estimate import uniform_plan

    config = DHAConfig(head_budget=budget, fusion="linear", grouping="contiguous")
    config.plan = uniform_plan(analysis.sites, config.search_options()).to_dict()
    return convert_model(base, config, analysis=analysis)


def measured_cache(base: nn.Module, small: nn.Module) -> dict[str, int]:
    return {"before": cache_bytes_per_token(base), "after": cache_bytes_per_token(small)}


def finish(run: Run, facts: dict[str, Any]) -> None:
    """The last lines of a command that made a model."""
    measured = facts["kv_bytes_measured"]
    rows = {f"loss, {name}": f"{loss:.4f} nats/token" for name, loss in facts["losses"].items()}
    rows["KV cache, measured"] = f"{measured['before']:,} -> {measured['after']:,} bytes per token"
    lines(rows)
    note(f"Wrote {run.output}. Next:\n  dha eval {run.output} --validation FILE   (or --tasks NAME for lm-eval)")
