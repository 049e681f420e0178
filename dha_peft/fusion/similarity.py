"""How alike the heads of a layer are: three measures, each `[H, H]` with ones on the diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import HeadProblem, WeightedGram


def cosine_similarity(heads: Tensor) -> Tensor:
    """Cosine between the flattened weights of heads, `[H, d, E]` to `[H, H]`. Blind to a change of frame."""
    rows = torch.nn.functional.normalize(heads.flatten(1), dim=1)
    return rows @ rows.T


def cka_similarity(gram: Tensor) -> Tensor:
    """Linear CKA of head outputs without centering, from `head_gram` `[H, H, d, d]`. Invariant to rotations of a head
    (Kornblith et al. 2019); the paper has a variant that groups by it."""
    cross = gram.pow(2).sum((-1, -2))
    own = cross.diagonal().clamp_min(torch.finfo(cross.dtype).tiny).sqrt()
    return cross / (own[:, None] * own[None, :])


def aligned_similarity(problem: HeadProblem) -> Tensor:
    """Share of two heads' weighted energy that one shared head keeps, rescaled so that 0 is "nothing in common" and
    1 is "the same head in another frame" (ours)."""
    count, like = len(problem), problem.metric
    similarity = torch.eye(count, dtype=like.dtype, device=like.device)
    for i in range(count):
        for j in range(i):
            value = _pair_similarity(problem.select([i, j]).weighted())
            similarity[i, j] = similarity[j, i] = value
    return similarity


def _pair_similarity(spectra: WeightedGram) -> Tensor:
    """Energy kept beyond what the better half alone would keep, over the most that could be gained."""
    kept, total, alone = torch.zeros(3, dtype=spectra.full.dtype, device=spectra.full.device).unbind()
    for matrix, keep in spectra.parts():
        values = torch.linalg.eigvalsh(matrix)
        kept = kept + values[..., -keep:].sum()
        total = total + values.sum()
        half = matrix.shape[-1] // 2
        first = torch.linalg.eigvalsh(matrix[..., :half, :half])
        second = torch.linalg.eigvalsh(matrix[..., half:, half:])
        alone = alone + torch.cat([first, second], -1).sort(-1).values[..., -keep:].sum()
    return ((kept - alone) / (total - alone).clamp_min(torch.finfo(total.dtype).tiny)).clamp(0, 1)
