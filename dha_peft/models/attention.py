"""The merged attention: the family's own forward, on fewer key and value heads.

No forward is copied. The projections produce `Hk` key and `Hv` value heads, the cache stores exactly these, and the
attention *function* that the family's forward calls is ours: it either attends to the un-expanded heads (decode) or
expands them and calls the function that the user chose (`sdpa`, `eager`, flash, ...).
"""

from __future__ import annotations

import inspect
import sys
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_view import CacheView, GatherView, PairView, update_paged
from .core import unexpanded
from .decode import biased_mask, decode_attention, takes_grouped_path
from .family import Family, get_path, head_size, rotary_pairs, rotary_size, set_path
from .maps import HeadMaps
from .norms import QueryTurn, SharedNorm
from .packing import HeadLinear, head_order

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


class HeadCount:
    """A config with another number of key heads, for building the norms of one layer."""

    def __init__(self, config: Any, num_key_value_heads: int) -> None:
        self.model_config, self.num_key_value_heads = config, num_key_value_heads

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model_config"], name)


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
    dha_gather = False
    dha_expand = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for name in self.dha_cache_arguments:
            cache = kwargs.get(name)
            if isinstance(cache, EncoderDecoderCache):
                kwargs[name] = PairView(cache, self.dha_view)
            elif cache is not None or self.dha_gather:
                kwargs[name] = self.dha_view(cache)
        return super().forward(*args, **kwargs)

    def dha_view(self, cache: Any) -> CacheView:
        """The cache as the family's forward sees it."""
        return GatherView(cache, self.dha_maps, expand=self.dha_expand) if self.dha_gather else CacheView(cache)


def dha_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function of merged layers: `query [B, H, T, d]`, `key [B, Hk, S, d]`, `value [B, Hv, S, d]`.

    Returns:
        Output `[B, T, H, d]` and, with eager attention, the probabilities `[B, H, T, S]`.

    Raises:
        ValueError: continuous batching with an attention function that reads the paged cache itself.
    """
    maps, name = module.dha_maps, module.config.model_config._attn_implementation
    step = kwargs.pop("dha_step", None)
    scaling = module.head_dim**-0.5 if scaling is None else scaling
    if hasattr(module, "dha_turn"):
        query = module.dha_turn(query)
    if kwargs.get("cache") is not None:
        name = name.removeprefix("paged|")
        if name not in ("sdpa", "eager"):
            raise ValueError(
                f"continuous batching with `{name}` reads the paged cache in a kernel that knows no head maps; "
                'call `model.set_attn_implementation("sdpa")` first.'
            )
        key, value = update_paged(kwargs.pop("cache"), key, value, module, kwargs)
    # With a key and a value head for every query head there is nothing to group.
    fused, softcap = min(maps.num_key_heads, maps.num_value_heads) < query.shape[1], kwargs.get("softcap")
    fused = fused and not (softcap and name == "sdpa")  # which caps nothing, or refuses to
    if fused and takes_grouped_path(query, key, attention_mask, dropout, kwargs):
        weights, sinks = name == "eager", kwargs.get("s_aux")
        mask = biased_mask(attention_mask, kwargs.get("position_bias"))
        return decode_attention(query, key, value, maps, scaling, mask, weights, step, softcap, sinks)
    key, value = maps.expand(key, value)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, module.eager_attention)
    return function(StockView(module), query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, dha_attention)


@cache
def attention_class(base: type, core: str = "") -> type:
    """`Dha<...>`: a family's attention class with `DhaAttention` before it, and its method `core` on un-expanded heads."""
    eager = getattr(sys.modules[base.__module__], "eager_attention_forward", None)
    arguments = tuple(name for name in inspect.signature(base.forward).parameters if name in _CACHE_ARGUMENTS)
    body = {"__module__": __name__, "eager_attention": staticmethod(eager), "dha_cache_arguments": arguments}
    if core:
        body[core] = unexpanded(getattr(base, core))
    cls = type(f"Dha{base.__name__}", (DhaAttention, base), body)
    globals()[cls.__name__] = cls
    return cls


