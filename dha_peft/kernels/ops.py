"""The kernels as operators of torch: `torch.compile(fullgraph=True)`, export and CUDA graphs take them whole."""

from __future__ import annotations

import torch
from torch import Tensor


# Any layout is taken as it is. Without that tag the compiler makes a copy of the mask for each layer of a model.
@torch.library.custom_op("dha_peft::decode", mutates_args=(), device_types="cuda", tags=(torch.Tag.flexible_layout,))
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_map: Tensor,
    value_map: Tensor,
    scale: float,
    mask: Tensor | None = None,
    start: Tensor | None = None,
    length: Tensor | None = None,
    plain: Tensor | None = None,
) -> Tensor:
    """Arguments of `launch_decode` -> `[B, Hq, Tq, d]`, laid out in memory as `[B, Tq, Hq, d]`."""
    from .launch import launch_decode

    return launch_decode(q, k, v, key_map, value_map, scale, mask, start, length, plain)


@decode.register_fake
def _(q, k, v, key_map, value_map, scale, mask=None, start=None, length=None, plain=None):
    batch, heads, tokens, dim = q.shape
    return q.new_empty(batch, tokens, heads, dim).transpose(1, 2)
