"""The report's figures, one function each. They take facts as `results.json` holds them."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

INK = "#010203"
"""Drawn where the page's own text colour belongs, so that figures follow light and dark mode."""
KEY, VALUE, GREY, RED = "#3b82c4", "#e0912f", "#8a8f98", "#c2554d"


def budgets(plan: dict[str, Any]) -> Figure:
    """Key heads and value heads kept in every layer."""
    figure, axes = _panel()
    layers = range(len(plan["key_groups"]))
    axes.bar([i - 0.2 for i in layers], [len(g) for g in plan["key_groups"]], 0.4, label="key heads", color=KEY)
    axes.bar([i + 0.2 for i in layers], [len(g) for g in plan["value_groups"]], 0.4, label="value heads", color=VALUE)
    base = sum(len(group) for group in plan["key_groups"][0])
    axes.axhline(base, color=GREY, linestyle=":", label=f"base: {base} of each")
    axes.set(xlabel="layer", ylabel="heads kept")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _finished(figure, axes)


def similarity(rows: list[dict[str, Any]]) -> Figure:
    """Heads against heads, raw cosine above and aligned below, one column per layer and kind."""
    figure = Figure(figsize=(2.1 * len(rows) + 0.6, 4.6), layout="constrained")
    panels = figure.subplots(2, len(rows), squeeze=False)
    for column, row in enumerate(rows):
        for line, measure in enumerate(("raw", "aligned")):
            axes = panels[line][column]
            image = axes.imshow([[abs(v) for v in r] for r in row[measure]], vmin=0, vmax=1, cmap="viridis")
            axes.set_title(f"{row['kind']}s, layer {row['layer']}\n{measure}", fontsize=8, color=INK)
            axes.set(xticks=[], yticks=[])
    bar = figure.colorbar(image, ax=panels, shrink=0.6)
    bar.ax.tick_params(colors=INK, labelsize=8)
    return figure


def trajectory(log: list[dict[str, Any]]) -> Figure:
    """Fusion loss and target, and the multipliers, over the steps."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [row["step"] for row in log]
    for name, colour, style in (("fusion_loss", KEY, "-"), ("target", GREY, "--")):
        left.plot(steps, [row[f"dha/{name}"] for row in log], style, color=colour, label=name.replace("_", " "))
    for name, colour in (("lambda1", KEY), ("lambda2", VALUE)):
        right.plot(steps, [row[f"dha/{name}"] for row in log], color=colour, label=name)
    left.set(xlabel="step", ylabel="fusion loss")
    right.set(xlabel="step", ylabel="multiplier")
    _finished(figure, left)
    return _finished(figure, right)


def quality(points: list[dict[str, Any]]) -> Figure:
    """Loss against the share of the base's KV cache, one line per model name."""
    figure, axes = _panel()
    colours = {"base": GREY, "dha": KEY, "mean-pooled GQA": RED}
    spare = iter((KEY, VALUE, "#4c9a6a", "#8d6bb8") * len(points))
    for name in dict.fromkeys(point["model"] for point in points):
        own = sorted((p["budget"], p["loss"]) for p in points if p["model"] == name)
        axes.plot(*zip(*own, strict=True), "o-", color=colours.get(name) or next(spare), label=name)
        if name == "base":
            axes.axhline(own[0][1], color=GREY, linestyle=":")
    axes.set(xlabel="share of KV heads kept", ylabel="loss (nats/token)")
    return _finished(figure, axes)


def speed(facts: dict[str, Any]) -> Figure:
    """Milliseconds per decode step and bytes of cache, base and result."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, name, label in zip(
        panels, ("ms_per_step", "cache_bytes"), ("ms per step", "bytes of cache"), strict=True
    ):
        axes.bar(["base", "result"], [facts["base"][name], facts["result"][name]], color=[GREY, KEY], width=0.5)
        axes.set(ylabel=label)
        _finished(figure, axes, legend=False)
    return figure


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element that takes the page's text colour."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )


def png(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150, facecolor="white")


def _panel():
    figure = Figure(figsize=(7, 3), layout="constrained")
    return figure, figure.subplots()


def _finished(figure: Figure, axes: Any, legend: bool = True) -> Figure:
    axes.tick_params(colors=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    if legend:
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    return figure
