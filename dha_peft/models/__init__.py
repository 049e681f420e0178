"""The merged model: un-expanded key and value heads, registered with transformers' Auto classes."""

from __future__ import annotations

import transformers

from .build import build_merged
from .configuration_dha import CONFIGS
from .decode import set_attention_path, set_decode_kernel
from .families import FAMILIES, family_of
from .family import Family
from .modeling_dha import MODELS

MERGED_TO_BASE: dict[str, str] = {family.merged_type: name for name, family in FAMILIES.items()}
"""Merged model type -> base model type ("dha_llama" -> "llama")."""


def register() -> None:
    """Make `AutoConfig`, `AutoModel`, ... know the merged types; safe to call again."""
    for merged_type, classes in MODELS.items():
        config = CONFIGS[merged_type]
        transformers.AutoConfig.register(merged_type, config, exist_ok=True)
        for auto, model in classes.items():
            getattr(transformers, auto).register(config, model, exist_ok=True)


__all__ = [
    "CONFIGS",
    "FAMILIES",
    "MERGED_TO_BASE",
    "MODELS",
    "Family",
    "build_merged",
    "family_of",
    "register",
    "set_attention_path",
    "set_decode_kernel",
]
