"""Training: the fusion schedule, its Trainer callback, and healing by the base itself."""

from .callback import DHACallback
from .schedule import FusionSchedule, ScheduleOptions, ScheduleState

__all__ = ["DHACallback", "FusionSchedule", "ScheduleOptions", "ScheduleState"]
