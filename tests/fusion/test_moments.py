"""Statistics of a block: they equal the averages over tokens that they stand for."""

from __future__ import annotations

import pytest
import torch

from dha_peft.fusion.heads import AttentionWeights
from dha_peft.fusion.moments import MomentAccumulator, head_gram, identity_moment, output_metric, query_metric

from .planted import DIM, randn, random_psd

HIDDEN = 12


def make_weights(heads=3, queries=6):
    return AttentionWeights(
        randn(queries, DIM, HIDDEN), randn(heads, DIM, HIDDEN), randn(heads, DIM, HIDDEN), randn(queries, HIDDEN, DIM)
    )


@pytest.mark.parametrize("bias", [False, True])
def test_accumulator_is_the_mean_over_all_batches(bias):
    batches = [torch.randn(n, HIDDEN) for n in (5, 1, 17)]
    accumulator = MomentAccumulator(HIDDEN, bias)
    for batch in batches:
        accumulator.add(batch)
    x = torch.cat(batches)
    if bias:
        x = torch.cat([x, torch.ones(23, 1)], 1)
    assert accumulator.count == 23
    torch.testing.assert_close(accumulator.mean(), x.T @ x / 23)


def test_accumulator_sums_low_precision_inputs_in_single_precision():
    accumulator = MomentAccumulator(HIDDEN)
    x = torch.randn(4096, HIDDEN).bfloat16()
    accumulator.add(x)
    torch.testing.assert_close(accumulator.mean(), x.float().T @ x.float() / 4096, atol=1e-5, rtol=1e-4)


def test_accumulator_without_tokens_says_so():
    with pytest.raises(ValueError, match="no token reached"):
        MomentAccumulator(HIDDEN).mean()


def test_identity_moment_has_a_place_for_the_bias():
    assert torch.equal(identity_moment(HIDDEN, bias=True, dtype=torch.float64), torch.eye(HIDDEN + 1).double())


def test_head_gram_is_the_mean_product_of_outputs():
    heads, x = randn(3, DIM, HIDDEN), randn(50, HIDDEN)
    out = torch.einsum("hde,te->thd", heads, x)
    expected = torch.einsum("tia,tjb->ijab", out, out) / 50
    torch.testing.assert_close(head_gram(heads, x.T @ x / 50), expected)


def test_query_metric_is_what_a_key_error_does_to_scores():
    weights, x, error = make_weights(), randn(50, HIDDEN), randn(3, DIM)
    metric = query_metric(weights, x.T @ x / 50)
    scores = torch.einsum("qde,te,qd->tq", weights.query, x, error.repeat_interleave(2, 0))
    expected = scores.square().mean(0).reshape(3, 2).sum(1)
    torch.testing.assert_close(torch.einsum("hd,hde,he->h", error, metric, error), expected)


def test_output_metric_is_what_a_value_error_does_to_the_output():
    weights, error = make_weights(), randn(3, DIM)
    moved = torch.einsum("qDd,qd->qD", weights.output, error.repeat_interleave(2, 0))
    expected = moved.square().sum(1).reshape(3, 2).sum(1)
    torch.testing.assert_close(torch.einsum("hd,hde,he->h", error, output_metric(weights), error), expected)


def test_metrics_take_a_group_of_queries_each():
    weights = make_weights()
    weights.query[2:4] = 0
    weights.output[4:] = 0
    assert query_metric(weights, random_psd(HIDDEN, HIDDEN)).flatten(1).any(1).tolist() == [True, False, True]
    assert output_metric(weights).flatten(1).any(1).tolist() == [True, True, False]
