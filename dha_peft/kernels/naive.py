"""Decode attention written out plainly: the definition that every fast path is held equal to."""

from __future__ import annotations

import torch
from torch import Tensor

from .masks import visible_keys


def naive_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_map: Tensor,
    value_map: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    start: Tensor | None = None,
    length: Tensor | None = None,
) -> Tensor:
    """`softmax(scale * q_h . k_{key_map[h]}) v_{value_map[h]}` for every query head `h`.

    Args:
        q: `[B, Hq, Tq, d]`, the newest `Tq` tokens.
        k: `[B, Hk, S, d]`, v: `[B, Hv, S, d]`, caches that may be longer than what is filled.
        key_map, value_map: `[Hq]` integers, the key head and the value head that each query head reads.
        scale: factor of the scores, `d ** -0.5` if None.
        mask: bool (True = attend) or additive, broadcasts to `[B, Hq, Tq, S]`. Without one, attention is causal
            among the new tokens: query `t` sees the keys before `length - (Tq - 1 - t)`.
        start, length: `[B]` integers; only keys `start <= j < length` are seen (defaults 0 and `S`).

    Returns:
        `[B, Hq, Tq, d]` in q's dtype, computed in float32, or in float64 for float64 inputs. A query that sees no key gives zeros.
    """
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys, values = k.index_select(1, key_map).to(exact), v.index_select(1, value_map).to(exact)
    scores = torch.matmul(q.to(exact), keys.transpose(2, 3)) * scale
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.to(exact)
    seen = visible_keys(q.shape[2], k.shape[2], mask, start, length, q.device)
    top = scores.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True).clamp_min(torch.finfo(exact).min)
    weights = torch.where(seen, torch.exp(scores - top), 0.0)
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(exact).tiny)
    # What lies beyond the filled part of a cache may be anything, NaN too.
    values = torch.where(seen.any(2).unsqueeze(-1), values, 0.0)
    return torch.matmul(weights, values).to(q.dtype)
