"""Eigenvalues and eigenvectors as the alignment needs them."""

from __future__ import annotations

import torch
from torch import Tensor

WHOLE = 1024
"""Matrices up to this size are decomposed as a whole; of larger ones only the top directions are sought."""


def tail_energy(matrix: Tensor, keep: int) -> Tensor:
    """Sum of all eigenvalues but the `keep` largest of positive semi-definite matrices `[..., n, n]`, `[...]`."""
    if matrix.dim() == 2 and len(matrix) > WHOLE:
        return (matrix.trace() - top_eigh(matrix, keep)[0].sum()).clamp_min(0)
    return torch.linalg.eigvalsh(matrix)[..., :-keep].clamp_min(0).sum(-1)


def matrix_sqrt(matrix: Tensor) -> Tensor:
    """Symmetric square root of positive semi-definite matrices `[..., n, n]`."""
    if not matrix.shape[-1]:
        return matrix
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.transpose(-1, -2)


def top_eigh(matrix: Tensor, keep: int, steps: int = 6) -> tuple[Tensor, Tensor]:
    """The `keep` largest eigenvalues of a symmetric positive semi-definite matrix `[n, n]`, ascending, and their vectors `[n, keep]`.

    Large matrices: the best that a block Krylov space of `steps` blocks holds (Musco and Musco 2015), from a fixed start. What
    is missed lies in directions next to the cut, which weigh about as much as those found in their place.
    """
    size = matrix.shape[0]
    if size <= max(WHOLE, keep * (steps + 1)):
        values, vectors = torch.linalg.eigh(matrix)
        return values[-keep:], vectors[:, -keep:]
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(size, keep, generator=generator, dtype=matrix.dtype).to(matrix.device)
    blocks = []
    for _ in range(steps):
        block = torch.linalg.qr(matrix @ block).Q
        blocks.append(block)
    basis = torch.linalg.qr(torch.cat(blocks, dim=1)).Q
    values, vectors = torch.linalg.eigh(basis.T @ matrix @ basis)
    return values[-keep:], basis @ vectors[:, -keep:]
