"""Second moments of what enters an attention block, and the Gram matrices and metrics that follow from them.

Everything that the search and the alignment need is here: `gram`, how alike two heads' outputs are on real inputs,
and `metric`, how much an error in a head's output matters. Both are small (`H d x H d` and `H x d x d`).
Source: ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .heads import AttentionWeights


class MomentAccumulator:
    """Sums `x x^T` over token vectors; memory is one `E x E` matrix. Inputs get a constant 1 appended when `bias`."""

    def __init__(self, size: int, bias: bool = False, device: torch.device | str = "cpu") -> None:
        self.bias = bias
        self.total = torch.zeros(size + bias, size + bias, dtype=torch.float32, device=device)
        self.count = 0

    def add(self, x: Tensor) -> None:
        """`x` `[N, size]`, one row per token that counts (padding already removed)."""
        x = x.to(self.total.dtype)
        if self.bias:
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        self.total.addmm_(x.T, x)
        self.count += len(x)

    def mean(self) -> Tensor:
        """`E[x x^T]`, `[E, E]`."""
        if not self.count:
            raise ValueError("no token reached this attention block during calibration; check the attention masks.")
        return self.total / self.count


def identity_moment(size: int, bias: bool = False, **kwargs) -> Tensor:
    """The moment used without calibration data: white inputs (and the constant 1 of the biases)."""
    return torch.eye(size + bias, **kwargs)


def head_gram(heads: Tensor, moment: Tensor) -> Tensor:
    """`E[(W_i x)(W_j x)^T]` for every pair of heads: `heads` `[H, d, E]`, `moment` `[E, E]` to `[H, H, d, d]`."""
    return row_gram(heads @ moment, heads)


def row_gram(moved: Tensor, rows: Tensor, blocks: int = 8) -> Tensor:
    """Products `moved_i rows_j^T` of blocks of rows, `[H, R, E]` twice to `[H, H, R, R]`, where `moved` is `rows` times a symmetric
    matrix: the lower half, in `blocks` strips, is enough."""
    count, dim, size = rows.shape
    left, right = moved.reshape(count * dim, size), rows.reshape(count * dim, size)
    gram = rows.new_zeros(count * dim, count * dim)
    step = max(-(-count * dim // blocks), 1)
    for start in range(0, count * dim, step):
        stop = start + step
        gram[start:stop, :stop] = left[start:stop] @ right[:stop].T
    gram = gram.tril()
    gram += gram.tril(-1).T
    return gram.reshape(count, dim, count, dim).transpose(1, 2)


def query_metric(weights: AttentionWeights, moment: Tensor) -> Tensor:
    """Metric on keys: `E[q q^T]` summed over the query heads that read a key head, `[H, d, d]`. An error `e` of key
    head `i` moves its scores by `e^T metric_i e`. RoPE leaves the pairs' moduli alone, so it may be ignored."""
    power = weights.query @ moment @ weights.query.transpose(1, 2)
    return power.reshape(weights.num_heads, weights.queries_per_head, *power.shape[1:]).sum(1)


def output_metric(weights: AttentionWeights) -> Tensor:
    """Metric on values: `W_O^T W_O` summed over the query heads that read a value head, `[H, d, d]`."""
    power = weights.output.transpose(1, 2) @ weights.output
    return power.reshape(weights.num_heads, weights.queries_per_head, *power.shape[1:]).sum(1)
