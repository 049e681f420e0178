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
    from .training import DHATrainer

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
    "register_family",
]


def __getattr__(name: str) -> Any:
    """What costs time to import: `DHATrainer`, and the classes of the families (`DhaLlamaForCausalLM`, ...)."""
    if name == "DHATrainer":
        return training.DHATrainer
    if name.startswith("Dha"):
        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "DHATrainer", *(name for name in dir(models) if name.startswith("Dha"))})
