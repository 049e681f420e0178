"""Which stretch of the cache a mask leaves visible, found on the device so that unfilled slots are never read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def bounds_kernel(
    mask_ptr, start_ptr, length_ptr, stride_b, stride_t, stride_s, num_keys, lowest,
    TOKENS: tl.constexpr, ADDITIVE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid (batch,): index of the first key that any query sees, and one past the last."""
    batch = tl.program_id(0)
    first = tl.full([KEYS], 2147483647, tl.int32)
    last = tl.zeros([KEYS], tl.int32)
    for begin in tl.range(0, num_keys, KEYS):
        key = begin + tl.arange(0, KEYS)
        for token in tl.static_range(TOKENS):
            at = mask_ptr + batch.to(tl.int64) * stride_b + token * stride_t
            if ADDITIVE:
                seen = tl.load(at + key.to(tl.int64) * stride_s, mask=key < num_keys, other=-float("inf")) > lowest
            else:
                seen = tl.load(at + key.to(tl.int64) * stride_s, mask=key < num_keys, other=0) != 0
            first = tl.where(seen, tl.minimum(first, key), first)
            last = tl.where(seen, key + 1, last)
    end = tl.max(last, 0)
    tl.store(start_ptr + batch, tl.minimum(tl.min(first, 0), end))
    tl.store(length_ptr + batch, end)


def launch_bounds(mask: Tensor, batch: int) -> Tensor:
    """`mask [B or 1, 1, Tq or 1, S]`, bool or additive -> `[2, B]` int32, starts and lengths."""
    bounds = torch.empty(2, batch, dtype=torch.int32, device=mask.device)
    additive = mask.dtype != torch.bool
    lowest = torch.finfo(mask.dtype).min / 2 if additive else 0.0
    stride_b, _, stride_t, stride_s = mask.stride()
    bounds_kernel[(batch,)](
        mask if additive else mask.view(torch.uint8), bounds[0], bounds[1], stride_b if mask.shape[0] > 1 else 0,
        stride_t, stride_s, mask.shape[3], lowest, TOKENS=mask.shape[2], ADDITIVE=additive,
        KEYS=min(4096, triton.next_power_of_2(mask.shape[3])), num_warps=4,
    )  # fmt: skip
    return bounds
