"""The collapse: one head per group is kept, and what turned it for each reader moves into the queries and the output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan import Groups
from .heads import AttentionWeights, FrameLayout, HeadMaps


@dataclass
class SharedHeads:
    """One kind (keys or values) of one layer, ready to collapse: `shared` `[G, d, E]` is one head per group, `out` are the read-out
    maps of all `H` members (None: identity)."""

    groups: Groups
    shared: Tensor
    out: HeadMaps | None
    layout: FrameLayout


def collapse(weights: AttentionWeights, keys: SharedHeads, values: SharedHeads) -> AttentionWeights:
    """Weights of the smaller attention block: `key` `[Hk, d, E]`, `value` `[Hv, d, E]`, all query heads kept.

    Exact for heads that are `out_i` times their group's shared head: `q^T (B k) = (B^T q)^T k` and `W_O (B v) = (W_O B) v`.
    """
    query, output = weights.query, weights.output
    if keys.out is not None:
        adjoint = _per_query(keys.out.transpose(), weights)
        query = adjoint.apply(query, keys.layout)
    if values.out is not None:
        adjoint = _per_query(values.out.transpose(), weights)
        output = adjoint.apply(output.transpose(1, 2), values.layout).transpose(1, 2)
    return AttentionWeights(query, keys.shared, values.shared, output)


def _per_query(maps: HeadMaps, weights: AttentionWeights) -> HeadMaps:
    readers = torch.arange(weights.query.shape[0], device=maps.full.device) // weights.queries_per_head
    return maps.select(readers)
