"""The divergence of next-token distributions and its gradient in one Triton kernel, one program per token. Its reference is
`losses.naive_divergence`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _log_normaliser(logits, size, BLOCK: tl.constexpr):
    top, total = float("-inf"), 0.0
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, mask=columns < size, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        top = higher
    return top + tl.log(total)


@triton.jit
def _divergence_kernel(ours, theirs, labels, losses, gradient, size, next_token, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    ours, theirs, gradient = ours + row * size, theirs + row * size, gradient + row * size
    label = tl.load(labels + row)
    labelled = tl.where(label >= 0, next_token, 0.0)
    our_normaliser, their_normaliser = _log_normaliser(ours, size, BLOCK), _log_normaliser(theirs, size, BLOCK)
    loss = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside, at = columns < size, columns == label
        log_p = tl.load(ours + columns, mask=inside, other=0.0).to(tl.float32) - our_normaliser
        log_q = tl.load(theirs + columns, mask=inside, other=0.0).to(tl.float32) - their_normaliser
        q = tl.exp(log_q)
        loss += tl.where(inside, (1 - next_token) * q * (log_q - log_p), 0.0) - tl.where(at, labelled * log_p, 0.0)
        change = (1 - next_token + labelled) * tl.exp(log_p) - (1 - next_token) * q - tl.where(at, labelled, 0.0)
        tl.store(gradient + columns, change.to(gradient.dtype.element_ty), mask=inside)
    tl.store(losses + row, tl.sum(loss, 0))


def divergence_kernel(logits: Tensor, wanted: Tensor, labels: Tensor, next_token: float) -> tuple[Tensor, Tensor]:
    """As `losses.naive_divergence`, for logits on a GPU in at most 32 bits."""
    logits, wanted, labels = logits.contiguous(), wanted.contiguous(), labels.contiguous()
    count, size = logits.shape
    losses, gradient = logits.new_empty(count, dtype=torch.float32), torch.empty_like(logits)
    block = min(triton.next_power_of_2(size), 4096)
    with torch.cuda.device_of(logits):
        _divergence_kernel[count,](
            logits, wanted, labels, losses, gradient, size, float(next_token), BLOCK=block, num_warps=8
        )
    return losses.sum(), gradient
