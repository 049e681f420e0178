"""What remains of a change of frame when a norm lies between the projections and the scores (ours).

Maps of keys cannot move into the query weights through a query norm, so they stay a step on the normalised, rotated
queries; and a norm over all key heads has to count the heads that were fused away.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

Pairs = list[tuple[int, int]]


class QueryTurn(nn.Module):
    """Multiplies every rotary pair of every query head by a complex factor; this commutes with rotary positions.

    `factor` `[H, P, 2]` holds (real, imaginary); dimensions outside of the `P` pairs stay.
    """

    def __init__(self, heads: int, pairs: Pairs, **kwargs) -> None:
        super().__init__()
        self.first, self.second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        self.factor = nn.Parameter(torch.empty(heads, len(pairs), 2, **kwargs))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.factor.zero_()
        self.factor[..., 0] = 1

    def forward(self, query: Tensor) -> Tensor:
        """`[B, H, T, d]` -> `[B, H, T, d]`."""
        real, imag = self.factor.to(query.dtype)[:, None].unbind(-1)
        a, b = query[..., self.first], query[..., self.second]
        turned = query.clone()
        turned[..., self.first] = real * a - imag * b
        turned[..., self.second] = real * b + imag * a
        return turned


class SharedNorm(nn.Module):
    """RMSNorm over all key heads of the base, computed from the shared heads; the base's gains are in the weights.

    The base divides by the root of `mean |W_i x|^2` over its heads; with `gain_i W_i = B_i S` this is a quadratic form of
    the shared head `S x`, per rotary pair `|root (a, b)|^2` with a triangular `root`, stored as `(r_aa, r_ab, r_bb)`.

    Args:
        key_map: key head of every query head.
        dim: size of one head.
        pairs: rotary pairs, which cover the head.
    """

    def __init__(self, key_map: list[int], dim: int, pairs: Pairs, eps: float, **kwargs) -> None:
        super().__init__()
        self.first, self.second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        self.dim, self.eps, self.key_map = dim, eps, list(key_map)
        self.root = nn.Parameter(torch.empty(max(key_map) + 1, len(pairs), 3, **kwargs))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As if every query head had a key head of its own with gains of 1."""
        self.root.zero_()
        counts = torch.tensor([self.key_map.count(head) for head in range(len(self.root))])
        share = (counts / (len(self.key_map) * self.dim)).sqrt().to(self.root.device, self.root.dtype)
        self.root[..., 0] = self.root[..., 2] = share[:, None]

    def forward(self, key: Tensor) -> Tensor:
        """`[B, T, Hk * d]` -> the same shape, divided by the norm of the base's keys."""
        heads = key.float().unflatten(-1, (-1, self.dim))
        a, b = heads[..., self.first], heads[..., self.second]
        raa, rab, rbb = self.root.float().unbind(-1)
        power = ((raa * a + rab * b).square() + (rbb * b).square()).sum((-1, -2))
        return (key.float() * torch.rsqrt(power + self.eps)[..., None]).to(key.dtype)
