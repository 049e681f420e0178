"""The report's figures, one function each. They take facts as `results.json` holds them, and are narrow enough for a phone."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

INK = "#010203"
"""Drawn where the page's own text colour belongs, so that figures follow light and dark mode."""
KEY, VALUE, GREY, RED = "#3b82c4", "#e0912f", "#8a8f98", "#c2554d"
NARROW, WIDE = (4.4, 2.9), (6.2, 3.0)
"""Inches. Two narrow figures stand side by side on a desk and below each other on a phone."""


def budgets(plan: dict[str, Any]) -> Figure:
    """Key heads and value heads kept in every layer."""
    figure, axes = _panel(WIDE)
    counts = [[len(groups) for groups in plan[f"{kind}_groups"]] for kind in ("key", "value")]
    for kept, shift, name, colour in zip(counts, (-0.2, 0.2), ("key heads", "value heads"), (KEY, VALUE), strict=True):
        bars = axes.bar([i + shift for i in range(len(kept))], kept, 0.4, label=name, color=colour)
        if len(kept) <= 16:
            axes.bar_label(bars, fontsize=8, color=INK)
    base = max(sum(map(len, groups)) for groups in plan["key_groups"])
    axes.axhline(base, color=GREY, linestyle=":", label=f"base: {base} of each")
    axes.set(xlabel="layer", ylabel="heads kept", ylim=(0, base * 1.08))
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _finished(figure, axes, columns=3)


def similarity(row: dict[str, Any]) -> Figure:
    """Heads against heads of one layer and kind: raw cosine on the left, aligned on the right."""
    figure = Figure(figsize=(4.4, 2.3), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, measure in zip(panels, ("raw", "aligned"), strict=True):
        image = axes.imshow([[abs(v) for v in r] for r in row[measure]], vmin=0, vmax=1, cmap="viridis")
        axes.set_title(measure, fontsize=10, color=INK)
        axes.set(xticks=[], yticks=[])
        axes.set_frame_on(False)
    bar = figure.colorbar(image, ax=panels, shrink=0.75)
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.outline.set_visible(False)
    return figure


def curves(log: list[dict[str, Any]], names: Sequence[str], label: str) -> Figure:
    """Values of the fusion's log over its steps; the second one is dashed, so that it shows where it lies on the first."""
    figure, axes = _panel(NARROW)
    steps = [row["step"] for row in log]
    for name, colour, style in zip(names, (KEY, VALUE), ("-", "--"), strict=True):
        axes.plot(
            steps, [row[f"dha/{name}"] for row in log], style, color=colour, linewidth=2, label=name.replace("_", " ")
        )
    axes.set(xlabel="step", ylabel=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _finished(figure, axes, columns=2)


def quality(points: list[dict[str, Any]]) -> Figure:
    """Loss against the share of the base's KV heads, one line per model name, and the base's loss as a floor."""
    figure, axes = _panel(WIDE)
    colours = {"base": GREY, "dha": KEY, "mean-pooled GQA": RED}
    spare = iter((KEY, VALUE, "#4c9a6a", "#8d6bb8") * len(points))
    for name in dict.fromkeys(point["model"] for point in points):
        own = sorted((p["budget"], p["loss"]) for p in points if p["model"] == name)
        label = f"{name}: {own[0][1]:.3f}" if len(own) == 1 else name
        axes.plot(*zip(*own, strict=True), "o-", color=colours.get(name) or next(spare), label=label)
        if name == "base":
            axes.axhline(own[0][1], color=GREY, linestyle=":")
    axes.set(xlabel="key and value heads kept", ylabel="loss (nats/token)", xlim=(0, 1.04))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return _finished(figure, axes, columns=2)


def pair(values: Sequence[float], label: str) -> Figure:
    """Base beside result, with the figures on the bars."""
    figure, axes = _panel((4.4, 2.4))
    bars = axes.bar(["base", "result"], values, color=[GREY, KEY], width=0.55)
    axes.bar_label(bars, fmt="%.4g", fontsize=10, color=INK, padding=2)
    axes.set(ylabel=label, ylim=(0, max(values) * 1.15))
    return _finished(figure, axes, columns=0)


def svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element that takes the page's text colour. Its ids start with `name`, as a page has many."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    for size in ("width", "height"):
        text = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'((?:href="|url\()#)', rf"\1{name}-", text)
    return re.sub(r'\bid="', f'id="{name}-', text)


def png(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150, facecolor="white")


def _panel(size: tuple[float, float]) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()


def _finished(figure: Figure, axes: Any, columns: int) -> Figure:
    """Text in the page's colour, a light grid, and a legend above the plot in `columns` columns (0: none)."""
    axes.tick_params(colors=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(axis="y", color=GREY, alpha=0.25)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(INK)
    if columns:
        figure.legend(loc="outside upper left", ncols=columns, frameon=False, labelcolor=INK, fontsize=9)
    return figure
