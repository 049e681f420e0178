"""What the attention sees of the KV cache: the real cache, with static layers sized for both head counts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import EncoderDecoderCache, StaticLayer
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.utils import is_torchdynamo_compiling

_PAGED_TAKES_KWARGS = "kwargs" in inspect.signature(PagedAttentionCache.update).parameters


class CacheView:
    """Passes everything on to the cache; before the first `update` of a static layer it allocates values for `Hv` heads.

    Transformers sizes a static layer's values by the number of key heads; here the two counts differ.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["cache"], name)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store `[B, Hk, T, d]` and `[B, Hv, T, d]`; returns all that is to be attended, un-expanded."""
        if keys.shape[1] != values.shape[1] and layer_idx < len(self.cache.layers):
            layer = self.cache.layers[layer_idx]
            if isinstance(layer, StaticLayer) and not layer.is_initialized:
                allocate_static(layer, keys, values)
        return self.cache.update(keys, values, layer_idx, *args, **kwargs)


class GatherView(CacheView):
    """A cache, or none, seen by a forward that wants one key and one value head per query head.

    `update` takes these, cuts out the distinct heads, stores only them, and gives back what the forward's attention
    expects: the distinct heads where it is transformers' attention interface, all heads where it is its own.
    """

    def __init__(self, cache: Any, maps: Any, expand: bool) -> None:
        super().__init__(cache)
        self.maps, self.expand = maps, expand

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`[B, H, T, d]` each; returns `[B, Hk, S, d]` and `[B, Hv, S, d]`, or `[B, H, S, d]` each."""
        maps = self.maps
        keys, values = keys.index_select(1, maps.key_first), values.index_select(1, maps.value_first)
        if self.cache is not None:
            keys, values = super().update(keys, values, layer_idx, *args, **kwargs)
        if self.expand:
            return keys.index_select(1, maps.key_map), values.index_select(1, maps.value_map)
        return keys, values

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0 if self.cache is None else self.cache.get_seq_length(*args, **kwargs)


class PairView(EncoderDecoderCache):
    """The two caches of an encoder-decoder, each seen through a view; what is noted on this one is noted on the cache."""

    def __init__(self, cache: EncoderDecoderCache, view: Callable[[Any], CacheView]) -> None:
        self.self_attention_cache = view(cache.self_attention_cache)
        self.cross_attention_cache = view(cache.cross_attention_cache)
        self.is_updated = cache.is_updated


def allocate_static(layer: StaticLayer, keys: Tensor, values: Tensor) -> None:
    """Initialise a static layer for keys `[B, Hk, T, d]` and values `[B, Hv, T, d]`."""
    layer.lazy_initialization(keys, values)
    batch, _, length, _ = layer.keys.shape
    layer.values = layer.keys.new_zeros(batch, values.shape[1], length, values.shape[-1])
    if not is_torchdynamo_compiling():
        # The same tag that transformers sets: without it CUDA graphs are skipped.
        torch._dynamo.mark_static_address(layer.values)


def update_paged(
    cache: Any, keys: Tensor, values: Tensor, module: Any, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Update a paged cache (continuous batching), whose pool has one head count for keys, values and all layers.

    Args:
        keys: `[1, Hk, T, d]`; values: `[1, Hv, T, d]`. Both are padded to the pool's `config.num_key_value_heads`,
            which is the largest count in the model.
        kwargs: the attention function's arguments, which the cache reads and newer versions fill in place.

    Returns:
        All that is to be attended, `[1, Hk, S, d]` and `[1, Hv, S, d]`.
    """
    pool = module.config.num_key_value_heads
    padded = [pad(states, (0, 0, 0, 0, 0, pool - states.shape[1])) for states in (keys, values)]
    if _PAGED_TAKES_KWARGS:
        everything = cache.update(*padded, layer_idx=module.layer_idx, kwargs=kwargs)
    else:  # older transformers: explicit indices, and [S, heads, d] comes back
        indices = {name: kwargs[name] for name in ("read_index", "write_index")}
        flat = cache.update(*padded, layer_idx=module.layer_idx, **indices)
        everything = [states.transpose(0, 1).unsqueeze(0) for states in flat]
    return everything[0][:, : keys.shape[1]], everything[1][:, : values.shape[1]]
