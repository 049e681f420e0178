"""How many key heads and value heads every layer keeps, so that the total is met exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def total_heads(budget: float, heads: int, slots: int, field: str = "head_budget") -> int:
    """Heads that a budget keeps out of `heads`, spread over `slots` (layer, kind) places that need one each."""
    if not 0 < budget <= 1:
        raise ValueError(f"`{field}` is {budget}, but it is the share of KV heads to keep; choose a number in (0, 1].")
    total = round(budget * heads)
    if total < slots:
        raise ValueError(
            f"`{field}` of {budget} keeps {total} of {heads} heads, fewer than one per layer and kind ({slots}); "
            f"choose at least {slots / heads:.4g}."
        )
    return total


def uniform_counts(capacities: Sequence[int], total: int) -> list[int]:
    """Equal counts; what does not divide goes to evenly spaced places. `capacities`: heads of each place."""
    counts = [1] * len(capacities)
    scale = (total - len(capacities)) / max(sum(capacities) - len(capacities), 1)
    shares = [scale * (capacity - 1) for capacity in capacities]
    counts = [1 + int(share) for share in shares]
    behind = 0.0
    for index, share in enumerate(shares):
        behind += share - int(share)
        if behind >= 1 - 1e-9 and sum(counts) < total:
            counts[index] += 1
            behind -= 1
    for index in range(len(counts)):
        counts[index] += int(sum(counts) < total and counts[index] < capacities[index])
    return counts


def cheapest_counts(costs: Sequence[Sequence[float]], total: int, floor: int = 1) -> list[int]:
    """Counts of least total cost, exactly (dynamic programming over places).

    `costs[p][c - 1]` is what place `p` costs when it keeps `c` heads. `floor` is the least count of a place; it
    gives way where the total does not allow it.
    """
    floor = max(1, min(floor, total // len(costs), *(len(curve) for curve in costs)))
    infinity = float("inf")
    best = torch.full((total + 1,), infinity, dtype=torch.float64)
    best[0] = 0.0
    choices = []
    for curve in costs:
        options = torch.full((len(curve) + 1, total + 1), infinity, dtype=torch.float64)
        for count in range(floor, min(len(curve), total) + 1):
            options[count, count:] = best[: total + 1 - count] + float(curve[count - 1])
        best, choice = options.min(dim=0)
        choices.append(choice)
    counts, left = [], total
    for choice in reversed(choices):
        counts.append(int(choice[left]))
        left -= counts[-1]
    return counts[::-1]
