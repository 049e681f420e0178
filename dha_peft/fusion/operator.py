"""The fusion operator: how a trainable matrix per layer turns the heads of a group into one, step by step.

The paper's operator is reconstructed as `W~_i = sum_j omega_ij W_j` over the group of head `i`. Ours runs the same in the group's frame:

    W~_i = B_i (sum_j omega_ij Z_j - c_i Z_i) + c_i W_i,      Z_j = A_j W_j,      c_i = omega_ii - mean_{k != i} omega_ki

`A` writes a head into the frame, `B` reads it back. With `omega` the identity `c = 1` and every head is exactly its
own; with equal rows `c = 0` and head `i` is `B_i` times one shared head, the closed form if the rows are `1 / n`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan import Groups
from .heads import FrameLayout, HeadMaps


@dataclass
class FusedHeads:
    """`heads` `[H, d, E]` are what the layer computes now, `collapsed` `[H, d, E]` what it will compute once every
    group is replaced by its mean; in the common frame `mixed` `[H, d, E]` is each head's mix, and `shared` `[H, d, E]` the mean over its group."""

    heads: Tensor
    collapsed: Tensor
    mixed: Tensor
    shared: Tensor


def same_group(groups: Groups) -> Tensor:
    """`[H, H]` bool: heads `i` and `j` are in one group."""
    owner = torch.empty(sum(map(len, groups)), dtype=torch.long)
    for index, group in enumerate(groups):
        owner[list(group)] = index
    return owner[:, None] == owner[None, :]


def fuse(
    heads: Tensor, omega: Tensor, together: Tensor, into: HeadMaps | None, out: HeadMaps | None, layout: FrameLayout
) -> FusedHeads:
    """Apply the operator. `heads` `[H, d, E]`, `omega` `[H, H]`, `together` `[H, H]` bool from `same_group`. Without
    maps this is the paper's linear fusion."""
    together = together.to(heads.dtype)
    omega = omega * together
    mean = together / together.sum(1, keepdim=True)
    framed = heads if into is None else into.apply(heads, layout)
    mixed = torch.tensordot(omega, framed, 1)
    shared = torch.tensordot(mean, mixed, 1)
    if into is None or out is None:
        return FusedHeads(mixed, shared, mixed, shared)
    own = own_share(omega, together)[:, None, None]
    fused = out.apply(mixed - own * framed, layout) + own * heads
    return FusedHeads(fused, out.apply(shared, layout), mixed, shared)


def own_share(omega: Tensor, together: Tensor) -> Tensor:
    """`c_i`: how much more of head `i` it keeps itself than the others of its group take from it, `[H]`. 1 for the
    identity, 0 when all rows of a group are equal."""
    others = (together.sum(0) - 1).clamp_min(1)
    own = omega.diagonal()
    return own - (omega.sum(0) - own) / others


def distances(heads: Tensor, fused: FusedHeads) -> tuple[Tensor, Tensor]:
    """Squared distance of every head from its collapse, and the energy of the head that it was, `[H]` each."""
    return (fused.heads - fused.collapsed).pow(2).sum((1, 2)), heads.pow(2).sum((1, 2))


def fusion_loss(apart: Tensor, energy: Tensor) -> Tensor:
    """Relative distance of a layer's heads from their collapse, `sum ||W~_i - collapsed_i||^2 / sum ||W_i||^2`, from `distances`
    (reconstruction, measured on the heads that result). 0 means that the collapse changes nothing."""
    return apart.sum() / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny)
