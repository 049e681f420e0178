"""From the facts of a result to report.html: no file beside it is needed to read it, and no network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from . import figures


@dataclass
class Section:
    """One part of the page: figures by file name under a title, and a sentence that says what they show."""

    title: str
    caption: str
    figures: dict[str, Figure]
    names: dict[str, str] = field(default_factory=dict)
    """What each figure shows, where there are several."""
    svgs: dict[str, str] = field(default_factory=dict)


def write_report(folder: str | Path, facts: dict[str, Any], run_yaml: str | None = None) -> Path:
    """Write report.html and figures/*.png into a result's folder; sections without facts are left out."""
    folder = Path(folder)
    sections = list(_sections(facts))
    (folder / "figures").mkdir(exist_ok=True)
    for section in sections:
        for name, figure in section.figures.items():
            figures.png(figure, folder / "figures" / f"{name}.png")
            section.svgs[name] = figures.svg(figure, name)
    environment = Environment(loader=PackageLoader("dha_peft.report"), autoescape=True)
    page = environment.get_template("report.html.j2").render(
        facts=facts, sections=sections, tiles=list(_tiles(facts)), run_yaml=run_yaml
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def quality_points(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Points `{model, budget, loss}` of a sweep, or of one conversion with its references."""
    if facts.get("sweep"):
        return [row for row in facts["sweep"] if row["loss"] is not None]
    names = {"base": ("base", 1.0), "mean-pooled GQA, no training": ("mean-pooled GQA", facts["budget"])}
    found = []
    for name, loss in facts.get("losses", {}).items():
        model, budget = names.get(name, (name, facts["budget"]))
        found.append({"model": model, "budget": budget, "loss": loss})
    return found


def _tiles(facts: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What a reader wants to know first: a name, a figure, and what to compare it with."""
    kv = facts.get("kv_bytes_measured") or (facts.get("kv_bytes") if facts.get("plan") else None)
    if kv:
        yield (
            "KV cache per token",
            f"{kv['after']:,} bytes",
            f"base: {kv['before']:,}, kept: {kv['after'] / kv['before']:.1%}",
        )
    losses = facts.get("losses", {})
    if len(losses) > 1 and "base" in losses:
        loss = list(losses.values())[-1]
        yield "Loss", f"{loss:.4f}", f"base: {losses['base']:.4f} ({loss - losses['base']:+.4f} nats/token)"
    if facts.get("speed"):
        base, result = (facts["speed"][side]["ms_per_step"] for side in ("base", "result"))
        yield "Decode step", f"{result:.4g} ms", f"base: {base:.4g} ms"
    tokens = [facts.get(f"{kind}_tokens") or 0 for kind in ("calibration", "training")]
    if any(tokens):
        yield "Tokens used", f"{sum(tokens):,}", f"calibration: {tokens[0]:,}, training: {tokens[1]:,}"


def _sections(facts: dict[str, Any]) -> Iterator[Section]:
    if facts.get("plan"):
        caption = "Heads that each layer keeps. Keys and values have counts of their own; all query heads stay."
        yield Section("Budgets by layer", caption, {"budgets": figures.budgets(facts["plan"])})
    if quality_points(facts):
        caption = "Loss on held-out text against the share of key and value heads that is kept; lower is better."
        yield Section("Quality against KV kept", caption, {"quality": figures.quality(quality_points(facts))})
    if facts.get("similarity"):
        yield _similarity(facts["similarity"])
    if facts.get("fusion"):
        parts = {"fusion-loss": ("fusion_loss", "target"), "fusion-multipliers": ("lambda1", "lambda2")}
        drawn = {n: figures.curves(facts["fusion"], keys, n.split("-")[1]) for n, keys in parts.items()}
        caption = "How far the heads of a group are from one head, the target that falls to zero, and the multipliers of the augmented Lagrangian."
        yield Section("Fusion", caption, drawn)
    if facts.get("speed"):
        yield _speed(facts["speed"])


def _similarity(rows: list[dict[str, Any]]) -> Section:
    names = {f"similarity-{row['kind']}-{row['layer']}": f"{row['kind']} heads of layer {row['layer']}" for row in rows}
    caption = "Heads against heads of the base: the cosine of their weights as they are stored (raw), and once they are turned into a common frame (aligned), which changes nothing about the model."
    return Section("Head similarity", caption, dict(zip(names, map(figures.similarity, rows), strict=True)), names)


def _speed(speed: dict[str, Any]) -> Section:
    caption = f"Eager decoding, batch {speed['batch']}, {speed['context']} tokens of context, on {speed['device']}."
    steps, cache = ([speed[side][key] for side in ("base", "result")] for key in ("ms_per_step", "cache_bytes"))
    drawn = {"speed-step": figures.pair(steps, "ms per step")}
    drawn["speed-cache"] = figures.pair([size / 2**20 for size in cache], "MiB of cache")
    return Section("Decoding", caption, drawn)
