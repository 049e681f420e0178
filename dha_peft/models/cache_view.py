"""What the attention sees of the KV cache: the real cache, with static layers sized for both head counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer
from transformers.utils import is_torchdynamo_compiling


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


def allocate_static(layer: StaticLayer, keys: Tensor, values: Tensor) -> None:
    """Initialise a static layer for keys `[B, Hk, T, d]` and values `[B, Hv, T, d]`."""
    layer.lazy_initialization(keys, values)
    batch, _, length, _ = layer.keys.shape
    layer.values = layer.keys.new_zeros(batch, values.shape[1], length, values.shape[-1])
    if not is_torchdynamo_compiling():
        # The same tag that transformers sets: without it CUDA graphs are skipped.
        torch._dynamo.mark_static_address(layer.values)
