"""Random heads, moments and metrics in float64, and heads that are one head in several frames; errors of whole partitions."""

from __future__ import annotations

import torch
from torch import Tensor

from dha_peft.fusion.heads import FrameLayout, HeadMaps
from dha_peft.fusion.problem import HeadProblem
from dha_peft.plan import Groups

DIM = 8
LAYOUTS = {
    "half": FrameLayout.rotary(DIM),
    "interleaved": FrameLayout.rotary(DIM, interleaved=True),
    "partial": FrameLayout.rotary(DIM, 4),
    "partial-interleaved": FrameLayout.rotary(DIM, 4, interleaved=True),
    "full": FrameLayout.full(DIM),
    "slow": FrameLayout.rotary(DIM).freed(torch.tensor([False, False, True, True])),
    "slow-partial": FrameLayout.rotary(DIM, 6).freed(torch.tensor([False, False, True])),
}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def random_psd(*shape: int) -> Tensor:
    """Positive definite `[..., n, n]` with spread eigenvalues."""
    root = randn(*shape) + torch.eye(shape[-1], dtype=torch.float64)
    return root @ root.transpose(-1, -2) / shape[-1]


def random_gauges(count: int, layout: FrameLayout, rigid: bool = False) -> HeadMaps:
    """Invertible maps of the kind the layout allows; rotations only when `rigid`."""
    pair = randn(count, len(layout.pairs), 2)
    full = torch.linalg.qr(randn(count, len(layout.rest), len(layout.rest)))[0]
    if rigid:
        return HeadMaps(pair / pair.norm(dim=-1, keepdim=True), full)
    return HeadMaps(pair, full * (0.3 + torch.rand(count, 1, len(layout.rest), dtype=torch.float64)))


def planted_heads(groups: Groups, layout: FrameLayout, size: int, rigid: bool = False) -> Tensor:
    """`[H, d, size]`: every group is one random head, seen through another gauge by each member."""
    count = sum(map(len, groups))
    heads = torch.empty(count, layout.head_dim, size, dtype=torch.float64)
    for group in groups:
        heads[list(group)] = randn(1, layout.head_dim, size).expand(len(group), -1, -1)
    return random_gauges(count, layout, rigid).apply(heads, layout)


def partition_error(groups: Groups, problem: HeadProblem) -> float:
    """Alignment error of a whole partition; groups of one cost nothing."""
    return sum(problem.error(list(group)) for group in groups)
