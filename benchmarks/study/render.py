"""Writes docs/study.md from `page.md` and the CSV files, so that no number is typed: `python -m benchmarks.study.render`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from . import sentences
from .methods import ABLATION, BARS, CKA, MAIN, METHODS, SPLIT, STEP_TOKENS
from .rows import MISSING, Row, distinct, read, share, spread, text, undivided, where

TEMPLATE = Path(__file__).with_name("page.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("docs/results/study"))
    parser.add_argument("--page", type=Path, default=Path("docs/study.md"))
    args = parser.parse_args()
    args.page.write_text(page(args.results))
    print(args.page)


def page(results: Path) -> str:
    """The whole page. `page.md` names tables, sentences and figures in braces."""
    data = {name: read(results / f"{name}.csv") for name in SOURCES}
    fields = {}
    for name, (source, make) in PARTS.items():
        fields[name] = make(data[source]) if data[source] else MISSING
    for path in ("similarity", "redundancy", "fused", "budgets", "tokens", "split", "caches"):
        there = (results / f"{path}.png").exists()
        fields[f"{path}_figure"] = f"![{path}](results/study/{path}.png)" if there else f"(figure {MISSING})"
    return TEMPLATE.read_text().format(**fields)


def main_table(rows: list[Row]) -> str:
    """Loss by method and budget, one column per number of tokens."""
    rows = undivided(rows)
    own = [row for row in rows if row["method"] in MAIN]
    fractions = [f for f in sorted(distinct(own, "fraction")) if len(distinct(where(own, fraction=f), "method")) > 1]
    lines = []
    for budget in sorted(distinct(own, "budget"), reverse=True):
        for name in MAIN:
            cells = [spread(where(own, method=name, budget=budget, fraction=f)) for f in fractions]
            lines.append([share(budget), METHODS[name].label, *map(text, cells)])
    base = text(spread(where(rows, method="base")))
    table = markdown(["kept", "method", *(f"{share(f)} of tokens" for f in fractions)], lines)
    return f"{table}\n\nBase: {base}. {seeds(own)}"


def bars_table(rows: list[Row]) -> str:
    """Adaptive and equal budgets, and the adapter alone, in steps of 32,768 tokens."""
    lines = []
    for name in ("aligned", "uniform", "adapter"):
        for budget in sorted(distinct(where(rows, method=name), "budget"), reverse=True):
            own = where(rows, method=name, budget=budget, share=0.0)
            cells = [[r for r in own if r["tokens"] == steps * STEP_TOKENS] for steps in (0, *BARS)]
            if any(cells[1:]):
                before = text(spread(cells[-1], "before_collapse"))
                lines.append([METHODS[name].label, share(budget), *(text(spread(cell), 4) for cell in cells), before])
    head = ["method", "kept", "closed form", *(f"{steps} steps" for steps in BARS), "before the collapse"]
    return markdown(head, lines) if lines else MISSING


def variants_table(names: Iterable[str]) -> Callable[[list[Row]], str]:
    """Loss of some methods at the budget that all of them were run at, without a split of their own."""

    def table(rows: list[Row]) -> str:
        own = [r for r in undivided(rows) if r["method"] in names]
        known = [name for name in names if where(own, method=name)]
        if len(known) < 2:
            return MISSING
        # What only some of the methods were run at belongs to other tables.
        budgets = [b for b in distinct(own, "budget") if all(where(own, method=n, budget=b) for n in known)]
        fractions = [
            f
            for f in sorted(distinct(own, "fraction"))
            if sum(bool(where(own, method=n, fraction=f)) for n in known) > len(known) / 2
        ]
        lines = [
            [
                share(b),
                METHODS[n].label,
                *(text(spread(where(own, method=n, budget=b, fraction=f))) or MISSING for f in fractions),
            ]
            for b in budgets
            for n in names
        ]
        return markdown(["kept", "variant", *(f"{share(f)} of tokens" for f in fractions)], lines)

    return table


def split_table(rows: list[Row]) -> str:
    """Loss by share of the tokens in the fusion stage."""
    lines = []
    for name in SPLIT:
        for fraction in sorted(distinct(rows, "fraction")):
            own = where(rows, method=name, fraction=fraction)
            for budget in [b for b in distinct(own, "budget") if len(distinct(where(own, budget=b), "share")) > 2]:
                for part in sorted(distinct(where(own, budget=budget), "share")):
                    found = where(own, budget=budget, share=part)
                    before = text(spread(found, "before_collapse"))
                    lines.append(
                        [METHODS[name].label, share(budget), share(fraction), share(part), before, text(spread(found))]
                    )
    head = ["method", "kept", "tokens in all", "of them in fusion", "before the collapse", "loss at the end"]
    return markdown(head, lines) if lines else MISSING


def scores_table(rows: list[Row]) -> str:
    """Accuracy by task, with lm-eval's standard error."""
    rows = undivided(where(rows, metric="acc"))
    tasks, lines = distinct(rows, "task"), []
    for method in [m for m in METHODS if where(rows, method=m)]:
        for budget in sorted(distinct(where(rows, method=method), "budget"), reverse=True):
            for fraction in sorted(distinct(where(rows, method=method, budget=budget), "fraction")):
                cell = where(rows, method=method, budget=budget, fraction=fraction)
                found = [spread(where(cell, task=task), "value") for task in tasks]
                errors = [spread(where(cell, task=task), "stderr") for task in tasks]
                marks = [
                    f"{100 * v.mean:.1f} ± {100 * e.mean:.1f}" if v else "" for v, e in zip(found, errors, strict=True)
                ]
                mean = f"{100 * sum(v.mean for v in found) / len(found):.1f}" if all(found) else ""
                lines.append([METHODS[method].label, share(budget), share(fraction), *marks, mean])
    names = [str(task).removeprefix("local_") for task in tasks]
    return markdown(["method", "kept", "tokens", *names, "mean"], lines)


