"""Decoupled-Head Attention (arXiv 2406.06567) as a peft method: fuse key heads and value heads, collapse, serve less KV cache."""

from __future__ import annotations

from . import adapter, models
from .adapter import DHAConfig, DHAModel
from .conversion import convert, get_dha_model
from .kernels import decode_kernel
from .models import Family, register_family
from .plan import DHAPlan, LayerPlan
from .search import Analysis, analyse
from .training import DHACallback, DHATrainer, FusionSchedule, ScheduleOptions

adapter.register()
models.register()
# Declines by itself where Triton or CUDA is missing; Triton is imported at its first call on a GPU.
models.set_decode_kernel(decode_kernel)

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
