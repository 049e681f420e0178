"""Draws the study's figures from its CSV files: `python -m benchmarks.study.figures [--results docs/results/study]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
from matplotlib import rc_context
from matplotlib.figure import Figure

from .methods import METHODS
from .rows import Row, distinct, read, spread, where

STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 8,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "lines.markersize": 4,
    "lines.linewidth": 1.4,
    "figure.constrained_layout.use": True,
}
BLUE, ORANGE, GREEN, RED, GREY = "#3b82c4", "#e0912f", "#4c9a6a", "#c2554d", "#8a8f98"
COLOURS = {"base": GREY, "gqa": RED, "linear": ORANGE, "unaligned": ORANGE, "uniform": GREEN, "aligned": BLUE}
LABELS = {
    "gqa": "GQA (mean pool, contiguous)",
    "linear": "DHA linear (reconstruction)",
    "unaligned": "mean pool, regrouped",
    "uniform": "aligned, equal budgets",
    "undamped": "by sensitivity alone",
    "aligned": "aligned (ours)",
}
LOSS = "loss (nats/token)"


def similarity(rows: list[Row]) -> Figure:
    """Heads against heads of two layers: raw above, aligned below."""
    places = [(layer, kind) for layer in distinct(rows, "layer") for kind in ("key", "value")]
    figure = Figure(figsize=(1.75 * len(places) + 0.7, 3.9))
    panels = figure.subplots(2, len(places), squeeze=False)
    for column, (layer, kind) in enumerate(places):
        for axes, measure in zip(panels[:, column], ("raw", "aligned"), strict=True):
            cells = where(rows, layer=layer, kind=kind, measure=measure)
            count = int(max(row["i"] for row in cells)) + 1
            matrix = numpy.array([row["similarity"] for row in cells]).reshape(count, count)
            image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
            axes.set_title(f"{kind}s, layer {layer:.0f}, {measure}")
            axes.set(xticks=[0, count - 1], yticks=[0, count - 1], xlabel="head")
        panels[0, 0].set(ylabel="head")
        panels[1, 0].set(ylabel="head")
    figure.colorbar(image, ax=panels, shrink=0.7, label="similarity (0 to 1)")
    return figure


def redundancy(rows: list[Row]) -> Figure:
    """How like the nearest other head of its layer a head is, by layer, for queries, keys and values."""
    figure = Figure(figsize=(7, 2.4))
    panels = figure.subplots(1, 3, sharey=True)
    for axes, kind in zip(panels, ("query", "key", "value"), strict=True):
        for measure, colour in (("raw", GREY), ("CKA", ORANGE), ("aligned", BLUE)):
            own = where(rows, kind=kind, measure=measure)
            label = "raw cosine" if measure == "raw" else measure
            axes.plot([r["layer"] for r in own], [r["nearest"] for r in own], "o-", color=colour, label=label)
        axes.set(title=f"{kind} heads", xlabel="layer", ylim=(0, 1))
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set(ylabel="similarity to the\nnearest head (0 to 1)")
    panels[2].legend()
    return figure


def fused(rows: list[Row]) -> Figure:
    """Loss without training against the share of KV heads that were fused away."""
    figure = Figure(figsize=(5, 3))
    axes = figure.subplots()
    base = spread(where(rows, method="base")).mean
    for name in distinct(rows, "method"):
        if name == "base":
            continue
        own = where(rows, method=name)
        shares = [0.0, *(100 * (1 - row["kept"]) for row in own)]
        axes.plot(shares, [base, *(row["loss"] for row in own)], "o-", color=COLOURS[name], label=LABELS[name])
    axes.axhline(base, color=GREY, linestyle=":", label="base")
    axes.set(xlabel="KV heads fused away (%)", ylabel=f"{LOSS}, no training")
    axes.legend()
    return figure


def budgets(rows: list[Row]) -> Figure:
    """Heads kept in every layer under the three rules."""
    figure = Figure(figsize=(7, 2.6))
    panels = figure.subplots(1, 2, sharey=True)
    rules = {"uniform": ("equal", GREY), "undamped": ("by sensitivity alone", ORANGE), "aligned": ("default", BLUE)}
    for axes, kind in zip(panels, ("keys", "values"), strict=True):
        for place, (rule, (label, colour)) in enumerate(rules.items()):
            own = where(rows, rule=rule)
            axes.bar(
                [r["layer"] + 0.27 * (place - 1) for r in own], [r[kind] for r in own], 0.27, color=colour, label=label
            )
        axes.set(title=f"{kind[:-1]} heads", xlabel="layer")
        axes.set_xticks([r["layer"] for r in own])
    panels[0].set(ylabel=f"heads kept of {own[0]['heads']:.0f}")
    panels[0].legend(title=f"budgets at {own[0]['budget']:.0%}")
    return figure


def tokens(rows: list[Row]) -> Figure | None:
    """Loss against training tokens, one panel per budget; bars span the seeds."""
    shown = [
        row
        for row in rows
        if row["method"] in ("gqa", "linear", "aligned") and row["share"] == METHODS[row["method"]].share
    ]
    kept = sorted(distinct(shown, "budget"), reverse=True)
    if not kept:
        return None
    figure = Figure(figsize=(2.4 * len(kept) + 0.4, 2.8))
    panels = figure.subplots(1, len(kept), sharey=True, squeeze=False)[0]
    for axes, budget in zip(panels, kept, strict=True):
        for name in ("gqa", "linear", "aligned"):
            own = where(shown, method=name, budget=budget)
            fractions = sorted(f for f in distinct(own, "fraction") if f)
            cells = [spread(where(own, fraction=fraction)) for fraction in fractions]
            axes.errorbar([100 * f for f in fractions], [c.mean for c in cells], [c.half for c in cells],
                          marker="o", capsize=2, color=COLOURS[name], label=LABELS[name])  # fmt: skip
        _base_line(axes, rows)
        axes.set(
            title=f"{budget:.1%} of KV heads kept".replace(".0%", "%"), xlabel="training tokens\n(% of pre-training)"
        )
        axes.set_xscale("log")
        axes.set_xticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
    panels[0].set(ylabel=LOSS)
    panels[0].legend()
    return figure


def split(rows: list[Row]) -> Figure | None:
    """Loss against the share of fixed tokens that goes into fusion, ours and linear."""
    cells = {name: _splits(rows, name) for name in ("linear", "aligned")}
    if not all(cells.values()):
        return None
    figure = Figure(figsize=(6, 2.6))
    for axes, (name, lines) in zip(figure.subplots(1, 2), cells.items(), strict=True):
        for (fraction, own), style in zip(lines.items(), ("o-", "s--", "^:"), strict=False):
            shares = sorted(distinct(own, "share"))
            found = [spread(where(own, share=share)) for share in shares]
            axes.errorbar([100 * s for s in shares], [c.mean for c in found], [c.half for c in found], fmt=style,
                          capsize=2, color=COLOURS[name], label=f"{100 * fraction:g}% of pre-training")  # fmt: skip
        axes.set(title=LABELS[name], xlabel="tokens spent on fusion (%)", ylabel=LOSS)
        axes.legend()
    return figure


def _splits(rows: list[Row], name: str) -> dict[float, list[Row]]:
    """Rows of one method at one budget, by tokens, where several shares were tried."""
    own = where(rows, method=name)
    budgets = [b for b in distinct(own, "budget") if len(distinct(where(own, budget=b), "share")) > 2]
    own = where(own, budget=budgets[0]) if budgets else []
    lines = {fraction: where(own, fraction=fraction) for fraction in sorted(distinct(own, "fraction"))}
    return {fraction: found for fraction, found in lines.items() if len(distinct(found, "share")) > 2}


def caches(rows: list[Row]) -> Figure:
    """Loss of the continuation against the bytes of the cache."""
    figure = Figure(figsize=(6, 3.2))
    axes = figure.subplots()
    families = {"full": ("bfloat16", "o"), "bits": ("quantized", "s"), "of tokens": ("evicted", "^")}
    models = [
        (method, budget)
        for method in distinct(rows, "method")
        for budget in distinct(where(rows, method=method), "budget")
    ]
    colours = dict(zip(models, (GREY, BLUE, GREEN, ORANGE, RED), strict=False))
    for model in models:
        own = where(rows, method=model[0], budget=model[1])
        for ending, (_, marker) in families.items():
            found = [row for row in own if row["cache"].endswith(ending)]
            axes.plot([r["bytes_per_token"] for r in found], [r["loss"] for r in found], marker, color=colours[model])
        label = "base" if model[0] == "base" else f"{LABELS[model[0]]}, {model[1]:.0%}"
        axes.plot([], [], "-", color=colours[model], linewidth=4, label=label)
    for label, marker in families.values():
        axes.plot([], [], marker, color="black", label=label)
    axes.set(xlabel="bytes of cache per context token", ylabel=LOSS)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.legend()
    return figure


def _base_line(axes: Any, rows: list[Row]) -> None:
    base = spread(where(rows, method="base"))
    if base:
        axes.axhline(base.mean, color=GREY, linestyle=":", label="base")


FIGURES: dict[str, tuple[str, Callable[[list[Row]], Figure | None]]] = {
    "similarity": ("similarity.csv", similarity),
    "redundancy": ("redundancy.csv", redundancy),
    "fused": ("fused.csv", fused),
    "budgets": ("budgets.csv", budgets),
    "tokens": ("losses.csv", tokens),
    "split": ("losses.csv", split),
    "caches": ("caches.csv", caches),
}
"""File name -> its CSV file and what draws it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("docs/results/study"))
    results = parser.parse_args().results
    with rc_context(STYLE):
        for name, (source, draw) in FIGURES.items():
            rows = read(results / source)
            figure = draw(rows) if rows else None
            if figure is None:
                print(f"{name}: nothing to draw in {results / source}")
                continue
            figure.savefig(results / f"{name}.png", dpi=150, facecolor="white", metadata={"Software": None})
            print(results / f"{name}.png")


if __name__ == "__main__":
    main()
