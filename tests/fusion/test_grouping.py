"""The searches for groups: what they find, and that their errors are what the groups cost."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch

from dha_peft.fusion import refinement
from dha_peft.fusion.grouping import aligned_curve, contiguous_curve, similarity_curve
from dha_peft.fusion.heads import FrameLayout
from dha_peft.fusion.moments import head_gram
from dha_peft.fusion.problem import HeadProblem
from dha_peft.fusion.refinement import refined_groups
from dha_peft.fusion.similarity import aligned_similarity, cka_similarity, cosine_similarity
from dha_peft.plan import contiguous_groups

from .planted import DIM, LAYOUTS, partition_error, planted_heads, randn, random_gauges, random_psd

SIZE = 48
GROUPS = ((0, 3, 5), (1,), (2, 4))


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


def make_problem(heads, layout):
    return HeadProblem.from_heads(heads, random_psd(SIZE, SIZE), random_psd(len(heads), DIM, DIM), layout)


def test_duplicates_in_random_frames_are_found(layout):
    curve = aligned_curve(make_problem(planted_heads(GROUPS, layout, SIZE), layout))
    assert curve.groups[2] == GROUPS
    assert curve.errors[2] < 1e-9 < 1e-3 < curve.errors[1] < curve.errors[0]


def test_near_duplicates_are_found(layout):
    heads = planted_heads(GROUPS, layout, SIZE) + 0.02 * randn(6, DIM, SIZE)
    assert aligned_curve(make_problem(heads, layout)).groups[2] == GROUPS


def test_curve_has_one_valid_partition_per_count(layout):
    curve = aligned_curve(make_problem(randn(7, DIM, SIZE), layout))
    assert curve.num_heads == 7 and curve.errors[-1] == 0
    assert curve.errors == sorted(curve.errors, reverse=True)
    for count, groups in enumerate(curve.groups, start=1):
        assert len(groups) == count
        assert sorted(head for group in groups for head in group) == list(range(7))
        assert list(groups) == sorted(tuple(sorted(group)) for group in groups)


def test_search_error_bounds_the_exact_error(layout):
    problem = make_problem(randn(6, DIM, SIZE), layout)
    curve = aligned_curve(problem)
    for groups, error in zip(curve.groups, curve.errors):
        exact = partition_error(groups, problem)
        assert error >= exact * (1 - 1e-9)
        if max(map(len, groups)) <= 2 or not len(layout.rest):
            assert error == pytest.approx(exact)


def test_first_merge_is_the_best_of_all(layout):
    problem = make_problem(randn(5, DIM, SIZE), layout)
    costs = {pair: partition_error((pair,), problem) for pair in combinations(range(5), 2)}
    curve = aligned_curve(problem)
    assert min(costs, key=costs.get) in curve.groups[3]
    assert curve.errors[3] == pytest.approx(min(costs.values()))


def test_cka_finds_rotated_duplicates(layout):
    heads = planted_heads(GROUPS, layout, SIZE, rigid=True)
    problem = make_problem(heads, layout)
    curve = similarity_curve(cka_similarity(head_gram(heads, random_psd(SIZE, SIZE))), problem)
    assert curve.groups[2] == GROUPS and curve.errors[2] < 1e-9


def test_contiguous_curve_is_gqa():
    layout = LAYOUTS["half"]
    problem = make_problem(randn(8, DIM, SIZE), layout)
    curve = contiguous_curve(problem)
    assert curve.groups[1] == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert curve.errors[-1] == 0
    assert curve.errors[3] == pytest.approx(partition_error(curve.groups[3], problem))


def test_alignment_search_beats_neighbours(layout):
    problem = make_problem(planted_heads(GROUPS, layout, SIZE) + 0.1 * randn(6, DIM, SIZE), layout)
    ours, neighbours = aligned_curve(problem), contiguous_curve(problem)
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
    white = torch.eye(SIZE, dtype=torch.float64)
    similarity = aligned_similarity(HeadProblem.from_heads(heads, white, random_psd(3, DIM, DIM), layout))
    expected = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(similarity, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("layout", [FrameLayout.rotary(128), FrameLayout.full(128)], ids=["keys", "values"])
def test_heads_of_real_size_in_single_precision(layout):
    """The groups and errors of float64."""
    heads, root, metric = randn(8, 128, 1024), randn(1024, 1024), random_psd(8, 128, 128)
    heads[5] = heads[2] + 0.01 * randn(128, 1024)
    moment = root @ root.T * torch.logspace(0, -4, 1024) + torch.eye(1024)
    moment = (moment + moment.T) / 2
    double = aligned_curve(HeadProblem.from_heads(heads, moment, metric, layout))
    single = aligned_curve(HeadProblem.from_heads(heads.float(), moment.float(), metric.float(), layout))
    assert (2, 5) in single.groups[6] and single.errors[6] < 1e-3 * single.errors[0]
    assert single.groups == double.groups
    assert single.errors == pytest.approx(double.errors, rel=1e-4, abs=1e-6 * double.errors[0])


def test_refined_groups_are_what_no_single_change_improves(layout):
    problem = make_problem(randn(7, DIM, SIZE), layout)
    first = contiguous_groups(7, 3)
    refined = refined_groups(first, problem)
    assert sorted(h for g in refined for h in g) == list(range(7)) and len(refined) == 3
    error = partition_error(refined, problem)
    assert error < partition_error(first, problem)
    for other in _neighbours(refined):
        assert partition_error(other, problem) > error * (1 - 1e-4)


def _neighbours(groups):
    """All partitions that differ by one head moved, or by two that changed places."""
    owner = [next(i for i, g in enumerate(groups) if h in g) for h in range(sum(map(len, groups)))]
    for a, b in product(range(len(owner)), repeat=2):
        for changed in ({a: owner[b]}, {a: owner[b], b: owner[a]}):
            now = [changed.get(h, o) for h, o in enumerate(owner)]
            if len(set(now)) == len(groups):
                yield tuple(tuple(h for h, o in enumerate(now) if o == i) for i in range(len(groups)))


def test_large_layers_keep_the_groups_of_the_search(monkeypatch):
    problem = make_problem(randn(6, DIM, SIZE), FrameLayout.full(DIM))
    monkeypatch.setattr(refinement, "MOST_ROWS", 5 * DIM)
    groups = contiguous_groups(6, 2)
    assert refined_groups(groups, problem) == groups
