"""Training: the fusion schedule, its Trainer callback, and healing by the base itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .callback import DHACallback
from .schedule import FusionSchedule, ScheduleOptions, ScheduleState

if TYPE_CHECKING:
    from .healing import DHATrainer, healing_loss

__all__ = ["DHACallback", "DHATrainer", "FusionSchedule", "ScheduleOptions", "ScheduleState", "healing_loss"]


def __getattr__(name: str) -> Any:
    """transformers' Trainer imports `datasets` and with it pandas, half a second, so it waits until it is asked for."""
    if name in ("DHATrainer", "healing_loss"):
        from . import healing

        return getattr(healing, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