def convert_attention(attention: nn.Module, family: Family, config: Any, layer_idx: int) -> None:
    """Turn a family's freshly built attention module into a merged one, in place.

    In place, because then the module that the family's constructor built (with whatever arguments it wants) stays
    and only the projections of keys and values, and norms that depend on head counts, are made anew. New weights are
    not initialised here.
    """
    grouped = hasattr(attention, "num_key_value_groups")
    maps = HeadMaps(config.key_head_map[layer_idx], config.value_head_map[layer_idx], grouped)
    attention.head_dim = head_size(attention, config)
    _replace_norms(attention, family, config, maps)
    for name, module in _projections(attention, family, maps).items():
        set_path(attention, name, module)
    heads = len(maps.keys)
    for name in ("num_key_value_heads", "num_kv_heads", "kv_heads"):
        if family.gather and hasattr(attention, name):
            setattr(attention, name, heads)
    core = family.core if config._attn_implementation == "eager" else ""  # flash classes do not call it
    attention.dha_maps, attention.dha_gather = maps, family.gather
    attention.dha_expand = family.gather and not (family.dispatch or core)
    if grouped:
        attention.num_key_value_groups = heads // maps.num_pairs
    if family.dispatch:
        attention.config = AttentionConfig(config)
    attention.__class__ = attention_class(type(attention), core)


def _projections(attention: nn.Module, family: Family, maps: HeadMaps) -> dict[str, nn.Module]:
    """The projections that change, by name."""
    if family.packing != "separate":
        places = _places(head_order(family.packing, len(maps.keys), len(maps.keys)), maps)
        return {family.k: _head_linear(get_path(attention, family.k), places, attention.head_dim)}
    wanted = {family.k: maps.keys, family.v: maps.values}
    if family.gather:
        return {
            name: _head_linear(get_path(attention, name), heads, attention.head_dim) for name, heads in wanted.items()
        }
    new = {}
    for name, heads in wanted.items():
        old, rows = get_path(attention, name), (max(heads) + 1) * attention.head_dim
        kwargs = {"device": old.weight.device, "dtype": old.weight.dtype}
        new[name] = nn.Linear(old.in_features, rows, bias=old.bias is not None, **kwargs)
    return new


def _head_linear(old: nn.Module, places: list[int], dim: int) -> HeadLinear:
    # transformers' Conv1D keeps `[inputs, outputs]`.
    size = old.in_features if isinstance(old, nn.Linear) else old.weight.shape[0]
    return HeadLinear(size, places, dim, old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)


def _places(order: list[tuple[str, int]], maps: HeadMaps) -> list[int]:
    """Stored heads are all queries, then the distinct keys, then the distinct values."""
    queries = len(maps.keys)
    where = {
        "q": list(range(queries)),
        "k": [queries + head for head in maps.keys],
        "v": [queries + maps.num_key_heads + head for head in maps.values],
    }
    return [where[kind][index] for kind, index in order]


def _replace_norms(attention: nn.Module, family: Family, config: Any, maps: HeadMaps) -> None:
    pairs = rotary_pairs(family, rotary_size(family, attention, config))
    kwargs = {"device": next(attention.parameters()).device, "dtype": next(attention.parameters()).dtype}
    if family.has_turn(attention):
        attention.dha_turn = QueryTurn(len(maps.keys), pairs, **kwargs)
    norm = getattr(attention, family.norm, None)
    if family.has_norm(attention, "all_rms"):
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        setattr(attention, family.norm, SharedNorm(maps.keys, attention.head_dim, pairs, eps, **kwargs))
    if family.has_norm(attention, "head_layer"):
        count = len(maps.keys) if family.gather else maps.num_key_heads
        fresh = type(attention)(HeadCount(config, count), attention.layer_idx)
        setattr(attention, family.norm, getattr(fresh, family.norm))
