"""Training: the fusion schedule, its Trainer callback, and healing by the base itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .callback import DHACallback
from .objective import Objective, healing_loss
from .schedule import FusionSchedule, ScheduleOptions, ScheduleState

if TYPE_CHECKING:
    from .healing import DHATrainer, HealingOptions, Rates, heal

_LATER = ("DHATrainer", "HealingOptions", "Rates", "heal")

__all__ = [
    "DHACallback",
    "DHATrainer",
    "FusionSchedule",
    "HealingOptions",
    "Objective",
    "Rates",
    "ScheduleOptions",
    "ScheduleState",
    "heal",
    "healing_loss",
]


def __getattr__(name: str) -> Any:
    """transformers' Trainer imports `datasets` and with it pandas, half a second, so it waits until it is asked for."""
    if name in _LATER:
        from . import healing

        return getattr(healing, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
