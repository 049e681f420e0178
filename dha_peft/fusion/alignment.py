"""Alignment: the shared head of a group, the maps into it and the maps out of it, in closed form (ours).

For a group of heads `W_i` (`d x E`) with input moment `C` and error metrics `M_i`, the shared head `S = sum_i A_i W_i`
and the read-outs `B_i` minimise `sum_i E || M_i^(1/2) (W_i - B_i S) x ||^2`. With `X_i = M_i^(1/2) W_i C^(1/2)` stacked,
this is a truncated SVD, and it needs only the Gram matrices `W_i C W_j^T`. Rotary pairs may only be multiplied by complex numbers:
there the same problem splits into one rank-1 Hermitian problem per pair. Pairs that hardly turn are mixed freely, and of all frames in which
the shared head could be written the one next to that of complex numbers is taken, where the read-outs commute best with what they do turn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .heads import FrameLayout, HeadMaps
from .problem import HeadProblem, WeightedGram
from .spectra import matrix_sqrt, top_eigh


@dataclass
class GroupFrame:
    """Maps of one group's members, in group order: `into` (`A_i`) and `out` (`B_i`)."""

    into: HeadMaps
    out: HeadMaps


def align_group(problem: HeadProblem) -> GroupFrame:
    """Shared head and frames of one group, whose problem this is, in closed form. A group of one gets identity maps.

    The shared head is scaled to the mean norm of the heads that it replaces, so that later training sees weights of
    the usual size.
    """
    layout, like = problem.layout, problem.metric
    if len(problem) == 1:
        maps = HeadMaps.identity(1, layout, dtype=like.dtype, device=like.device)
        return GroupFrame(maps, maps)
    weighted = problem.weighted()
    pair_in, pair_out = _align_pairs(weighted.pair, problem.pair, problem.weight)
    if layout.phases is not None:
        return _rigid_frame(pair_out, problem.pair, layout, problem.rest)
    full_in, full_out = _align_full(weighted, problem)
    return GroupFrame(HeadMaps(pair_in, full_in), HeadMaps(pair_out, full_out))


def _align_pairs(weighted: Tensor, gram: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Complex factors into and out of the shared pair, each `[n, P, 2]`."""
    count = weights.shape[1]
    if not len(weighted):
        empty = weights.new_zeros(count, 0, 2)
        return empty, empty
    top = torch.linalg.eigh(weighted).eigenvectors[..., -1]
    into = top.conj() * weights.clamp_min(0).sqrt()
    energy = torch.einsum("pi,pij,pj->p", into, gram, into.conj()).real
    wanted = gram.diagonal(dim1=1, dim2=2).real.mean(1)
    into = into * (wanted / energy.clamp_min(torch.finfo(wanted.dtype).tiny)).sqrt()[:, None]
    cross = torch.einsum("pij,pj->pi", gram, into.conj())
    out = cross / wanted.clamp_min(torch.finfo(wanted.dtype).tiny)[:, None]
    return tuple(torch.view_as_real(maps.T.resolve_conj()).contiguous() for maps in (into, out))


def _rigid_frame(pair_out: Tensor, gram: Tensor, layout: FrameLayout, rest: Tensor) -> GroupFrame:
    """Heads scaled to equal energy (the norm takes no notice), turned by the phases of the free solution `[n, P, 2]`, averaged;
    turned pairs keep their mean energy. `rest` `[n, n, R, R]` is the Gram of the rows without pairs."""
    count = len(pair_out)
    identity = HeadMaps.identity(count, layout, dtype=pair_out.dtype, device=pair_out.device)
    out = HeadMaps(pair_out, identity.full).restricted(layout)
    own = gram.diagonal(dim1=1, dim2=2).real
    energy = own.sum(0) + rest.diagonal(dim1=0, dim2=1).diagonal(dim1=0, dim2=1).sum(-1)
    tiny = torch.finfo(energy.dtype).tiny
    weight = (energy.mean() / energy.clamp_min(tiny)).sqrt()
    factors = torch.view_as_complex(out.transpose().pair.contiguous()).T * weight / count
    shared = torch.einsum("pi,pij,pj->p", factors, gram, factors.conj()).real
    gain = ((own * weight**2).mean(1) / shared.clamp_min(tiny)).sqrt()
    gain = torch.where(layout.phases, gain, torch.ones_like(gain))
    into = torch.view_as_real((factors * gain[:, None]).T).contiguous()
    return GroupFrame(HeadMaps(into, identity.full * weight[:, None, None] / count), out)


def _align_full(weighted: WeightedGram, problem: HeadProblem) -> tuple[Tensor, Tensor]:
    """Matrices into and out of the shared free rows, each `[n, R, R]`."""
    count, size, gram = len(problem), weighted.rest, problem.rest
    if not size:
        empty = gram.new_zeros(count, 0, 0)
        return empty, empty
    values, vectors = top_eigh(weighted.full, size)
    # Directions without energy are known only up to rounding.
    floor = values[-1].clamp_min(torch.finfo(values.dtype).tiny) * 8 * torch.finfo(values.dtype).eps
    vectors = (vectors / values.clamp_min(floor).sqrt()).reshape(count, size, size)
    into = vectors.transpose(1, 2) @ matrix_sqrt(problem.metric)
    out = torch.einsum("ijab,jcb->iac", gram, into)
    # In this frame the shared head's outputs are white; give them the mean energy of the heads they replace.
    if not problem.layout.slow:
        scale = _mean_norm(gram, size)
        return into * scale, out / scale
    frame = _slow_frame(into, problem)
    return frame @ into, out @ torch.linalg.pinv(frame)


def _slow_frame(into: Tensor, problem: HeadProblem) -> Tensor:
    """The matrix `[R, R]` that writes the white shared rows `sum_i into_i W_i` as near as an orthogonal matrix can bring them to those of the
    solution that does not mix slow pairs; where that one is exact, so is this."""
    strict, size = problem.unmixed(), problem.rest.shape[-1]
    eye = torch.eye(size, dtype=into.dtype, device=into.device)
    wanted = align_group(strict).into.apply(eye.expand_as(into), strict.layout)
    root = matrix_sqrt(torch.einsum("iab,ijbc,jdc->ad", wanted, problem.rest, wanted))
    cross = torch.linalg.pinv(root, hermitian=True) @ torch.einsum("iab,ijbc,jdc->ad", wanted, problem.rest, into)
    left, _, right = torch.linalg.svd(cross)
    return root @ left @ right


def _mean_norm(gram: Tensor, size: int) -> Tensor:
    own = gram.diagonal(dim1=0, dim2=1).diagonal(dim1=0, dim2=1)
    return (own.sum() / (gram.shape[0] * size)).clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
