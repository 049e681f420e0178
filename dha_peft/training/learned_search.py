"""The paper's dependence search, reconstructed: after some steps in which every head may mix with every other, the heads that
have come close are put together."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..adapter.layer import DHALayer
from ..attention import KINDS, AttentionSite, labelled_plan
from ..fusion.grouping import GroupCurve, average_linkage
from ..fusion.similarity import cosine_similarity
from ..plan import DHAPlan, Groups
from ..search import SearchOptions
from ..search.analysis import plan_counts


@torch.no_grad()
def learned_plan(sites: list[AttentionSite], options: SearchOptions) -> DHAPlan:
    """Groups by the cosine of the heads as the adapter makes them now, counts by how far these are from their mean. `sites`:
    attention blocks whose key and value projections are `DHALayer`s."""
    curves = [{kind: _curve(site.outer(kind)) for kind in KINDS} for site in sites]
    # The paper's distances, which `key_weight` was not measured for.
    counts = plan_counts(curves, replace(options, key_weight=1.0))
    groups = (
        tuple(curve[kind].groups[count[kind] - 1] for kind in KINDS)
        for curve, count in zip(curves, counts, strict=True)
    )
    return labelled_plan(sites, groups)


def _curve(layer: DHALayer) -> GroupCurve:
    heads = layer.active_fusion().fuse(layer.base_heads()).heads
    groups = average_linkage(cosine_similarity(heads))
    products = heads.flatten(1).double()
    products = products @ products.T
    return GroupCurve(groups, [_spread(products, partition) for partition in groups])


def _spread(products: Tensor, groups: Groups) -> float:
    """Squared distance of the heads from their group's mean, relative to their energy. `products` `[H, H]`: inner products of heads."""
    blocks = [products[list(group)][:, list(group)] for group in groups]
    apart = sum(float(block.trace() - block.sum() / len(block)) for block in blocks)
    return apart / float(products.trace())
