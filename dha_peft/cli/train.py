"""`dha train`: fusion of the adapter, the collapse, and healing of the merged model, through the Trainer."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import PeftModel
from torch import nn
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..conversion import convert, get_dha_model
from ..plan import DHAPlan
from ..search import Analysis, analyse
from ..texts import evaluate_loss
from ..training import DHACallback
from . import options as o
from .arguments import check_run, healing_arguments, trained_tokens, training_arguments
from .console import note
from .convert import finish, mean_pooled, measured_cache, start_banner
from .loading import (
    calibration_batches,
    given_plan,
    load_base,
    load_model,
    training_rows,
    validation_tokens,
)
from .measure import head_similarity
from .output import new_folder, write_text
from .plan import show_plan
from .progress import BarCallback
from .result import copy_config, facts_of, save_result
from .settings import Run


def train(
    model: o.Model = None,
    output: o.Output = None,
    budget: o.Budget = None,
    text: o.Text = None,
    validation: o.Held = None,
    tokens: o.Tokens = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Fusion steps; 0 starts from the closed form [100].")
    ] = None,
    heal_steps: Annotated[
        int | None, typer.Option("--heal-steps", help="Healing steps of the merged model [0].")
    ] = None,
    config: o.Config = None,
    set_: o.Set = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    limit: o.Limit = None,
    dry_run: o.DryRun = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of this output.")] = False,
) -> None:
    """Fuse by training, collapse, heal, and write the model. Any TrainingArguments: --set train.arguments.NAME=VALUE."""
    run = o.make_run(
        config, set_, text=text, validation=validation, model=model, output=output, dha__head_budget=budget,
        calibration__tokens=tokens, train__steps=steps, train__heal_steps=heal_steps, device=device, dtype=dtype, limit=limit,
    )  # fmt: skip
    check_run(run, resume)
    if dry_run:
        show_plan(run)
        note(f"dry run: {run.train.steps} fusion and {run.train.heal_steps} healing steps; nothing was written.")
        return
    run_train(run, config, resume)


def run_train(run: Run, source: Path | None = None, resume: bool = False) -> Path:
    """The training that a run describes; returns the folder of the result. An interrupted run keeps its checkpoints."""
    set_seed(run.seed)
    begin = time.perf_counter()
    with new_folder(run.output, keep=True, resume=resume) as folder:
        tokenizer, base = load_base(run)
        given_plan(run, base)  # refuses one for another model before the calibration
        batches, rows = calibration_batches(run, tokenizer), training_rows(run, tokenizer)
        ids = validation_tokens(run, tokenizer)
        stages = f"{run.train.steps} fusion and {run.train.heal_steps} healing steps, {trained_tokens(run):,} tokens"
        start_banner("train", run, base, batches, stages)
        facts: dict[str, Any] = {"losses": {}, "fusion": []}
        _measure(facts, "base", base, ids, run)
        small = (
            fused(run, folder, base, batches, rows, facts, ids)
            if run.train.steps
            else convert(base, run.config(), batches, references(run, base, batches, facts, ids))
        )
        _measure(facts, "after the collapse" if run.train.steps else "closed form", small, ids, run)
        if run.train.heal_steps:
            heal(run, folder, small, rows)
            _measure(facts, "after healing", small, ids, run)
        base = load_model(run.model, run)  # the collapse reuses the tensors of the first copy
        plan = DHAPlan.from_dict(small.config.dha_plan)
        facts = facts_of(run, base, plan) | facts
        facts["kv_bytes_measured"] = measured_cache(base, small)
        facts["calibration_tokens"] = sum(b["input_ids"].numel() for b in batches or [])
        facts["training_tokens"] = trained_tokens(run)
        facts["seconds"] = round(time.perf_counter() - begin, 1)
        save_result(folder, run, small, tokenizer, facts)
        copy_config(source, folder)
        for stage in ("fusion", "healing"):  # checkpoints; the adapter stays
            shutil.rmtree(folder / stage, ignore_errors=True)
    finish(run, facts)
    return Path(run.output)


def fused(
    run: Run,
    folder: Path,
    base: nn.Module,
    batches: list | None,
    rows: list,
    facts: dict[str, Any],
    ids: torch.Tensor | None,
) -> nn.Module:
    """Train the adapter, or take the one that an interrupted run had finished; then collapse it."""
    done = folder / "adapter"
    if (done / "log.json").is_file():
        adapted: Any = PeftModel.from_pretrained(base, done)
        facts |= json.loads((done / "log.json").read_text())
    else:
        analysis = references(run, base, batches, facts, ids)
        adapted = get_dha_model(base, run.config(), batches, analysis=analysis)
        trainer = _train(
            run, adapted, rows, folder / "fusion", run.train.steps, run.train.learning_rate, {}, None, [DHACallback()]
        )
        facts["fusion"] = [log for log in trainer.state.log_history if "dha/fusion_loss" in log and "loss" not in log]
        adapted.save_pretrained(done)
        write_text(done / "log.json", json.dumps(facts))
    _measure(facts, "after fusion, before the collapse", adapted, ids, run)
    return adapted.eval().merge_and_unload()


def references(
    run: Run, base: nn.Module, batches: list | None, facts: dict[str, Any], ids: torch.Tensor | None
) -> Analysis | None:
    """The analysis that fusion starts from, and from it what the report compares with: head similarity and mean-pooled GQA.

    None where training itself finds the groups, or where the run names them.
    """
    config = run.config()
    if config.grouping == "learned" or config.plan is not None:
        return None
    analysis = analyse(base, batches, config.grouping)
    facts["similarity"] = head_similarity(analysis)
    if ids is not None:
        budget = analysis.plan(config.search_options()).kept
        _measure(facts, "mean-pooled GQA, no training", mean_pooled(base, analysis, budget), ids, run)
    return analysis


def heal(run: Run, folder: Path, small: nn.Module, rows: list) -> None:
    """Train the merged model, with the base as teacher unless the objective is the text; in fp32, as small updates of half-precision
    weights are lost to rounding."""
    from ..training.healing import default_arguments  # brings the Trainer, see `_train`

    part, dtype = run.train, small.dtype
    teacher = load_model(run.model, run) if part.objective == "base" else None
    usual = default_arguments(small)
    rate = part.heal_learning_rate or usual["learning_rate"]
    extra = healing_arguments(part, usual)
    _train(run, small.float(), rows, folder / "healing", part.heal_steps, rate, extra, teacher, [])
    small.to(dtype).eval()


def _train(run, model, rows, folder, steps, rate, extra, teacher, callbacks):
    from transformers import (
        PrinterCallback,
        ProgressCallback,
        Trainer,
    )  # brings datasets and pandas, which the other commands need not wait for

    from ..training import DHATrainer

    arguments = training_arguments(run, folder, steps, rate, extra)
    options = {"model": model, "args": arguments, "train_dataset": rows, "callbacks": callbacks}
    trainer = DHATrainer(**options, teacher=teacher) if run.train.objective == "base" else Trainer(**options)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(BarCallback(folder.name))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    return trainer


def _measure(facts: dict[str, Any], name: str, model: nn.Module, ids: torch.Tensor | None, run: Run) -> None:
    if ids is not None:
        facts["losses"][name] = evaluate_loss(model, ids, run.validation.length)
