"""Training: the fusion schedule, its Trainer callback, and healing by the base itself."""

from .callback import DHACallback
from .healing import DHATrainer, healing_loss
from .schedule import FusionSchedule, ScheduleOptions, ScheduleState

__all__ = ["DHACallback", "DHATrainer", "FusionSchedule", "ScheduleOptions", "ScheduleState", "healing_loss"]
