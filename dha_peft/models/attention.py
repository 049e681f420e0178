"""The merged attention: the family's own forward, on fewer key and value heads.

No forward is copied. The projections produce `Hk` key and `Hv` value heads, the cache stores exactly these, and the
attention *function* that the family's forward calls is ours: it either attends to the un-expanded heads (decode) or
expands them and calls the function that the user chose (`sdpa`, `eager`, flash, ...).
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_view import CacheView, update_paged
from .decode import decode_attention, takes_grouped_path
from .families import Family
from .maps import HeadMaps

ATTENTION_NAME = "dha_heads"
_CACHE_ARGUMENTS = ("past_key_values", "layer_past")


class AttentionConfig:
    """The model's config as its attention modules see it: only the name of the attention function differs.

    The model's own config keeps the user's choice, because masks are made by it.
    """

    _attn_implementation = ATTENTION_NAME

    def __init__(self, config: Any) -> None:
        self.model_config = config

    def __getattr__(self, name: str) -> Any:
        if name == "model_config":  # not there yet while being copied or unpickled
            raise AttributeError(name)
        return getattr(self.model_config, name)


class StockView:
    """The attention module as stock attention functions see it: with the model's own config (flash reads its name)."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.config = module.config.model_config

    def __getattr__(self, name: str) -> Any:
        if name == "module":
            raise AttributeError(name)
        return getattr(self.module, name)


class DhaAttention(nn.Module):
    """Mixed in before a family's attention class; `convert_attention` makes one out of a family's module."""

    dha_maps: HeadMaps

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for name in _CACHE_ARGUMENTS:
            if kwargs.get(name) is not None:
                kwargs[name] = CacheView(kwargs[name])
        return super().forward(*args, **kwargs)


def dha_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function of merged layers: `query [B, H, T, d]`, `key [B, Hk, S, d]`, `value [B, Hv, S, d]`.

    Returns:
        Output `[B, T, H, d]` and, with eager attention, the probabilities `[B, H, T, S]`.

    Raises:
        ValueError: continuous batching with an attention function that reads the paged cache itself.
    """
    maps, name = module.dha_maps, module.config.model_config._attn_implementation
    scaling = module.head_dim**-0.5 if scaling is None else scaling
    if kwargs.get("cache") is not None:
        name = name.removeprefix("paged|")
        if name not in ("sdpa", "eager"):
            raise ValueError(
                f"continuous batching with `{name}` reads the paged cache in a kernel that knows no head maps; "
                'call `model.set_attn_implementation("sdpa")` first.'
            )
        key, value = update_paged(kwargs.pop("cache"), key, value, module, kwargs)
    # With a key and a value head for every query head there is nothing to group.
    fused = min(maps.num_key_heads, maps.num_value_heads) < query.shape[1]
    if fused and takes_grouped_path(query, key, attention_mask, dropout, kwargs):
        return decode_attention(query, key, value, maps, scaling, attention_mask, weights=name == "eager")
    key, value = maps.expand(key, value)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, module.eager_attention)
    return function(StockView(module), query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, dha_attention)


def attention_class(family: Family, module_name: str) -> type:
    """`Dha<Family>Attention`: the family's attention class with `DhaAttention` before it."""
    base = family.base_class("Attention")
    eager = getattr(sys.modules[base.__module__], "eager_attention_forward", None)
    body = {"__module__": module_name, "eager_attention": staticmethod(eager)}
    return type(f"Dha{family.prefix}Attention", (DhaAttention, base), body)


def convert_attention(attention: nn.Module, cls: type, family: Family, config: Any, layer_idx: int) -> None:
    """Turn a family's freshly built attention module into a merged one, in place.

    In place, because then the module that the family's constructor built (with whatever arguments it wants) stays
    and only the two projections are made anew. New weights are not initialised here.
    """
    maps = HeadMaps(config.key_head_map[layer_idx], config.value_head_map[layer_idx])
    for name, heads in ((family.k, maps.num_key_heads), (family.v, maps.num_value_heads)):
        old = getattr(attention, name)
        shape = (old.in_features, heads * attention.head_dim)
        new = nn.Linear(*shape, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
        setattr(attention, name, new)
    attention.dha_maps = maps
    attention.num_key_value_groups = config.num_attention_heads // maps.num_pairs
    attention.config = AttentionConfig(config)
    attention.__class__ = cls
