"""The searches for groups: what they find, and that their errors are what the groups cost."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from dha_peft.fusion.grouping import aligned_curve, contiguous_curve, partition_error, similarity_curve
from dha_peft.fusion.heads import FrameLayout
from dha_peft.fusion.moments import head_gram
from dha_peft.fusion.similarity import aligned_similarity, cka_similarity, cosine_similarity

from .planted import DIM, LAYOUTS, planted_heads, randn, random_gauges, random_psd

SIZE = 48
GROUPS = ((0, 3, 5), (1,), (2, 4))


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


def statistics(heads):
    return head_gram(heads, random_psd(SIZE, SIZE)), random_psd(len(heads), DIM, DIM)


def test_duplicates_in_random_frames_are_found(layout):
    curve = aligned_curve(*statistics(planted_heads(GROUPS, layout, SIZE)), layout)
    assert curve.groups[2] == GROUPS
    assert curve.errors[2] < 1e-9 < 1e-3 < curve.errors[1] < curve.errors[0]


def test_near_duplicates_are_found(layout):
    heads = planted_heads(GROUPS, layout, SIZE) + 0.02 * randn(6, DIM, SIZE)
    assert aligned_curve(*statistics(heads), layout).groups[2] == GROUPS


def test_curve_has_one_valid_partition_per_count(layout):
    curve = aligned_curve(*statistics(randn(7, DIM, SIZE)), layout)
    assert curve.num_heads == 7 and curve.errors[-1] == 0
    assert curve.errors == sorted(curve.errors, reverse=True)
    for count, groups in enumerate(curve.groups, start=1):
        assert len(groups) == count
        assert sorted(head for group in groups for head in group) == list(range(7))
        assert list(groups) == sorted(tuple(sorted(group)) for group in groups)


def test_search_error_bounds_the_exact_error(layout):
    gram, metric = statistics(randn(6, DIM, SIZE))
    curve = aligned_curve(gram, metric, layout)
    for groups, error in zip(curve.groups, curve.errors):
        exact = partition_error(groups, gram, metric, layout)
        assert error >= exact * (1 - 1e-9)
        if max(map(len, groups)) <= 2 or not len(layout.rest):
            assert error == pytest.approx(exact)


def test_first_merge_is_the_best_of_all(layout):
    gram, metric = statistics(randn(5, DIM, SIZE))
    costs = {pair: partition_error((pair,), gram, metric, layout) for pair in combinations(range(5), 2)}
    curve = aligned_curve(gram, metric, layout)
    assert min(costs, key=costs.get) in curve.groups[3]
    assert curve.errors[3] == pytest.approx(min(costs.values()))


def test_cka_finds_rotated_duplicates(layout):
    heads = planted_heads(GROUPS, layout, SIZE, rigid=True)
    gram, metric = statistics(heads)
    curve = similarity_curve(cka_similarity(gram), gram, metric, layout)
    assert curve.groups[2] == GROUPS and curve.errors[2] < 1e-9


def test_contiguous_curve_is_gqa():
    layout = LAYOUTS["half"]
    gram, metric = statistics(randn(8, DIM, SIZE))
    curve = contiguous_curve(gram, metric, layout)
    assert curve.groups[1] == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert curve.errors[-1] == 0
    assert curve.errors[3] == pytest.approx(partition_error(curve.groups[3], gram, metric, layout))


def test_alignment_search_beats_neighbours(layout):
    gram, metric = statistics(planted_heads(GROUPS, layout, SIZE) + 0.1 * randn(6, DIM, SIZE))
    ours, neighbours = aligned_curve(gram, metric, layout), contiguous_curve(gram, metric, layout)
    assert ours.errors[2] < 0.2 * neighbours.errors[2]


def test_cka_is_blind_to_rotations_and_scale(layout):
    heads, moment, gauges = randn(4, DIM, SIZE), random_psd(SIZE, SIZE), random_gauges(4, layout, rigid=True)
    before = cka_similarity(head_gram(heads, moment))
    turned = gauges.apply(heads, layout) * torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(cka_similarity(head_gram(turned, moment)), before)
    torch.testing.assert_close(before.diagonal(), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(before, before.T)
    assert (before <= 1 + 1e-12).all()


def test_cosine_is_not_blind_to_rotations():
    heads = planted_heads(((0, 1),), LAYOUTS["full"], SIZE, rigid=True)
    assert cosine_similarity(heads)[0, 1].abs() < 0.9
    torch.testing.assert_close(cosine_similarity(heads).diagonal(), torch.ones(2, dtype=torch.float64))


def test_aligned_similarity_is_one_for_a_turned_head_and_zero_for_a_stranger(layout):
    heads = planted_heads(((0, 1), (2,)), layout, SIZE)
    heads[:2, :, SIZE // 2 :] = 0
    heads[2, :, : SIZE // 2] = 0
    gram = head_gram(heads, torch.eye(SIZE, dtype=torch.float64))
    similarity = aligned_similarity(gram, random_psd(3, DIM, DIM), layout)
    expected = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(similarity, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("layout", [FrameLayout.rotary(128), FrameLayout.full(128)], ids=["keys", "values"])
def test_heads_of_real_size_in_single_precision(layout):
    heads = torch.randn(8, 128, 1024)
    heads[5] = heads[2] + 0.01 * torch.randn(128, 1024)
    metric = torch.eye(128).repeat(8, 1, 1)
    curve = aligned_curve(head_gram(heads, torch.eye(1024)), metric, layout)
    assert (2, 5) in curve.groups[6]
    assert curve.errors[6] < 1e-3 * curve.errors[0]
