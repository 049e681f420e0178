"""The two stages of a recovery: fusion on the frozen base, and continued training of the collapsed model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor, nn

from dha_peft import FusionSchedule, ScheduleOptions
from dha_peft.training import heal as package_heal
from dha_peft.training import healing_loss

FEWEST_ROWS = 4
"""Updates, and so rows, that a fusion stage needs at least: one each to search, to ramp and to hold, and one more."""


@dataclass(frozen=True)
class Settings:
    """Optimizer settings. `rows` of one update; learning rates of the weights, of the frames and of the fusion matrices."""

    rows: int = 16
    weights: float = 8e-4
    frames: float = 5e-3
    omega: float = 3e-2


def heal(student: nn.Module, rows: Tensor, teacher: nn.Module) -> None:
    """Train a merged student, or the adapter of a `PeftModel` with its groups tied at the closed form, as the package does it by default."""
    package_heal(
        student,
        rows.cpu(),
        None if isinstance(student, PeftModel) else teacher,
        disable_tqdm=True,
        logging_strategy="no",
    )


def continue_pretraining(student: nn.Module, rows: Tensor, settings: Settings) -> None:
    """The same on the next token alone, which needs no teacher."""
    _train(student, rows, partial(next_token_loss, student), _all_weights(student, settings), _updates(rows, settings))


def fuse(student: nn.Module, rows: Tensor, distil: bool, learned: bool, settings: Settings) -> None:
    """Train the adapter of `student` on `rows`, its base frozen, until its groups are tied. With `learned`, the first fifth of the
    updates finds the groups. Few rows are used in smaller updates, so that every stage has one.

    Raises:
        ValueError: fewer rows than `FEWEST_ROWS`.
    """
    if len(rows) < FEWEST_ROWS:
        raise ValueError(f"the fusion stage got {len(rows)} rows, but it needs {FEWEST_ROWS}; give it more tokens.")
    updates = max(math.ceil(len(rows) / settings.rows), FEWEST_ROWS)
    search = max(updates // 5, 1) if learned else 0
    options = ScheduleOptions(max(int(0.7 * (updates - search)), 1), search)
    named = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if name.endswith("omega") == omega], "lr": rate}
        for omega, rate in ((True, settings.omega), (False, settings.frames))
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    loss = partial(healing_loss if distil else next_token_loss, student)
    _train(student, rows, loss, optimizer, updates, FusionSchedule(student, options))


def _train(
    student: nn.Module,
    rows: Tensor,
    loss: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    updates: int,
    schedule: FusionSchedule | None = None,
) -> None:
    """A tenth of the updates warms up, then cosine to 2 %."""
    student.train()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, updates))
    for batch in rows.tensor_split(updates):
        with torch.autocast(rows.device.type, torch.bfloat16):
            loss(batch).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        if schedule is not None:
            schedule.step()
        optimizer.step()
        if schedule is not None:
            schedule.project()
        optimizer.zero_grad()
        rates.step()
    student.eval()


def next_token_loss(student: nn.Module, batch: Tensor) -> Tensor:
    """Of a batch of rows `[B, T]`, in nats per token."""
    return student(input_ids=batch, labels=batch, use_cache=False).loss


def _all_weights(student: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    student.requires_grad_(True)
    return torch.optim.AdamW(student.parameters(), lr=settings.weights, weight_decay=0.0, betas=(0.9, 0.95))


def _updates(rows: Tensor, settings: Settings) -> int:
    return max(math.ceil(len(rows) / settings.rows), 1)


def _rate(step: int, updates: int) -> float:
    warm = max(updates // 10, 1)
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(updates - warm, 1)))
