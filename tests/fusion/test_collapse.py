"""The collapse changes nothing: attention with rotary positions before and after, MHA and GQA, with biases."""

from __future__ import annotations

import pytest
import torch

from dha_peft.fusion.alignment import align_group
from dha_peft.fusion.collapse import SharedHeads, collapse
from dha_peft.fusion.heads import AttentionWeights, HeadMaps
from dha_peft.fusion.moments import output_metric, query_metric
from dha_peft.fusion.operator import fuse, same_group
from dha_peft.fusion.problem import HeadProblem
from dha_peft.plan import LayerPlan

from .planted import DIM, LAYOUTS, planted_heads, randn, random_gauges, random_psd

HIDDEN, TOKENS, HEADS = 32, 7, 6
PLAN = LayerPlan(((0, 2, 5), (1, 4), (3,)), ((0, 1), (2, 3, 4, 5)))
KEYS = list(LAYOUTS)


def rotate(x, layout):
    """Rotary positions on the layout's pairs, `x` `[H, T, d]`."""
    angle = (
        torch.arange(x.shape[1], dtype=x.dtype)[:, None] * 100.0 ** -torch.linspace(0, 1, len(layout.pairs)).double()
    )
    first, second = layout.pairs.unbind(1)
    turned = x.clone()
    turned[..., first] = x[..., first] * angle.cos() - x[..., second] * angle.sin()
    turned[..., second] = x[..., second] * angle.cos() + x[..., first] * angle.sin()
    return turned


def attention(weights, x, layout, key_map, value_map):
    """(scores `[Hq, T, T]`, output `[T, D]`) of causal attention; the inputs' last column is the constant 1."""
    q, k, v = (torch.einsum("hde,te->htd", w, x) for w in (weights.query, weights.key, weights.value))
    scores = rotate(q, layout) @ rotate(k, layout)[key_map].transpose(1, 2) / DIM**0.5
    causal = torch.ones(TOKENS, TOKENS).tril().bool()
    mixed = scores.masked_fill(~causal, -torch.inf).softmax(-1) @ v[value_map]
    return scores, torch.einsum("hDd,htd->tD", weights.output, mixed)


def make_weights(queries_per_head, key, value):
    queries = HEADS * queries_per_head
    return AttentionWeights(0.3 * randn(queries, DIM, HIDDEN + 1), 0.3 * key, value, randn(queries, HIDDEN, DIM))


def assert_same_attention(weights, small, layout):
    x = torch.cat([randn(TOKENS, HIDDEN), torch.ones(TOKENS, 1, dtype=torch.float64)], 1)
    queries = len(weights.query)
    base = [query * HEADS // queries for query in range(queries)]
    before = attention(weights, x, layout, base, base)
    after = attention(small, x, layout, PLAN.key_map(queries), PLAN.value_map(queries))
    for got, expected in zip(after, before):
        torch.testing.assert_close(got, expected, atol=1e-7, rtol=1e-7)


def group_frames(heads, moment, metric, groups, layout):
    """The closed form for every group, as a collapse takes it."""
    shared, out = [], HeadMaps.identity(HEADS, layout, dtype=heads.dtype)
    problem = HeadProblem.from_heads(heads, moment, metric, layout)
    for group in map(list, groups):
        frame = align_group(problem, group)
        shared.append(frame.into.apply(heads[group], layout).sum(0))
        out.pair[group], out.full[group] = frame.out.pair, frame.out.full
    return SharedHeads(groups, torch.stack(shared), out, layout)


@pytest.mark.parametrize("queries_per_head", [1, 3], ids=["mha", "gqa"])
@pytest.mark.parametrize("name", KEYS)
def test_planted_duplicates_collapse_exactly(name, queries_per_head):
    layout, values = LAYOUTS[name], LAYOUTS["full"]
    key = planted_heads(PLAN.key_groups, layout, HIDDEN + 1)
    weights = make_weights(queries_per_head, key, planted_heads(PLAN.value_groups, values, HIDDEN + 1))
    moment = random_psd(HIDDEN + 1, HIDDEN + 1)
    key_metric, value_metric = query_metric(weights, moment), output_metric(weights)
    keys = group_frames(weights.key, moment, key_metric, PLAN.key_groups, layout)
    value = group_frames(weights.value, moment, value_metric, PLAN.value_groups, values)
    small = collapse(weights, keys, value)
    assert small.key.shape == (3, DIM, HIDDEN + 1) and small.value.shape == (2, DIM, HIDDEN + 1)
    assert_same_attention(weights, small, layout)


@pytest.mark.parametrize("queries_per_head", [1, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("name", KEYS)
def test_fused_heads_collapse_exactly(name, queries_per_head):
    """Heads with nothing in common, once the operator's rows are equal, in any frame."""
    weights = make_weights(queries_per_head, randn(HEADS, DIM, HIDDEN + 1), randn(HEADS, DIM, HIDDEN + 1))
    sides = {}
    for kind, groups, layout in (
        ("key", PLAN.key_groups, LAYOUTS[name]),
        ("value", PLAN.value_groups, LAYOUTS["full"]),
    ):
        together = same_group(groups)
        omega = together / together.sum(1, keepdim=True).double()
        into, out = random_gauges(HEADS, layout), random_gauges(HEADS, layout)
        fused = fuse(getattr(weights, kind), omega, together, into, out, layout)
        setattr(weights, kind, fused.collapsed)
        sides[kind] = SharedHeads(groups, fused.shared[[group[0] for group in groups]], out, layout)
    assert_same_attention(weights, collapse(weights, sides["key"], sides["value"]), LAYOUTS[name])


def test_linear_fusion_leaves_queries_and_output_alone():
    weights = make_weights(2, randn(HEADS, DIM, HIDDEN + 1), randn(HEADS, DIM, HIDDEN + 1))
    layout, sides = LAYOUTS["half"], {}
    for kind, groups in (("key", PLAN.key_groups), ("value", PLAN.value_groups)):
        together = same_group(groups)
        omega = together / together.sum(1, keepdim=True).double()
        fused = fuse(getattr(weights, kind), omega, together, None, None, layout)
        setattr(weights, kind, fused.heads)
        sides[kind] = SharedHeads(groups, fused.shared[[group[0] for group in groups]], None, layout)
    small = collapse(weights, sides["key"], sides["value"])
    assert small.query is weights.query and small.output is weights.output
    assert_same_attention(weights, small, layout)


def test_frames_commute_with_rotary_positions():
    """What makes the collapse possible: a map on keys may be applied before or after the rotation."""
    for name in KEYS:
        layout = LAYOUTS[name]
        maps, keys = random_gauges(HEADS, layout), randn(HEADS, TOKENS, DIM)
        apply = lambda x: maps.apply(x.transpose(1, 2), layout).transpose(1, 2)  # noqa: B023, E731
        torch.testing.assert_close(rotate(apply(keys), layout), apply(rotate(keys, layout)))
