"""Rows of the study's CSV files, and what is computed from them for tables and figures."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .methods import METHODS

Row = dict[str, Any]
MISSING = "not run yet"


def read(path: Path) -> list[Row]:
    """Rows with numbers as floats and empty cells as None; no rows where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def where(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def distinct(rows: Iterable[Row], name: str) -> list[Any]:
    """Values of a column, in order of appearance."""
    return list(dict.fromkeys(row[name] for row in rows))


def undivided(rows: Iterable[Row]) -> list[Row]:
    """The rows whose tokens are shared out between fusion and training as their method does by itself."""
    return [row for row in rows if row["share"] == METHODS[row["method"]].share]


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, and half the distance between the lowest and the highest."""

    mean: float
    half: float
    count: int

    def text(self, digits: int = 3) -> str:
        return f"{self.mean:.{digits}f}" + (f" ± {self.half:.{digits}f}" if self.count > 1 else "")


def spread(rows: Iterable[Row], column: str = "loss") -> Spread | None:
    """Of one cell; None without rows."""
    values = [row[column] for row in rows if row[column] is not None]
    if not values:
        return None
    return Spread(sum(values) / len(values), (max(values) - min(values)) / 2, len(values))


def tokens_to_reach(rows: list[Row], method: str, budget: float, loss: float) -> float | None:
    """Share of the pre-training tokens at which the method's mean loss first is as low, between two cells by a straight line over the
    logarithm of the tokens; None if it never is."""
    own = where(rows, method=method, budget=budget)
    before: tuple[float, float] | None = None
    for fraction in sorted(f for f in distinct(own, "fraction") if f):
        mean = spread(where(own, fraction=fraction)).mean
        if mean <= loss:
            if before is None:
                return fraction
            way = (before[1] - loss) / (before[1] - mean)
            return before[0] * (fraction / before[0]) ** way
        before = fraction, mean
    return None


def share(value: float) -> str:
    """0.125 as `12.5 %`."""
    return f"{100 * value:g} %"


def text(cell: Spread | None, digits: int = 3) -> str:
    """A cell of a table."""
    return "" if cell is None else cell.text(digits)


def _value(text: str) -> Any:
    try:
        return float(text) if text else None
    except ValueError:
        return text
