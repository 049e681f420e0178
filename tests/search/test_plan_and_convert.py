"""The search meets every budget exactly, and the one-shot conversion leaves the base alone."""

from __future__ import annotations

import pytest
import torch
from adapter.tiny import HEAD_DIM, HEADS, LAYERS, logits, make_base, make_batches, make_ids, same_state, state

from dha_peft import DHAConfig, DHAPlan, analyse, convert
from dha_peft.search import SearchOptions

TOTAL = 2 * HEADS * LAYERS


@pytest.fixture(scope="module")
def analysis():
    return analyse(make_base(), make_batches())


@pytest.mark.parametrize("budget", [1.0, 0.77, 0.5, 0.25, 0.2, 0.125])
@pytest.mark.parametrize("allocation", ["adaptive", "uniform"])
def test_one_analysis_meets_every_budget_exactly(analysis, budget, allocation):
    plan = analysis.plan(SearchOptions(head_budget=budget, allocation=allocation))
    assert plan.heads_after == round(budget * TOTAL)
    counts = [n for layer in plan.layers for n in (layer.num_key_heads, layer.num_value_heads)]
    assert min(counts) >= 1 and max(counts) <= HEADS
    if allocation == "uniform":
        assert max(counts) - min(counts) <= 1
    assert DHAPlan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize("allocation", ["adaptive", "uniform"])
def test_key_and_value_budgets_are_met_apart(analysis, allocation):
    plan = analysis.plan(SearchOptions(head_budget=0.5, key_budget=0.25, allocation=allocation))
    assert sum(layer.num_key_heads for layer in plan.layers) == 6
    assert sum(layer.num_value_heads for layer in plan.layers) == 12
    plan = analysis.plan(SearchOptions(head_budget=0.125, value_budget=0.875, allocation=allocation))
    assert [sum(getattr(x, f"num_{k}_heads") for x in plan.layers) for k in ("key", "value")] == [3, 21]


def test_the_less_errors_of_keys_count_the_fewer_keys_stay(analysis):
    plans = [analysis.plan(SearchOptions(head_budget=0.5, key_weight=weight)) for weight in (1e-6, 0.8, 1e6)]
    keys = [sum(layer.num_key_heads for layer in plan.layers) for plan in plans]
    assert keys[0] == LAYERS and keys[2] == TOTAL // 2 - LAYERS and keys[0] < keys[1] < keys[2]
    assert [plan.heads_after for plan in plans] == [TOTAL // 2] * 3


def test_min_heads_is_kept_where_the_budget_allows_it(analysis):
    plan = analysis.plan(SearchOptions(head_budget=0.5, min_heads=3))
    assert min(min(x.num_key_heads, x.num_value_heads) for x in plan.layers) >= 3 and plan.heads_after == 24


def test_more_heads_lose_less(analysis):
    for curves in analysis.curves:
        for curve in curves.values():
            assert curve.errors[-1] == pytest.approx(0, abs=1e-6)
            assert all(a >= b - 1e-9 for a, b in zip(curve.errors, curve.errors[1:], strict=False))


@pytest.mark.parametrize("grouping", ["aligned", "cka", "contiguous"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_search_finds_heads_that_are_copies(model_type, grouping):
    pairs = (
        tuple((2 * i, 2 * i + 1) for i in range(4)) if grouping == "contiguous" else ((0, 5), (1, 4), (2, 7), (3, 6))
    )
    base = make_base(model_type)
    with torch.no_grad():
        for layer in base.model.layers:
            for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                for tensor in (linear.weight, linear.bias):
                    heads = tensor.view(HEADS, HEAD_DIM, -1) if tensor is not None else None
                    for a, b in pairs if heads is not None else ():
                        heads[b] = heads[a].clone()
    small = convert(base, DHAConfig(head_budget=0.5, grouping=grouping, allocation="uniform"), make_batches())
    plan = DHAPlan.from_dict(small.config.dha_plan)
    assert all(layer.key_groups == layer.value_groups == pairs for layer in plan.layers)
    torch.testing.assert_close(logits(small), logits(base), atol=1e-4, rtol=1e-4)


def test_convert_leaves_the_base_untouched_and_shares_nothing():
    base, batches = make_base("qwen2", tie_word_embeddings=True).train(), make_batches()
    before, flags = state(base), [p.requires_grad for p in base.parameters()]
    torch.manual_seed(5)
    rng = torch.get_rng_state()
    small = convert(base, DHAConfig(head_budget=0.25), batches)
    assert same_state(base, before) and base.training and [p.requires_grad for p in base.parameters()] == flags
    assert all(p.grad is None for p in base.parameters()) and torch.equal(rng, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    held = {t.untyped_storage().data_ptr() for t in (*base.parameters(), *base.buffers())}
    assert not held & {t.untyped_storage().data_ptr() for t in (*small.parameters(), *small.buffers()) if t.numel()}
    assert small.lm_head.weight is small.model.embed_tokens.weight
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert same_state(base, before)


def test_one_analysis_converts_at_several_budgets():
    base, batches = make_base(), make_batches()
    analysis = analyse(base, batches)
    gaps = []
    for budget in (0.125, 0.5, 1.0):
        small = convert(base, DHAConfig(head_budget=budget), analysis=analysis)
        again = convert(base, DHAConfig(head_budget=budget), batches)
        assert torch.equal(logits(small), logits(again))
        assert DHAPlan.from_dict(small.config.dha_plan).heads_after == round(budget * TOTAL)
        gaps.append(float((logits(small) - logits(base)).pow(2).mean()))
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-9


def test_padding_does_not_count():
    base, batches = make_base(), make_batches(1)
    other = {**batches[0], "input_ids": batches[0]["input_ids"].clone()}
    other["input_ids"][1, -4:] = 9
    ours, theirs = (analyse(base, [batch]) for batch in (batches[0], other))
    for left, right in zip(ours.statistics.moments, theirs.statistics.moments, strict=True):
        assert torch.equal(left, right)
    assert ours.statistics.tokens == 44


def test_linear_fusion_is_mean_pooling():
    base = make_base(num_key_value_heads=4)
    small = convert(
        base, DHAConfig(head_budget=0.5, fusion="linear", grouping="contiguous", allocation="uniform"), make_batches()
    )
    for layer, merged in zip(base.model.layers, small.model.layers, strict=True):
        for name in ("k_proj", "v_proj"):
            mean = getattr(layer.self_attn, name).weight.view(2, 2, HEAD_DIM, -1).mean(1).flatten(0, 1)
            torch.testing.assert_close(getattr(merged.self_attn, name).weight, mean)
    assert small(make_ids()).logits.isfinite().all()
