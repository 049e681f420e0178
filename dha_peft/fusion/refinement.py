"""Groups made better one head at a time: the agglomerative search never takes a merge back, this does (ours).

A head moves to another group, or two heads change places, as long as the alignment error of the whole falls.
"""

from __future__ import annotations

from itertools import product

from ..plan import Groups
from .problem import HeadProblem
from .spectra import tail_energy

MOST_ROWS = 1024
"""Free rows of all heads of a layer up to which groups are refined; beyond it each step would take seconds."""


def can_refine(num_groups: int, num_heads: int, free_rows: int) -> bool:
    """Whether there is a choice of groups, and the layer, of heads with `free_rows` rows outside rotary pairs, is small enough."""
    return 1 < num_groups < num_heads and num_heads * free_rows <= MOST_ROWS


def refined_groups(groups: Groups, problem: HeadProblem) -> Groups:
    """Groups of the same number with an alignment error that no single move or exchange lowers; `groups` themselves where the
    layer is too large or nothing can be gained."""
    if not can_refine(len(groups), len(problem), problem.rest.shape[2]):
        return groups
    return _Refinement(groups, problem).run()


class _Refinement:
    """`sets` are the groups as they stand; errors of groups are kept, as most of them are asked for again and again."""

    def __init__(self, groups: Groups, problem: HeadProblem) -> None:
        weighted = problem.weighted()
        self.pair, self.rest = weighted.pair, weighted.rest
        count = len(problem)
        # Single precision is enough to tell groups apart, and twice as fast.
        self.blocks = weighted.full.reshape(count, self.rest, count, self.rest).float()
        self.sets = [frozenset(group) for group in groups]
        self.errors: dict[frozenset[int], float] = {}

    def run(self) -> Groups:
        improved = True
        while improved:
            # Exchanges are many: they are tried only where no move helps.
            improved = self._apply(self._moves()) or self._apply(self._exchanges())
        return tuple(sorted(tuple(sorted(group)) for group in self.sets))

    def _apply(self, changes: list[tuple[int, int, frozenset[int], frozenset[int]]]) -> bool:
        """Make the best of these changes of two groups, if it lowers the error."""
        gains = [
            self._error(self.sets[a]) + self._error(self.sets[b]) - self._error(left) - self._error(right)
            for a, b, left, right in changes
        ]
        best = max(range(len(gains)), key=gains.__getitem__, default=None)
        total = sum(map(self._error, self.sets))
        if best is None or gains[best] <= 1e-6 * total:
            return False
        a, b, self.sets[a], self.sets[b] = changes[best]
        return True

    def _moves(self) -> list[tuple[int, int, frozenset[int], frozenset[int]]]:
        return [
            (a, b, left - {head}, right | {head})
            for (a, left), (b, right) in product(enumerate(self.sets), repeat=2)
            if a != b and len(left) > 1
            for head in left
        ]

    def _exchanges(self) -> list[tuple[int, int, frozenset[int], frozenset[int]]]:
        return [
            (a, b, left - {head} | {other}, right - {other} | {head})
            for (a, left), (b, right) in product(enumerate(self.sets), repeat=2)
            if a < b and len(left) + len(right) > 2
            for head, other in product(left, right)
        ]

    def _error(self, group: frozenset[int]) -> float:
        if len(group) == 1:
            return 0.0
        if group not in self.errors:
            members = sorted(group)
            error = 0.0
            if len(self.pair):
                error += float(tail_energy(self.pair[:, members][:, :, members], 1).sum())
            if self.rest:
                size = len(members) * self.rest
                error += float(tail_energy(self.blocks[members][:, :, members].reshape(size, size), self.rest))
            self.errors[group] = error
        return self.errors[group]
