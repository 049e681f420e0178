"""Heads that are one head in other frames are found in every family, and fusing them loses nothing.

Frames are those that leave the function of a head as it is: complex factors per rotary pair, any matrix where positions
do not touch the keys (ALiBi, learned positions, the rest of a partly rotary head), turns only under a norm of each head.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dha_peft import DHAConfig, DHAPlan, convert
from dha_peft.attention import AttentionSite, find_attention
from dha_peft.fusion.heads import FrameLayout, HeadMaps
from dha_peft.models import FAMILIES

from .cases import CASES, Case, make_base, make_batches, prompts


def random_gauges(count: int, layout: FrameLayout) -> HeadMaps:
    """Well-conditioned maps of the kind that the layout allows."""
    size = len(layout.rest)
    pair = torch.randn(count, len(layout.pairs), 2)
    pair = pair / pair.norm(dim=-1, keepdim=True) * (0.5 + torch.rand(count, len(layout.pairs), 1))
    full = torch.linalg.qr(torch.randn(count, size, size))[0] * (0.5 + torch.rand(count, 1, size))
    return HeadMaps(pair, full).restricted(layout)


def gauge_layout(site: AttentionSite, kind: str) -> FrameLayout:
    """What leaves a head exactly as it is: of slow rotary pairs too, only complex factors."""
    layout = site.layout(kind)
    first, second, rest = layout.rest.split([layout.slow, layout.slow, len(layout.rest) - 2 * layout.slow])
    return FrameLayout(torch.cat([layout.pairs, torch.stack([first, second], 1)]), rest, layout.phases)


def plant(site: AttentionSite, kind: str, half_turns: bool = False) -> tuple[tuple[int, ...], ...]:
    """Make half of the heads of one kind copies of the others, each in a random frame; returns the pairs."""
    order = torch.randperm(site.num_heads).tolist()
    half = site.num_heads // 2
    heads = getattr(site.weights(), kind)
    layout = gauge_layout(site, kind)
    gauges = random_gauges(half, layout)
    if half_turns:
        gauges.pair = torch.zeros_like(gauges.pair)
        gauges.pair[..., 0] = torch.randint(2, gauges.pair.shape[:2]) * 2.0 - 1
    heads[order[half:]] = gauges.apply(heads[order[:half]], layout)
    write(site, kind, heads)
    return tuple(sorted(tuple(sorted(pair)) for pair in zip(order[:half], order[half:], strict=True)))


def write(site: AttentionSite, kind: str, heads: Tensor) -> None:
    """Put heads `[H, d, E]` into the projection, whatever its layout."""
    module, gains = site.projection(kind), site.gains(kind)
    rows = (heads if gains is None else heads / gains[..., None]).flatten(0, 1)
    place = slice(None) if site.rows(kind) is None else site.rows(kind)
    weight = module.weight if isinstance(module, nn.Linear) else module.weight.T  # Conv1D keeps [inputs, outputs]
    weight[place] = rows[:, : weight.shape[1]]
    if getattr(module, "bias", None) is not None:
        module.bias[place] = rows[:, -1]


def tie_gains_in_pairs(sites: list[AttentionSite]) -> None:
    """Gains of a norm of each head become equal within rotary pairs: only then do turns commute with the norm."""
    for site in sites:
        if site.family.key_norm == "head_rms":
            gains = getattr(site.module, site.family.norm).weight
            first, second = site.layout("key").pairs.unbind(1)
            gains[second] = gains[first]


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=str)
def test_planted_pairs_are_found_and_fused_for_nothing(case: Case):
    base = make_base(case)
    sites = find_attention(base)
    tie_gains_in_pairs(sites)
    torch.manual_seed(2)
    pairs = [[plant(site, kind) for kind in ("key", "value")] for site in sites]
    small = convert(base, DHAConfig(head_budget=0.5, allocation="uniform"), make_batches(4, 32))
    plan = DHAPlan.from_dict(small.config.dha_plan)
    assert [[layer.key_groups, layer.value_groups] for layer in plan.layers] == pairs
    torch.testing.assert_close(small(**prompts()).logits, base(**prompts()).logits, atol=1e-3, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("case", [case for case in CASES if FAMILIES[case.family].key_norm == "head_rms"], ids=str)
def test_half_turns_are_the_gauge_of_a_norm_whose_gains_differ(case: Case):
    """Gains that differ within a rotary pair commute with no other turn of it, so no other turn leaves a head as it is."""
    base = make_base(case)
    sites = find_attention(base)
    torch.manual_seed(2)
    pairs = [[plant(site, kind, half_turns=True) for kind in ("key", "value")] for site in sites]
    small = convert(base, DHAConfig(head_budget=0.5, allocation="uniform"), make_batches(4, 32))
    plan = DHAPlan.from_dict(small.config.dha_plan)
    assert [[layer.key_groups, layer.value_groups] for layer in plan.layers] == pairs
    torch.testing.assert_close(small(**prompts()).logits, base(**prompts()).logits, atol=1e-3, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_full_maps_of_keys_beat_rotary_ones_where_there_are_no_rotary_positions(family: str):
    """The same planted keys, searched as if they had rotary positions, are not found again."""
    from dha_peft.fusion.problem import HeadProblem

    site = find_attention(make_base(Case(family)))[0]
    pairs = plant(site, "key")
    heads = site.weights().key.double()
    moment = torch.eye(heads.shape[-1], dtype=torch.float64)
    metric = torch.eye(site.head_dim, dtype=torch.float64).expand(site.num_heads, -1, -1)
    errors = [
        sum(HeadProblem.from_heads(heads, moment, metric, layout).error(list(pair)) for pair in pairs)
        for layout in (FrameLayout.full(site.head_dim), FrameLayout.rotary(site.head_dim))
    ]
    assert errors[0] < 1e-6 * errors[1]
