"""Which heads to put together: from one head per group down to one group, the groups and their error at every count.

A `GroupCurve` is computed once per layer and kind; any number of budgets can then be solved from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan import Groups, contiguous_groups
from .alignment import pair_gram, pair_weights, weighted_gram
from .heads import FrameLayout


@dataclass
class GroupCurve:
    """`groups[c - 1]` and `errors[c - 1]` are the groups and their total alignment error when `c` heads are kept."""

    groups: list[Groups]
    errors: list[float]

    @property
    def num_heads(self) -> int:
        return len(self.groups)


def aligned_curve(gram: Tensor, metric: Tensor, layout: FrameLayout) -> GroupCurve:
    """Agglomerative search by alignment error: always merge the two groups whose union adds least (METHOD section 3)."""
    search = _AlignedSearch(gram, metric, layout)
    return _agglomerate(gram.shape[0], search.added_error, search.merge)


def similarity_curve(similarity: Tensor, gram: Tensor, metric: Tensor, layout: FrameLayout) -> GroupCurve:
    """Average-linkage clustering of a similarity `[H, H]` (the paper's CKA variant); errors are alignment errors."""
    members = {head: [head] for head in range(similarity.shape[0])}

    def distance(a: int, b: int) -> float:
        return 1.0 - float(similarity[members[a]][:, members[b]].mean())

    def merge(a: int, b: int) -> None:
        members[a] += members.pop(b)

    groups = _agglomerate(similarity.shape[0], distance, merge).groups
    return GroupCurve(groups, [partition_error(g, gram, metric, layout) for g in groups])


def contiguous_curve(gram: Tensor, metric: Tensor, layout: FrameLayout) -> GroupCurve:
    """GQA's groups of neighbours at every count."""
    groups = [contiguous_groups(gram.shape[0], count) for count in range(1, gram.shape[0] + 1)]
    return GroupCurve(groups, [partition_error(g, gram, metric, layout) for g in groups])


def partition_error(groups: Groups, gram: Tensor, metric: Tensor, layout: FrameLayout) -> float:
    """Alignment error of a whole partition; groups of one cost nothing."""
    return sum(float(weighted_gram(gram, metric, layout, list(g)).error()) for g in groups if len(g) > 1)


def _agglomerate(count: int, added_error, merge) -> GroupCurve:
    """Merge the cheapest pair until one group is left. `merge(a, b)` folds `b` into `a`."""
    members = {head: (head,) for head in range(count)}
    costs = {(a, b): added_error(a, b) for a in range(count) for b in range(a + 1, count)}
    groups, errors = [tuple(members.values())], [0.0]
    while len(members) > 1:
        (a, b), cost = min(costs.items(), key=lambda item: item[1])
        merge(a, b)
        members[a] += members.pop(b)
        costs = {pair: c for pair, c in costs.items() if a not in pair and b not in pair}
        costs.update({(min(a, other), max(a, other)): added_error(a, other) for other in members if other != a})
        groups.append(tuple(sorted(tuple(sorted(g)) for g in members.values())))
        errors.append(errors[-1] + max(cost, 0.0))
    return GroupCurve(groups[::-1], errors[::-1])


class _AlignedSearch:
    """Error added by a merge. Rotary pairs are evaluated exactly. For the free rows a group is kept as its best `R` directions,
    so that a merge costs one `2R x 2R` eigenvalue problem whatever the group's size. `blocks` `[H, H, R, R]` holds the Gram
    matrices between the groups in these directions, group `g` under the number of the head that it grew from."""

    def __init__(self, gram: Tensor, metric: Tensor, layout: FrameLayout) -> None:
        count, self.rest = gram.shape[0], len(layout.rest)
        root = pair_weights(metric, layout).clamp_min(0).sqrt()
        self.pair = root[:, :, None] * pair_gram(gram, layout) * root[:, None, :]
        full = weighted_gram(gram, metric, FrameLayout(layout.pairs[:0], layout.rest), list(range(count))).full
        self.blocks = full.reshape(count, self.rest, count, self.rest).transpose(1, 2).contiguous()
        self.members = {head: [head] for head in range(count)}
        self.pair_error = dict.fromkeys(range(count), 0.0)

    def added_error(self, a: int, b: int) -> float:
        joint = self._pair_error(self.members[a] + self.members[b])
        error = joint - self.pair_error[a] - self.pair_error[b]
        if self.rest:
            error += float(torch.linalg.eigvalsh(self._joint_gram(a, b))[: self.rest].clamp_min(0).sum())
        return error

    def merge(self, a: int, b: int) -> None:
        if self.rest:
            values, vectors = torch.linalg.eigh(self._joint_gram(a, b))
            first, second = vectors[:, -self.rest :].split(self.rest)
            rows = first.T @ self.blocks[a] + second.T @ self.blocks[b]
            self.blocks[a], self.blocks[:, a] = rows, rows.transpose(1, 2)
            self.blocks[a, a] = values[-self.rest :].diag()
        self.members[a] = self.members[a] + self.members.pop(b)
        self.pair_error[a] = self._pair_error(self.members[a])

    def _pair_error(self, members: list[int]) -> float:
        if not len(self.pair):
            return 0.0
        block = self.pair[:, members][:, :, members]
        return float(torch.linalg.eigvalsh(block)[:, :-1].clamp_min(0).sum())

    def _joint_gram(self, a: int, b: int) -> Tensor:
        return self.blocks[[a, b]][:, [a, b]].transpose(1, 2).reshape(2 * self.rest, 2 * self.rest)
