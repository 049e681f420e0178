"""What alignment has to know of one kind of heads of one layer, and how it looks to a group of them.

Heads `W_i` (`d x E`) with the moment `C` of their inputs enter only by the Gram matrices `W_i C W_j^T`, and of these only by the parts that
a change of frame may mix: one complex number per rotary pair, and the block of the free rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .heads import FrameLayout
from .moments import row_gram
from .spectra import matrix_sqrt, tail_energy


@dataclass
class WeightedGram:
    """Gram matrices of `M_i^(1/2) W_i C^(1/2)` for one group of `n` heads: `pair` `[P, n, n]` complex Hermitian,
    `full` `[n R, n R]` symmetric."""

    pair: Tensor
    full: Tensor
    rest: int

    def parts(self) -> list[tuple[Tensor, int]]:
        """(matrices, how many top directions a shared head keeps of each)."""
        parts = [(self.pair, 1)] if self.pair.shape[0] else []
        return parts + ([(self.full, self.rest)] if self.rest else [])

    def error(self) -> Tensor:
        """Weighted energy that one shared head loses, a scalar."""
        return torch.stack([tail_energy(matrix, keep).sum() for matrix, keep in self.parts()]).sum()


@dataclass
class HeadProblem:
    """Gram matrices of `H` heads, `pair` `[P, H, H]` complex (`kappa_i C kappa_j^H` with `kappa = row_a + i row_b`) and `rest`
    `[H, H, R, R]`, and the metrics of their errors, `weight` `[P, H]` and `metric` `[H, R, R]`."""

    pair: Tensor
    rest: Tensor
    weight: Tensor
    metric: Tensor
    layout: FrameLayout

    @classmethod
    def from_heads(cls, heads: Tensor, moment: Tensor, metric: Tensor, layout: FrameLayout) -> HeadProblem:
        """From heads `[H, d, E]`, the moment `[E, E]` of their inputs and the metrics `[H, d, d]` of their errors."""
        moved = heads @ moment
        free = metric[:, layout.rest[:, None], layout.rest]
        rest = row_gram(moved[:, layout.rest], heads[:, layout.rest])
        return cls(_pair_gram(moved, heads, layout), rest, _pair_weight(metric, layout), free, layout)

    def __len__(self) -> int:
        return self.metric.shape[0]

    def select(self, members: list[int]) -> HeadProblem:
        """The same for some of the heads."""
        pair, rest = self.pair[:, members][:, :, members], self.rest[members][:, members]
        return HeadProblem(pair, rest, self.weight[:, members], self.metric[members], self.layout)

    def unmixed(self) -> HeadProblem:
        """The problem of the free rows alone, if slow pairs may only take complex factors."""
        slow, size = self.layout.slow, self.rest.shape[-1]
        first, second, other = torch.arange(slow), torch.arange(slow, 2 * slow), torch.arange(2 * slow, size)
        layout = FrameLayout(torch.stack([first, second], 1), other).to(self.rest.device)
        real = self.rest[:, :, first, first] + self.rest[:, :, second, second]
        pair = torch.complex(real, self.rest[:, :, second, first] - self.rest[:, :, first, second]).permute(2, 0, 1)
        free = (..., other[:, None], other)
        return HeadProblem(pair, self.rest[free], _pair_weight(self.metric, layout), self.metric[free], layout)

    def weighted(self) -> WeightedGram:
        """Gram matrices under the metrics."""
        root = self.weight.clamp_min(0).sqrt()
        sqrt, size = matrix_sqrt(self.metric), self.rest.shape[0] * self.rest.shape[2]
        full = sqrt[:, None] @ self.rest @ sqrt[None, :]
        full = full.transpose(1, 2).reshape(size, size)
        return WeightedGram(root[:, :, None] * self.pair * root[:, None, :], full, self.rest.shape[2])

    def error(self, members: list[int]) -> float:
        """What one shared head for these heads loses; a head alone loses nothing."""
        return float(self.select(members).weighted().error()) if len(members) > 1 else 0.0


def _pair_gram(moved: Tensor, heads: Tensor, layout: FrameLayout) -> Tensor:
    """Complex Gram per rotary pair, `[P, H, H]`."""
    left, right = ([x[:, rows].transpose(0, 1) for rows in layout.pairs.unbind(1)] for x in (moved, heads))
    (aa, ab), (ba, bb) = ([x @ y.transpose(1, 2) for y in right] for x in left)
    gram = torch.complex(aa + bb, ba - ab)
    return (gram + gram.mH) / 2


def _pair_weight(metric: Tensor, layout: FrameLayout) -> Tensor:
    """Mean metric of the two rows of a pair: `[H, d, d]` to `[P, H]`."""
    return metric.diagonal(dim1=-2, dim2=-1)[:, layout.pairs].mean(-1).T
