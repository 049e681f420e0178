"""Arguments of the Trainer for both stages of `dha train`, and the checks that come before any model is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from .loading import check_files, check_grouping, device_of
from .output import check_free
from .settings import Run, Training

SCHEDULER = ("lr_scheduler_type", "lr_scheduler_kwargs")
HEALING_ARGUMENTS = (*SCHEDULER, "warmup_steps", "adam_beta2", "weight_decay")
"""What the healing stage takes from `dha_peft.training.heal`."""


def check_run(run: Run, resume: bool = False) -> None:
    """Raise ValueError for what would stop the run later on."""
    check_free(run.output, resume)
    check_files(run)
    part = run.train
    if part.objective not in ("base", "text"):
        raise ValueError(
            f"`train.objective` is {part.objective!r}; choose 'base' (distance from the base model) or 'text' (next token)."
        )
    if part.steps < 0 or part.heal_steps < 0 or not part.steps + part.heal_steps:
        raise ValueError(
            "`train.steps` and `train.heal_steps` must not be negative and not both 0; `dha convert` needs no steps."
        )
    if not (part.files or run.calibration.files):
        raise ValueError("there is no text to train on; pass `--text FILE`, or set `train.files` in the run file.")
    if not part.steps:
        check_grouping(run)
    _check_device(run)
    _check_arguments(run)


def _check_device(run: Run) -> None:
    """The Trainer knows no index: it works on the first GPU that it sees."""
    kind, _, index = run.device.partition(":")
    if index not in ("", "0"):
        raise ValueError(
            f"`device` is {run.device!r}, but the Trainer takes the first GPU that it sees; write {kind!r}, and set "
            f"CUDA_VISIBLE_DEVICES={index} in the environment."
        )


def _check_arguments(run: Run) -> None:
    """Raise what transformers raises about its arguments, before any model is loaded, and refuse those with a key of their own."""
    own = {"learning_rate": ("learning_rate", "heal_learning_rate"), "max_steps": ("steps", "heal_steps")}
    for section in ("arguments", "heal_arguments"):
        for name in own.keys() & getattr(run.train, section):
            keys = " and ".join(f"`train.{key}`" for key in own[name])
            raise ValueError(f"`train.{section}.{name}` has a key for each stage; set {keys} instead.")
    for extra in ({}, run.train.heal_arguments):
        training_arguments(run, Path("unused"), 1, 0.0, extra)


def healing_arguments(part: Training, usual: dict[str, Any]) -> dict[str, Any]:
    """The healing stage's own arguments: what the run does not set comes from `usual`. A scheduler and its options go together."""
    given = set(part.arguments | part.heal_arguments)
    if given & set(SCHEDULER):
        given |= set(SCHEDULER)
    return {name: usual[name] for name in HEALING_ARGUMENTS if name not in given} | part.heal_arguments


def training_arguments(run: Run, folder: Path, steps: int, rate: float, extra: dict[str, Any]) -> TrainingArguments:
    """The Trainer's arguments of one stage: defaults, then `train.arguments`, then the stage's own."""
    fields = {
        "max_steps": steps if run.limit is None else min(steps, run.limit),
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(5, steps // 10),
        "per_device_train_batch_size": 8,
        "logging_steps": 10,
        "save_steps": 50,
        "save_total_limit": 1,
        "report_to": [],
        "seed": run.seed,
        "bf16": True,
        "use_cpu": device_of(run) == "cpu",
        "dataloader_pin_memory": device_of(run) != "cpu",
        "disable_tqdm": not sys.stderr.isatty(),
    }
    return TrainingArguments(**{**fields, **run.train.arguments, **extra, "output_dir": str(folder)})


def trained_tokens(run: Run) -> int:
    """Tokens seen by one process in both stages."""
    total = 0
    for steps, extra in ((run.train.steps, {}), (run.train.heal_steps, run.train.heal_arguments)):
        arguments = training_arguments(run, Path("unused"), max(steps, 1), 0.0, extra)
        count = 0 if not steps else arguments.max_steps
        total += count * arguments.train_batch_size * arguments.gradient_accumulation_steps * run.train.length
    return total
