"""From the facts of a result to report.html: no file beside it is needed to read it, and no network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from . import figures


@dataclass
class Section:
    """One part of the page: a figure with a title and a sentence that says what it shows."""

    name: str
    title: str
    caption: str
    figure: Figure
    svg: str = ""


def write_report(folder: str | Path, facts: dict[str, Any]) -> Path:
    """Write report.html and figures/*.png into a result's folder; sections without facts are left out."""
    folder = Path(folder)
    sections = list(_sections(facts))
    (folder / "figures").mkdir(exist_ok=True)
    for section in sections:
        figures.png(section.figure, folder / "figures" / f"{section.name}.png")
        # Ids inside a figure must be unique on the page.
        section.svg = figures.svg(section.figure).replace('id="', f'id="{section.name}-').replace("#", "\0")
        section.svg = section.svg.replace('href="\0', f'href="\0{section.name}-').replace(
            "url(\0", f"url(\0{section.name}-"
        )
        section.svg = section.svg.replace("\0", "#")
    environment = Environment(loader=PackageLoader("dha_peft.report"), autoescape=True)
    page = environment.get_template("report.html.j2").render(facts=facts, sections=sections)
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


def _sections(facts: dict[str, Any]) -> Iterator[Section]:
    if facts.get("plan"):
        caption = "Heads that each layer keeps; keys and values have counts of their own."
        yield Section("budgets", "Budgets by layer", caption, figures.budgets(facts["plan"]))
    if quality_points(facts):
        caption = "Loss on held-out text against the share of the KV cache that is kept; lower is better."
        yield Section("quality", "Quality against KV kept", caption, figures.quality(quality_points(facts)))
    if facts.get("similarity"):
        caption = "How alike heads of the base are: the cosine of their weights (raw), and once they are turned into a common frame (aligned)."
        yield Section("similarity", "Head similarity", caption, figures.similarity(facts["similarity"]))
    if facts.get("fusion"):
        caption = "Fusion loss and its target (left), multipliers of the augmented Lagrangian (right)."
        yield Section("fusion", "Fusion", caption, figures.trajectory(facts["fusion"]))
    if facts.get("speed"):
        speed = facts["speed"]
        caption = f"Eager decoding, batch {speed['batch']}, {speed['context']} tokens of context, on {speed['device']}."
        yield Section("speed", "Decoding", caption, figures.speed(speed))
