"""The paper's dependence search, reconstructed: after some steps in which every head may mix with every other, the heads that
have come close are put together."""

from __future__ import annotations

import torch

from ..adapter.layer import DHALayer
from ..attention import KINDS, AttentionSite, labelled_plan
from ..fusion.grouping import GroupCurve, similarity_curve
from ..fusion.moments import head_gram, identity_moment
from ..fusion.similarity import cosine_similarity
from ..plan import DHAPlan
from ..search import SearchOptions
from ..search.analysis import plan_counts


@torch.no_grad()
def learned_plan(sites: list[AttentionSite], options: SearchOptions) -> DHAPlan:
    """Groups by the cosine of the heads as the adapter makes them now, counts by how far these are from their mean. `sites`:
    attention blocks whose key and value projections are `DHALayer`s."""
    curves = [{kind: _curve(site.outer(kind)) for kind in KINDS} for site in sites]
    counts = plan_counts(curves, options)
    groups = (
        tuple(curve[kind].groups[count[kind] - 1] for kind in KINDS)
        for curve, count in zip(curves, counts, strict=True)
    )
    return labelled_plan(sites, groups)


def _curve(layer: DHALayer) -> GroupCurve:
    heads = layer.active_fusion().fuse(layer.base_heads()).heads.double()
    gram = head_gram(heads, identity_moment(heads.shape[2], dtype=heads.dtype, device=heads.device))
    metric = torch.eye(heads.shape[1], dtype=heads.dtype, device=heads.device).expand(len(heads), -1, -1)
    curve = similarity_curve(cosine_similarity(heads.flatten(1).unsqueeze(1)), gram, metric, layer.layout)
    return GroupCurve(curve.groups, [_spread(heads, groups) for groups in curve.groups])


def _spread(heads: torch.Tensor, groups) -> float:
    """Squared distance of the heads from their group's mean, relative to their energy."""
    apart = sum(float((heads[list(g)] - heads[list(g)].mean(0)).pow(2).sum()) for g in groups)
    return apart / float(heads.pow(2).sum())
