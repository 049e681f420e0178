"""Decoupled-Head Attention (arXiv 2406.06567) as a peft method: fuse key heads and value heads, collapse, serve less KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import adapter, models, training
from .adapter import DHAConfig, DHAModel
from .card import save_card
from .conversion import convert, get_dha_model
from .kernels import decode_kernel
from .models import Family, register_family
from .plan import DHAPlan, LayerPlan
from .search import Analysis, analyse
from .training import DHACallback, FusionSchedule, ScheduleOptions

if TYPE_CHECKING:
    from .training import DHATrainer, heal

adapter.register()
models.register()
# Declines by itself where Triton or CUDA is missing; Triton is imported at its first call on a GPU.
models.set_decode_kernel(decode_kernel)
models.set_card_writer(save_card)

__version__ = "0.1.0"

__all__ = [
    "Analysis",
    "DHACallback",
    "DHAConfig",
    "DHAModel",
    "DHAPlan",
    "DHATrainer",
    "Family",
    "FusionSchedule",
    "LayerPlan",
    "ScheduleOptions",
    "analyse",
    "convert",
    "get_dha_model",
    "heal",
    "register_family",
]
_TRAINING = ("DHATrainer", "heal")


def __getattr__(name: str) -> Any:
    """What costs time to import: `DHATrainer` and `heal`, and the classes of the families (`DhaLlamaForCausalLM`, ...)."""
    if name in _TRAINING:
        return getattr(training, name)
    if name.startswith("Dha"):
        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_TRAINING, *(name for name in dir(models) if name.startswith("Dha"))})
