"""Attention that a family computes in a method of its own: decode on un-expanded heads, everything else by that method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .decode import grouped_attention, takes_grouped_path

Core = Callable[..., tuple[Tensor, Tensor]]


def unexpanded(core: Core) -> Core:
    """A family's `core(self, query, key, value, mask)` for `key` `[B, Hk, S, d]` and `value` `[B, Hv, S, d]`.

    Returns:
        A method with the same arguments, which gives back the output `[B, H, T, d]` and the probabilities `[B, H, T, S]`.
        Keys are compared in float32, as these families do because their scores overflow half precision.
    """

    def attend(self: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> Any:
        maps, dropout = self.dha_maps, self.attn_dropout.p if self.training else 0.0
        mask = _with_window(self, attention_mask, query.shape[2], key.shape[2])
        if takes_grouped_path(query, key, mask, dropout, {}):
            scale = 1 / float(getattr(self, "scale_attn", 1.0))
            return grouped_attention(query.float(), key.float(), value, maps, scale, mask)
        return core(
            self, query, key.index_select(1, maps.key_map), value.index_select(1, maps.value_map), attention_mask
        )

    return attend


def _with_window(module: Any, mask: Tensor | None, queries: int, keys: int) -> Tensor | None:
    """The mask together with the window of GPT-Neo's local layers, which lies in a buffer."""
    if getattr(module, "attention_type", "") != "local":
        return mask
    seen = module.bias[:, :, keys - queries : keys, :keys]
    return seen if mask is None else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
