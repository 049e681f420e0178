"""`mask_bounds` as one Triton launch, for code that is not compiled."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["stride_b", "stride_t", "num_keys"])
def bounds_kernel(
    mask_ptr, bounds_ptr, stride_b, stride_t, stride_s, num_keys, lowest,
    TOKENS: tl.constexpr, ADDITIVE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid (batch,). Writes first, last and count to `bounds [3, batch]`."""
    batch, total = tl.program_id(0), tl.num_programs(0)
    first = tl.full([KEYS], 2147483647, tl.int32)
    last, count = tl.zeros([KEYS], tl.int32), tl.zeros([KEYS], tl.int32)
    for begin in range(0, num_keys, KEYS):
        key = begin + tl.arange(0, KEYS)
        seen, plain = key < 0, key < num_keys
        for token in tl.static_range(TOKENS):
            at = mask_ptr + batch.to(tl.int64) * stride_b + token * stride_t + key.to(tl.int64) * stride_s
            value = tl.load(at, mask=key < num_keys, other=0)
            if ADDITIVE:
                seen = seen | ((value.to(tl.float32) > lowest) & (key < num_keys))
                plain = plain & (value.to(tl.float32) == 0)
            else:
                seen = seen | (value != 0)
                plain = plain & (value != 0)
        first = tl.where(seen, tl.minimum(first, key), first)
        last = tl.where(seen, key + 1, last)
        count += plain.to(tl.int32)
    tl.store(bounds_ptr + batch, tl.minimum(tl.min(first, 0), num_keys))
    tl.store(bounds_ptr + total + batch, tl.max(last, 0))
    tl.store(bounds_ptr + 2 * total + batch, tl.sum(count, 0))


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of `x` the current one, where Triton launches; switching costs time, so not if it is already."""
    return nullcontext() if x.device.index == torch.cuda.current_device() else torch.cuda.device(x.device)


def launch_bounds(mask: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results of `mask_bounds`."""
    bounds = torch.empty(3, batch, dtype=torch.int32, device=mask.device)
    additive = mask.dtype != torch.bool
    lowest = torch.finfo(mask.dtype).min / 2 if additive else 0.0
    stride_b, _, stride_t, stride_s = mask.stride()
    with on_device_of(mask):
        bounds_kernel[(batch,)](
            mask if additive else mask.view(torch.uint8), bounds, stride_b if mask.shape[0] > 1 else 0, stride_t,
            stride_s, mask.shape[3], lowest, TOKENS=mask.shape[2], ADDITIVE=additive,
            KEYS=min(4096, triton.next_power_of_2(mask.shape[3])), num_warps=8,
        )  # fmt: skip
    return bounds.unbind(0)
