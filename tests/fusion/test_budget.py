"""Counts per layer: totals met exactly, and least cost against brute force."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from dha_peft.fusion.budget import cheapest_counts, total_heads, uniform_counts


def cost(curves, counts):
    return sum(curve[count - 1] for curve, count in zip(curves, counts))


def random_curves(seed, convex=True):
    generator = torch.Generator().manual_seed(seed)
    curves = []
    for capacity in (4, 3, 5, 4):
        steps = torch.rand(capacity, generator=generator, dtype=torch.float64) * 10 ** (seed % 3)
        curve = steps.flip(0).cumsum(0).flip(0) - steps[-1] if convex else steps
        curves.append(curve.tolist())
    return curves


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("floor", [1, 2])
def test_cheapest_counts_equal_brute_force(seed, floor):
    curves = random_curves(seed, convex=seed % 2 == 0)
    everything = list(product(*(range(floor, len(curve) + 1) for curve in curves)))
    for total in range(4 * floor, 17):
        counts = cheapest_counts(curves, total, floor)
        assert sum(counts) == total and min(counts) >= floor
        best = min(cost(curves, other) for other in everything if sum(other) == total)
        assert cost(curves, counts) == pytest.approx(best)


def test_floor_gives_way_to_the_total():
    assert cheapest_counts([[2.0, 1.0, 0.0]] * 3, total=3, floor=3) == [1, 1, 1]
    assert cheapest_counts([[2.0, 1.0, 0.0]] * 3, total=9, floor=3) == [3, 3, 3]


def test_cheapest_counts_spend_where_it_matters():
    assert cheapest_counts([[9.0, 5.0, 0.0], [0.2, 0.1, 0.0]], total=4) == [3, 1]


def test_all_heads_and_one_head_each():
    curves = random_curves(0)
    assert cheapest_counts(curves, 16) == [4, 3, 5, 4]
    assert cheapest_counts(curves, 4) == [1, 1, 1, 1]


@pytest.mark.parametrize("capacities", [[8] * 6, [4, 1, 7, 3], [32] * 64, [1, 1, 1], [5]])
def test_uniform_counts_meet_every_total(capacities):
    for total in range(len(capacities), sum(capacities) + 1):
        counts = uniform_counts(capacities, total)
        assert sum(counts) == total
        assert all(1 <= count <= capacity for count, capacity in zip(counts, capacities))
        if len(set(capacities)) == 1:
            assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("budget,expected", [(0.25, 64), (0.5, 128), (1, 256), (0.125, 32)])
def test_total_heads(budget, expected):
    assert total_heads(budget, 256, 16) == expected


@pytest.mark.parametrize("budget", [0, -0.5, 1.01, float("nan")])
def test_budget_out_of_range_names_the_field(budget):
    with pytest.raises(ValueError, match=r"`key_budget` is .* choose a number in \(0, 1\]"):
        total_heads(budget, 64, 4, "key_budget")


def test_budget_too_small_tells_the_smallest():
    with pytest.raises(ValueError, match=r"keeps 3 of 64 heads.*at least 0\.0625"):
        total_heads(0.05, 64, 4)
    assert total_heads(0.0625, 64, 4) == 4