def caches_table(rows: list[Row]) -> str:
    """Loss and bytes by model and kind of cache."""
    full = where(rows, method="base", cache="full")[0]["bytes_per_token"]
    lines = [
        [
            METHODS[r["method"]].label,
            share(r["budget"]),
            "" if r["method"] == "base" else share(r["fraction"]),
            r["cache"],
            f"{r['loss']:.3f}",
            f"{r['loss'] - where(rows, method=r['method'], budget=r['budget'], cache='full')[0]['loss']:+.3f}",
            f"{r['bytes_per_token']:.0f}",
            f"{full / r['bytes_per_token']:.1f}",
        ]
        for r in rows
    ]
    head = [
        "model",
        "kept",
        "tokens",
        "cache",
        "loss",
        "against its full cache",
        "bytes per token",
        "times smaller than the base's",
    ]
    return markdown(head, lines)


def fused_table(rows: list[Row]) -> str:
    """Loss without training by share of heads kept."""
    names = {
        "gqa": "GQA (mean pool)",
        "unaligned": "mean pool, regrouped",
        "uniform": "aligned, equal budgets",
        "aligned": "aligned (default)",
    }
    shares = sorted({r["kept"] for r in rows if r["method"] != "base"}, reverse=True)
    lines = [[share(s), *(text(spread(where(rows, method=n, kept=s))) for n in names)] for s in shares]
    return markdown(["kept", *names.values()], lines) + f"\n\nBase: {text(spread(where(rows, method='base')))}."


def seeds(rows: list[Row]) -> str:
    """What ± means here."""
    count = len(distinct(rows, "seed"))
    return f"Mean of {count} seeds, ± half the distance between them; no ±: one seed." if count > 1 else "One seed."


def markdown(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


SOURCES = ("losses", "scores", "similarity", "redundancy", "fused", "budgets", "caches")
PARTS: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "main": ("losses", main_table),
    "bars": ("losses", bars_table),
    "adaptive": ("losses", sentences.adaptive),
    "speed": ("losses", sentences.speed),
    "scores": ("scores", scores_table),
    "retained": ("scores", sentences.retained),
    "ablation": ("losses", variants_table(ABLATION)),
    "unfused": ("losses", sentences.unfused),
    "split": ("losses", split_table),
    "cka": ("losses", variants_table(CKA)),
    "caches": ("caches", caches_table),
    "caches_costs": ("caches", sentences.caches),
    "similarity": ("similarity", sentences.similarity),
    "redundancy": ("redundancy", sentences.redundancy),
    "fused": ("fused", fused_table),
    "budgets": ("budgets", sentences.budgets),
}
"""Name in the page -> its CSV file and what makes the Markdown."""


if __name__ == "__main__":
    main()
