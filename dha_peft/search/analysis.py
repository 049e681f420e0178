"""The search: curves of every layer and kind, counts that meet the budget, and the frames of the chosen groups."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..attention import KINDS, AttentionSite, find_attention, labelled_plan
from ..fusion.alignment import align_group
from ..fusion.budget import cheapest_counts, total_heads, uniform_counts
from ..fusion.grouping import GroupCurve, aligned_curve, contiguous_curve, similarity_curve
from ..fusion.heads import FrameLayout, HeadMaps
from ..fusion.moments import head_gram
from ..fusion.similarity import cka_similarity
from ..plan import DHAPlan, Groups
from .calibration import Statistics, collect_statistics


@dataclass(frozen=True)
class SearchOptions:
    """What the search needs of `DHAConfig`; see there for the meaning of each field."""

    head_budget: float = 0.25
    key_budget: float | None = None
    value_budget: float | None = None
    grouping: str = "aligned"
    allocation: str = "adaptive"
    damping: float = 0.7
    min_heads: int = 1


@dataclass
class Frames:
    """Maps into and out of the shared frame for all heads of one layer and kind."""

    into: HeadMaps
    out: HeadMaps


@dataclass
class Analysis:
    """Everything learned from one calibration run. Any number of budgets can be planned from it."""

    sites: list[AttentionSite]
    statistics: Statistics
    curves: list[dict[str, GroupCurve]]

    def plan(self, options: SearchOptions) -> DHAPlan:
        """Groups that meet the budget exactly (`sum(Hk + Hv) == round(head_budget * total)`)."""
        counts = plan_counts(self.curves, options)
        groups = [
            tuple(curve[kind].groups[count[kind] - 1] for kind in KINDS)
            for curve, count in zip(self.curves, counts, strict=True)
        ]
        return labelled_plan(self.sites, groups)

    def frames(self, plan: DHAPlan) -> list[dict[str, Frames]]:
        """Closed-form frames of every layer's groups."""
        frames = []
        for index, layer in enumerate(plan.layers):
            groups = {"key": layer.key_groups, "value": layer.value_groups}
            frames.append({kind: self._layer_frames(index, kind, groups[kind]) for kind in KINDS})
        return frames

    def _layer_frames(self, index: int, kind: str, groups: Groups) -> Frames:
        gram, metric, layout = layer_problem(self.sites[index], self.statistics, kind)
        maps = [HeadMaps.identity(len(gram), layout, dtype=gram.dtype, device=gram.device) for _ in range(2)]
        for group in groups:
            members = list(group)
            frame = align_group(gram, metric, layout, members)
            for target, source in zip(maps, (frame.into, frame.out), strict=True):
                target.pair[members], target.full[members] = source.pair, source.full
        return Frames(*(m.to(torch.float32) for m in maps))


def analyse(
    model: nn.Module, calibration_data: Iterable[dict[str, Any]] | None = None, grouping: str = "aligned"
) -> Analysis:
    """Calibrate the model and search the groups of every layer, for every count.

    Raises:
        ValueError: unsupported model, or calibration data that cannot be used (see `collect_statistics`).
    """
    sites = find_attention(model)
    return search_groups(sites, collect_statistics(model, sites, calibration_data), grouping)


def search_groups(sites: list[AttentionSite], statistics: Statistics, grouping: str = "aligned") -> Analysis:
    """The groups of every layer, for every count, from statistics that were collected before."""
    curves = []
    for site in tqdm(sites, desc="searching groups", unit="layer", disable=None):
        curves.append({kind: _curve(grouping, *layer_problem(site, statistics, kind)) for kind in KINDS})
    return Analysis(sites, statistics, curves)


def layer_problem(site: AttentionSite, statistics: Statistics, kind: str) -> tuple[Tensor, Tensor, FrameLayout]:
    """Gram `[H, H, d, d]` and metric `[H, d, d]` in float64, and the layout."""
    moment = statistics.moments[site.index].double()
    weights = site.weights(torch.float64)
    gram = head_gram(weights.key if kind == "key" else weights.value, moment)
    metric = statistics.metrics[site.index][kind].double()
    return gram, metric, site.layout(kind).to(gram.device)


def plan_counts(curves: list[dict[str, GroupCurve]], options: SearchOptions) -> list[dict[str, int]]:
    """Kept heads per layer and kind under the options' budget."""
    counts: list[dict[str, int]] = [{} for _ in curves]
    for pool, total in _totals([curve[KINDS[0]].num_heads for curve in curves], options):
        places = [(index, kind) for index in range(len(curves)) for kind in pool]
        capacities = [curves[index][kind].num_heads for index, kind in places]
        if options.allocation == "uniform":
            chosen = uniform_counts(capacities, total)
        else:
            costs = [damped_costs(curves[index][kind], options.damping) for index, kind in places]
            chosen = cheapest_counts(costs, total, options.min_heads)
        for (index, kind), count in zip(places, chosen, strict=True):
            counts[index][kind] = count
    return counts


def check_budget(sites: list[AttentionSite], options: SearchOptions) -> None:
    """Raise ValueError for a budget below one head per layer and kind; cheap, so it can come before the calibration."""
    _totals([site.num_heads for site in sites], options)


def _totals(capacities: list[int], options: SearchOptions) -> list[tuple[tuple[str, ...], int]]:
    """Kinds that share a budget, and the heads they keep; `capacities`: KV heads of every layer."""
    pools = [(kind,) for kind in KINDS] if options.key_budget or options.value_budget else [KINDS]
    totals = []
    for pool in pools:
        field, budget = _budget(options, pool)
        totals.append((pool, total_heads(budget, sum(capacities) * len(pool), len(capacities) * len(pool), field)))
    return totals


def damped_costs(curve: GroupCurve, damping: float) -> list[float]:
    """Errors scaled so that a layer's error at a quarter of its heads counts with its `damping`-th power: budgets in
    full proportion to sensitivity strip early layers, which hurts after healing (METHOD section 4)."""
    quarter = max(curve.errors[max(curve.num_heads // 4, 1) - 1], 1e-30)
    return [error * quarter ** (damping - 1) for error in curve.errors]


def _budget(options: SearchOptions, pool: tuple[str, ...]) -> tuple[str, float]:
    if len(pool) == 2:
        return "head_budget", options.head_budget
    field = f"{pool[0]}_budget"
    own = getattr(options, field)
    return (field, own) if own is not None else ("head_budget", options.head_budget)


def _curve(grouping: str, gram: Tensor, metric: Tensor, layout: FrameLayout) -> GroupCurve:
    if grouping == "contiguous":
        return contiguous_curve(gram, metric, layout)
    if grouping == "cka":
        return similarity_curve(cka_similarity(gram), gram, metric, layout)
    return aligned_curve(gram, metric, layout)
