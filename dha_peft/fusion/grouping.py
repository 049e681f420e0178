"""Which heads to put together: from one head per group down to one group, the groups and their error at every count.

A `GroupCurve` is computed once per layer and kind; any number of budgets can then be solved from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan import Groups, contiguous_groups
from .problem import HeadProblem
from .spectra import tail_energy

Pair = tuple[int, int]
AT_ONCE = 128
"""Merges that are evaluated together: for heads of 128 dimensions 32 MB in single precision."""


@dataclass
class GroupCurve:
    """`groups[c - 1]` and `errors[c - 1]` are the groups and their total alignment error when `c` heads are kept."""

    groups: list[Groups]
    errors: list[float]

    @property
    def num_heads(self) -> int:
        return len(self.groups)


def aligned_curve(problem: HeadProblem) -> GroupCurve:
    """Agglomerative search by alignment error: always merge the two groups whose union adds least (ours)."""
    search = _AlignedSearch(problem)
    return _agglomerate(len(problem), search.added_errors, search.merge)


def similarity_curve(similarity: Tensor, problem: HeadProblem) -> GroupCurve:
    """Average-linkage clustering of a similarity `[H, H]` (the paper's CKA variant); errors are alignment errors."""
    return _evaluated(average_linkage(similarity), problem)


def contiguous_curve(problem: HeadProblem) -> GroupCurve:
    """GQA's groups of neighbours at every count."""
    count = len(problem)
    return _evaluated([contiguous_groups(count, kept) for kept in range(1, count + 1)], problem)


def average_linkage(similarity: Tensor) -> list[Groups]:
    """Groups at every count, from one on: always merge the two groups whose members are most alike on average."""
    members = {head: [head] for head in range(similarity.shape[0])}

    def distances(pairs: list[Pair]) -> list[float]:
        return [1.0 - float(similarity[members[a]][:, members[b]].mean()) for a, b in pairs]

    def merge(a: int, b: int) -> None:
        members[a] += members.pop(b)

    return _agglomerate(similarity.shape[0], distances, merge).groups


def _evaluated(partitions: list[Groups], problem: HeadProblem) -> GroupCurve:
    """Partitions with their alignment errors; a group that several of them have is evaluated once."""
    errors = {group: problem.error(list(group)) for group in {group for groups in partitions for group in groups}}
    return GroupCurve(partitions, [sum(errors[group] for group in groups) for groups in partitions])


def _agglomerate(
    count: int, added_errors: Callable[[list[Pair]], list[float]], merge: Callable[[int, int], None]
) -> GroupCurve:
    """Merge the cheapest pair until one group is left. `merge(a, b)` folds `b` into `a`."""
    members = {head: (head,) for head in range(count)}
    costs: dict[Pair, float] = {}
    new = [(a, b) for a in range(count) for b in range(a + 1, count)]
    groups, errors = [tuple(members.values())], [0.0]
    while len(members) > 1:
        costs.update(zip(new, added_errors(new), strict=True))
        (a, b), cost = min(costs.items(), key=lambda item: item[1])
        merge(a, b)
        members[a] += members.pop(b)
        costs = {pair: c for pair, c in costs.items() if a not in pair and b not in pair}
        new = [(min(a, other), max(a, other)) for other in members if other != a]
        groups.append(tuple(sorted(tuple(sorted(g)) for g in members.values())))
        errors.append(errors[-1] + max(cost, 0.0))
    return GroupCurve(groups[::-1], errors[::-1])


class _AlignedSearch:
    """Error added by a merge. Rotary pairs are evaluated exactly. For the free rows a group is kept as its best `R` directions,
    so that a merge costs one `2R x 2R` eigenvalue problem whatever the group's size. `blocks` `[H, H, R, R]` holds the Gram
    matrices between the groups in these directions, group `g` under the number of the head that it grew from."""

    def __init__(self, problem: HeadProblem) -> None:
        count, weighted = len(problem), problem.weighted()
        self.pair, self.rest = weighted.pair, weighted.rest
        self.blocks = weighted.full.reshape(count, self.rest, count, self.rest).transpose(1, 2).contiguous()
        self.members = {head: [head] for head in range(count)}
        self.pair_error = dict.fromkeys(range(count), 0.0)

    def added_errors(self, pairs: list[Pair]) -> list[float]:
        """What each merge adds, many at a time."""
        joint = self._pair_errors([self.members[a] + self.members[b] for a, b in pairs])
        errors = [j - self.pair_error[a] - self.pair_error[b] for j, (a, b) in zip(joint, pairs, strict=True)]
        if self.rest:
            free = torch.cat([tail_energy(self._joint_grams(part), self.rest) for part in _parts(pairs)])
            errors = [error + more for error, more in zip(errors, free.tolist(), strict=True)]
        return errors

    def merge(self, a: int, b: int) -> None:
        if self.rest:
            values, vectors = torch.linalg.eigh(self._joint_grams([(a, b)])[0])
            first, second = vectors[:, -self.rest :].split(self.rest)
            rows = first.T @ self.blocks[a] + second.T @ self.blocks[b]
            self.blocks[a], self.blocks[:, a] = rows, rows.transpose(1, 2)
            self.blocks[a, a] = values[-self.rest :].diag()
        self.members[a] = self.members[a] + self.members.pop(b)
        self.pair_error[a] = self._pair_errors([self.members[a]])[0]

    def _pair_errors(self, groups: list[list[int]]) -> list[float]:
        """Errors of the rotary pairs of these groups, groups of one size together."""
        errors = torch.zeros(len(groups), dtype=self.blocks.dtype, device=self.blocks.device)
        for size in {len(group) for group in groups} if len(self.pair) else ():
            places = [place for place, group in enumerate(groups) if len(group) == size]
            heads = torch.tensor([groups[place] for place in places], device=errors.device)
            block = self.pair[:, heads[:, :, None], heads[:, None, :]]
            errors[places] = tail_energy(block, 1).sum(0)
        return errors.tolist()

    def _joint_grams(self, pairs: Sequence[Pair]) -> Tensor:
        """Gram matrices of two groups each, `[N, 2R, 2R]`."""
        heads = torch.tensor(pairs, device=self.blocks.device)
        blocks = self.blocks[heads[:, :, None], heads[:, None, :]]
        return blocks.transpose(2, 3).reshape(len(pairs), 2 * self.rest, 2 * self.rest)


def _parts(pairs: list[Pair]) -> list[list[Pair]]:
    return [pairs[start : start + AT_ONCE] for start in range(0, len(pairs), AT_ONCE)]
