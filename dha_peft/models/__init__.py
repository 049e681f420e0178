"""The merged model: un-expanded key and value heads, registered with transformers' Auto classes."""

from __future__ import annotations

from typing import Any

from . import configuration_dha, modeling_dha
from .build import build_merged
from .configuration_dha import CONFIGS
from .decode import set_attention_path, set_decode_kernel
from .families import FAMILIES, family_of
from .family import Family
from .modeling_dha import MODELS, set_card_writer
from .register import MERGED_TO_BASE, register, register_family

__all__ = [
    "CONFIGS",
    "FAMILIES",
    "MERGED_TO_BASE",
    "MODELS",
    "Family",
    "build_merged",
    "family_of",
    "register",
    "register_family",
    "set_attention_path",
    "set_card_writer",
    "set_decode_kernel",
]


def __getattr__(name: str) -> Any:
    """The classes of the families (`DhaLlamaConfig`, `DhaLlamaForCausalLM`, ...), made when first asked for."""
    if name.startswith("Dha"):
        return getattr(configuration_dha if name.endswith("Config") else modeling_dha, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(configuration_dha), *dir(modeling_dha)})
