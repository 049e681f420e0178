"""Draws the figures of `docs/concepts.md` from the embedded model: `python docs/make_figures.py` (a minute or two on a CPU)."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

from dha_peft import DHAConfig, analyse, convert
from dha_peft.cli.measure import head_similarity
from dha_peft.plan import LayerPlan
from dha_peft.report import figures
from dha_peft.texts import evaluate_loss, text_tokens, token_batches

HERE = Path(__file__).parent
OUT = HERE / "figures"
DEMO = HERE.parent / "examples" / "demo_model"
BUDGETS = (0.75, 0.5, 0.375, 0.25, 0.1875)


def main() -> None:
    OUT.mkdir(exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    base = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    batches = token_batches(tokenizer, [DEMO / "text" / "calibration.jsonl.xz"], tokens=32_768)
    held_out = text_tokens(tokenizer, [DEMO / "text" / "validation.jsonl.xz"], tokens=10_241)
    analysis = analyse(base, batches)
    plan = analysis.plan(DHAConfig(head_budget=0.25).search_options())
    row = next(row for row in head_similarity(analysis) if row["kind"] == "key")
    points = [{"model": "base", "budget": 1.0, "loss": evaluate_loss(base, held_out)}]
    for budget in BUDGETS:
        ours = convert(base, DHAConfig(head_budget=budget), analysis=analysis)
        pooled = DHAConfig(head_budget=budget, fusion="linear", grouping="contiguous", allocation="uniform")
        for name, model in (("dha", ours), ("mean-pooled GQA", convert(base, pooled, batches))):
            points.append({"model": name, "budget": budget, "loss": evaluate_loss(model, held_out)})
    figures.png(maps(plan.layers[3]), OUT / "maps.png")
    figures.png(figures.budgets(plan.to_dict()), OUT / "budgets.png")
    figures.png(figures.similarity(row), OUT / "similarity.png")
    figures.png(figures.quality(points), OUT / "quality.png")


def maps(layer: LayerPlan) -> Figure:
    """Query heads of one layer between the key heads and the value heads that they read."""
    figure = Figure(figsize=(6.2, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    queries = layer.num_heads
    sides = (("key heads", 2, layer.key_map(), figures.KEY), ("value heads", 0, layer.value_map(), figures.VALUE))
    for name, height, read, colour in sides:
        count = max(read) + 1
        places = [(index + 0.5) * queries / count for index in range(count)]
        for query, head in enumerate(read):
            axes.plot([query + 0.5, places[head]], [1, height], color=colour, alpha=0.6)
        axes.scatter(places, [height] * count, 420, color=colour, zorder=2)
        for head, place in enumerate(places):
            axes.annotate(str(head), (place, height), color="white", ha="center", va="center")
        axes.annotate(f"{name}\n(cached)", (-0.3, height), ha="right", va="center")
    axes.scatter([query + 0.5 for query in range(queries)], [1] * queries, 420, color=figures.GREY, zorder=2)
    for query in range(queries):
        axes.annotate(str(query), (query + 0.5, 1), color="white", ha="center", va="center")
    axes.annotate("query heads\n(all stay)", (-0.3, 1), ha="right", va="center")
    axes.set(xlim=(-2, queries), ylim=(-0.4, 2.4))
    return figure


if __name__ == "__main__":
    main()
