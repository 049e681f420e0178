"""`dha sweep`: many budgets from one analysis, with a table and a figure."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm.auto import tqdm

from ..conversion import convert as convert_model
from ..search import analyse
from ..texts import evaluate_loss
from . import options as o
from .console import lines, note
from .convert import mean_pooled, start_banner
from .loading import calibration_batches, check_files, check_grouping, load_base, validation_tokens
from .output import check_free, new_folder, write_text
from .plan import show_plan
from .result import copy_config, facts_of, write_facts
from .settings import Run

Budgets = Annotated[str | None, typer.Option("--budgets", help="Shares of heads to keep, as in 0.5,0.25,0.125.")]
FIELDS = ("model", "budget", "heads", "kv_bytes_per_token", "loss", "seconds")


def sweep(
    model: o.Model = None,
    output: o.Output = None,
    budgets: Budgets = None,
    text: o.Text = None,
    validation: o.Held = None,
    tokens: o.Tokens = None,
    config: o.Config = None,
    set_: o.Set = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    limit: o.Limit = None,
    dry_run: o.DryRun = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the budgets already measured.")] = False,
) -> None:
    """Try many budgets from one analysis: sweep.csv and a figure of loss against KV kept (no models are written)."""
    run = o.make_run(
        config, set_, text=text, validation=validation, model=model, output=output, calibration__tokens=tokens,
        device=device, dtype=dtype, limit=limit, sweep__budgets=budgets.split(",") if budgets else None,
    )  # fmt: skip
    check_free(run.output, resume)
    check_files(run)
    check_grouping(run)
    given = run.config()
    for name in ("plan", "key_budget", "value_budget"):
        if getattr(given, name) is not None:
            raise ValueError(f"`dha.{name}` fixes what a sweep over `head_budget` would move; leave it out.")
    for budget in run.sweep.budgets:
        run.dha["head_budget"] = budget
        run.config()
    if dry_run:
        show_plan(run)
        note(f"dry run: budgets {run.sweep.budgets} would be tried; nothing was written.")
        return
    run_sweep(run, config, resume)


def run_sweep(run: Run, source: Path | None = None, resume: bool = False) -> Path:
    """Measure every budget of the run; returns the folder."""
    torch.manual_seed(run.seed)
    with new_folder(run.output, keep=True, resume=resume) as folder:
        tokenizer, base = load_base(run)
        batches = calibration_batches(run, tokenizer)
        start_banner("sweep", run, base, batches)
        ids = validation_tokens(run, tokenizer)
        begin = time.perf_counter()
        analysis = analyse(base, batches, run.config().grouping)
        note(f"  analysis {time.perf_counter() - begin:.1f} s, once for all budgets")
        rows = _read(folder / "sweep.csv")
        if not rows:
            rows.append({"model": "base", "budget": 1.0} | _measured(base, ids, run))
        for budget in tqdm(run.sweep.budgets, desc="budgets", disable=None):
            if any(row["budget"] == budget and row["model"] != "base" for row in rows):
                continue
            rows += _one_budget(run, base, analysis, ids, budget)
            _write(folder / "sweep.csv", rows)
        facts = facts_of(run, base, analysis.plan(run.config().search_options()))
        del facts["plan"]
        facts["sweep"] = rows
        write_text(folder / "run.yaml", run.yaml())
        copy_config(source, folder)
        write_facts(folder, facts, run.report)
    lines({f"{r['model']} {r['budget']:.4g}": f"{r['kv_bytes_per_token']:,} bytes, {_loss(r)}" for r in rows})
    note(f"Wrote {run.output}")
    return Path(run.output)


def _one_budget(run: Run, base: Any, analysis: Any, ids: torch.Tensor | None, budget: float) -> list[dict[str, Any]]:
    run.dha["head_budget"] = budget
    config = run.config()
    begin = time.perf_counter()
    small = convert_model(base, config, analysis=analysis)
    seconds = time.perf_counter() - begin
    found = [{"model": "dha", "budget": budget} | _measured(small, ids, run) | {"seconds": round(seconds, 3)}]
    if run.sweep.reference and ids is not None:
        pooled = mean_pooled(base, analysis, budget)
        found.append({"model": "mean-pooled GQA", "budget": budget} | _measured(pooled, ids, run))
    return found


def _measured(model: Any, ids: torch.Tensor | None, run: Run) -> dict[str, Any]:
    """Heads, bytes and loss of one model; counts come from its projections."""
    config = model.config
    keys = getattr(config, "num_key_heads", None) or _plain_heads(config)
    values = getattr(config, "num_value_heads", None) or _plain_heads(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = sum(keys) + sum(values)
    loss = None if ids is None else evaluate_loss(model, ids, run.validation.length)
    width = next(model.parameters()).element_size()
    return {"heads": heads, "kv_bytes_per_token": heads * head_dim * width, "loss": loss, "seconds": None}


def _plain_heads(config: Any) -> list[int]:
    count = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return [count] * config.num_hidden_layers


def _loss(row: dict[str, Any]) -> str:
    return "no loss (give --validation)" if row["loss"] is None else f"loss {row['loss']:.4f}"


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kinds = {"budget": float, "heads": int, "kv_bytes_per_token": int, "loss": float, "seconds": float}
    return [{k: kinds.get(k, str)(v) if v != "" else None for k, v in row.items()} for row in rows]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)
