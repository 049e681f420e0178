"""What the tables compare, as data: the methods, and the jobs that fill a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, field
from itertools import product
from typing import Any


@dataclass(frozen=True)
class Method:
    """How a base becomes a smaller model and recovers.

    `fields` go to `DHAConfig`. `distil`: the base is the teacher, else the next token is. `share` is the
    share of all tokens that goes into the fusion stage (base frozen, adapter trained). `one_member`: a group's shared head is
    its best member instead of a fused one. `frozen`: only the adapter is trained, its groups tied from the start.
    """

    label: str
    fields: dict[str, Any] = field(default_factory=dict)
    distil: bool = True
    share: float = 0.0
    one_member: bool = False
    frozen: bool = False

    @property
    def grouping(self) -> str:
        return self.fields.get("grouping", "aligned")

    @property
    def trains_groups(self) -> bool:
        """Groups are found by training, so nothing can be measured before it."""
        return self.grouping == "learned"


METHODS = {
    "base": Method("base"),
    "gqa": Method(
        "GQA (mean pool)",
        {"fusion": "linear", "grouping": "contiguous", "allocation": "uniform"},
        distil=False,
    ),
    "linear": Method(
        "DHA linear (the paper's, reconstructed)",
        {"fusion": "linear", "grouping": "learned"},
        distil=False,
        share=0.25,
    ),
    "aligned": Method("DHA aligned (ours)"),
    "adapter": Method("DHA aligned, only the adapter trained", frozen=True),
    "one-member": Method("without fusion (one member of each group is kept)", one_member=True),
    "uniform": Method("without adaptive budgets", {"allocation": "uniform"}),
    "undamped": Method("budgets by sensitivity alone", {"damping": 1.0, "key_weight": 1.0}),
    "full-keys": Method("budgets in which errors of keys count in full", {"key_weight": 1.0}),
    "unaligned": Method("without alignment (mean pool in the same groups)", {"fusion": "linear"}),
    "next-token": Method("without distillation (next token)", distil=False),
    "cka": Method("grouped by CKA, aligned fusion", {"grouping": "cka"}),
    "cka-linear": Method("grouped by CKA, mean pool", {"grouping": "cka", "fusion": "linear"}),
}
MAIN = ("gqa", "linear", "aligned")
ABLATION = ("aligned", "one-member", "uniform", "undamped", "full-keys", "unaligned", "next-token")
STEP_TOKENS = 32_768
BARS = (22, 400)
"""Steps at which adaptive and equal budgets, and the adapter alone, are compared."""
CKA = ("aligned", "cka", "unaligned", "cka-linear")
SPLIT = {"linear": (0.1, 0.25, 0.5, 0.75, 1.0), "aligned": (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)}
"""Shares of the tokens in the fusion stage. Linear fusion finds its groups in it, so it has no 0."""


@dataclass(frozen=True, order=True)
class Job:
    """One trained and measured model. `fraction`: tokens, as a share of the pre-training tokens; `share`: see `Method`."""

    method: str
    budget: float
    fraction: float
    share: float
    seed: int

    @property
    def key(self) -> tuple[str, ...]:
        """The columns that name a row, as a CSV file gives them back."""
        return tuple(str(value) for value in astuple(self))


@dataclass(frozen=True)
class Sizes:
    """What a user may cut down: kept shares of the heads, shares of the pre-training tokens, and seeds."""

    budgets: tuple[float, ...] = (0.5, 0.25, 0.125)
    fractions: tuple[float, ...] = (0.0001, 0.0005, 0.0025, 0.01, 0.05)
    seeds: tuple[int, ...] = (0, 1)
    side_budget: float = 0.25
    side_fractions: tuple[float, ...] = (0.0025, 0.01)
    split_fractions: tuple[float, ...] = (0.0025, 0.01)
    pretraining_tokens: float = 286e6


def jobs(tables: Iterable[str], sizes: Sizes) -> list[Job]:
    """The jobs of the tables, each once, longest first: short ones fill the gaps at the end."""
    wanted = {job for table in tables for job in TABLES[table](sizes)}
    return sorted(wanted, key=lambda job: (-job.fraction, job))


def _main(sizes: Sizes) -> Iterator[Job]:
    yield Job("base", 1.0, 0.0, 0.0, sizes.seeds[0])
    yield from _grid(MAIN, sizes.budgets, sizes.fractions, sizes.seeds)


def _ablation(sizes: Sizes) -> Iterator[Job]:
    return _grid(ABLATION, (sizes.side_budget,), sizes.side_fractions, sizes.seeds)


def _cka(sizes: Sizes) -> Iterator[Job]:
    return _grid(CKA, (sizes.side_budget,), sizes.side_fractions, sizes.seeds)


def _split(sizes: Sizes) -> Iterator[Job]:
    for method, shares in SPLIT.items():
        for fraction, share, seed in product(sizes.split_fractions, shares, sizes.seeds):
            yield Job(method, sizes.side_budget, fraction, share, seed)


def _bars(sizes: Sizes) -> Iterator[Job]:
    fractions = [steps * STEP_TOKENS / sizes.pretraining_tokens for steps in BARS]
    yield from _grid(("aligned", "uniform"), sizes.budgets, fractions, sizes.seeds)
    yield from _grid(("adapter",), (sizes.side_budget,), fractions, sizes.seeds)


def _grid(methods: Iterable[str], budgets, fractions, seeds) -> Iterator[Job]:
    """All cells, and each method's loss without training, which no seed moves."""
    for name, budget in product(methods, budgets):
        share = METHODS[name].share
        if not METHODS[name].trains_groups:
            yield Job(name, budget, 0.0, share, seeds[0])
        yield from (Job(name, budget, fraction, share, seed) for fraction, seed in product(fractions, seeds))


TABLES = {"bars": _bars, "main": _main, "ablation": _ablation, "split": _split, "cka": _cka}
