"""The search: curves of every layer and kind, counts that meet the budget, and the frames of the chosen groups."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..attention import KINDS, AttentionSite, find_attention, labelled_plan
from ..fusion.alignment import align_group
from ..fusion.budget import cheapest_counts, total_heads, uniform_counts
from ..fusion.grouping import GroupCurve, aligned_curve, contiguous_curve, similarity_curve
from ..fusion.heads import HeadMaps
from ..fusion.moments import head_gram
from ..fusion.problem import HeadProblem
from ..fusion.refinement import can_refine, refined_groups
from ..fusion.similarity import cka_similarity
from ..plan import DHAPlan, Groups, LayerPlan
from .calibration import Statistics, collect_statistics

LARGE = 2048
"""Inputs of an attention block from which the search uses float32."""
SMALL = 2**19
"""Numbers in the Gram matrices of free rows up to which a problem is kept: 4 MB in double precision."""


@dataclass(frozen=True)
class SearchOptions:
    """What the search needs of `DHAConfig`; see there for the meaning of each field."""

    head_budget: float = 0.25
    key_budget: float | None = None
    value_budget: float | None = None
    grouping: str = "aligned"
    allocation: str = "adaptive"
    damping: float = 0.7
    key_weight: float = 0.8
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
    problems: list[dict[str, HeadProblem]] = field(default_factory=list)
    """Problems with few free rows, which are small; others are stated anew, layer by layer, to hold only one."""
    grouping: str = "aligned"
    _refined: dict[tuple[int, str, int], Groups] = field(default_factory=dict, repr=False)

    def plan(self, options: SearchOptions) -> DHAPlan:
        """Groups that meet the budget exactly (`sum(Hk + Hv) == round(head_budget * total)`)."""
        counts = plan_counts(self.curves, options)
        groups = [tuple(self._groups(index, kind, count[kind]) for kind in KINDS) for index, count in enumerate(counts)]
        return labelled_plan(self.sites, groups)

    def frames(self, plan: DHAPlan) -> list[dict[str, Frames]]:
        """Closed-form frames of every layer's groups."""
        return [self.layer_frames(index, layer) for index, layer in enumerate(plan.layers)]

    def layer_frames(self, index: int, layer: LayerPlan) -> dict[str, Frames]:
        """Closed-form frames of one layer's groups, in single precision."""
        groups = {"key": layer.key_groups, "value": layer.value_groups}
        return {kind: self._frames(index, kind, groups[kind]) for kind in KINDS}

    def _frames(self, index: int, kind: str, groups: Groups) -> Frames:
        site, device = self.sites[index], self.statistics.moments[index].device
        maps = [HeadMaps.identity(site.num_heads, site.layout(kind), device=device) for _ in range(2)]
        for members in [list(group) for group in groups if len(group) > 1]:
            frame = align_group(self._problem(index, kind, members))
            for target, source in zip(maps, (frame.into, frame.out), strict=True):
                target.pair[members], target.full[members] = source.pair.float(), source.full.float()
        return Frames(*maps)

    def _groups(self, index: int, kind: str, count: int) -> Groups:
        """The curve's groups, made better where they are ours to choose."""
        site, groups = self.sites[index], self.curves[index][kind].groups[count - 1]
        # Asked before the problem is stated, which takes long for a large layer.
        if self.grouping != "aligned" or not can_refine(count, site.num_heads, len(site.layout(kind).rest)):
            return groups
        place = (index, kind, count)
        if place not in self._refined:
            self._refined[place] = refined_groups(groups, self._problem(index, kind))
        return self._refined[place]

    def _problem(self, index: int, kind: str, members: list[int] | None = None) -> HeadProblem:
        kept = self.problems[index].get(kind) if self.problems else None
        if kept is None:
            return layer_problem(self.sites[index], self.statistics, kind, members)
        return kept if members is None else kept.select(members)


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
    curves, problems = [], []
    for site in tqdm(sites, desc="searching groups", unit="layer", disable=None):
        found = {kind: layer_problem(site, statistics, kind) for kind in KINDS}
        curves.append({kind: _curve(grouping, site, statistics, kind, found[kind]) for kind in KINDS})
        problems.append({kind: problem for kind, problem in found.items() if problem.rest.numel() <= SMALL})
    return Analysis(sites, statistics, curves, problems, grouping)


def layer_problem(
    site: AttentionSite, statistics: Statistics, kind: str, members: list[int] | None = None
) -> HeadProblem:
    """The alignment problem of one layer and kind, or of some of its heads: in float64 where that takes no time, in float32
    for large layers."""
    heads, moment = _heads(site, statistics, kind)
    metric = statistics.metrics[site.index][kind].to(heads.dtype)
    if members is not None:
        heads, metric = heads[members], metric[members]
    return HeadProblem.from_heads(heads, moment, metric, site.layout(kind).to(heads.device))


def _heads(site: AttentionSite, statistics: Statistics, kind: str) -> tuple[Tensor, Tensor]:
    """Heads `[H, d, E]` and the moment `[E, E]` of their inputs, in the precision of the search."""
    moment = statistics.moments[site.index]
    dtype = torch.float64 if len(moment) < LARGE else torch.float32
    return site.heads(kind, dtype).to(moment.device), moment.to(dtype)


def plan_counts(curves: list[dict[str, GroupCurve]], options: SearchOptions) -> list[dict[str, int]]:
    """Kept heads per layer and kind under the options' budget."""
    counts: list[dict[str, int]] = [{} for _ in curves]
    for pool, total in _totals([curve[KINDS[0]].num_heads for curve in curves], options):
        places = [(index, kind) for index in range(len(curves)) for kind in pool]
        capacities = [curves[index][kind].num_heads for index, kind in places]
        if options.allocation == "uniform":
            chosen = uniform_counts(capacities, total)
        else:
            costs = [_costs(curves[index][kind], kind, options) for index, kind in places]
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


def _costs(curve: GroupCurve, kind: str, options: SearchOptions) -> list[float]:
    """What the errors of a place cost once training has made up for some of them (ours).

    A layer's error at a quarter of its heads counts with its `damping`-th power, as budgets in full proportion to sensitivity
    strip early layers. Errors of keys count `key_weight` times, as training was measured to repair more of them.
    """
    quarter = max(curve.errors[max(curve.num_heads // 4, 1) - 1], 1e-30)
    weight = options.key_weight if kind == "key" else 1.0
    return [weight * error * quarter ** (options.damping - 1) for error in curve.errors]


def _budget(options: SearchOptions, pool: tuple[str, ...]) -> tuple[str, float]:
    if len(pool) == 2:
        return "head_budget", options.head_budget
    field = f"{pool[0]}_budget"
    own = getattr(options, field)
    return (field, own) if own is not None else ("head_budget", options.head_budget)


def _curve(grouping: str, site: AttentionSite, statistics: Statistics, kind: str, problem: HeadProblem) -> GroupCurve:
    if grouping == "contiguous":
        return contiguous_curve(problem)
    if grouping == "cka":
        return similarity_curve(cka_similarity(head_gram(*_heads(site, statistics, kind))), problem)
    return aligned_curve(problem)
