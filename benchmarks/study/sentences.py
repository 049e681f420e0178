"""Sentences of the study's captions, with their numbers from the CSV files."""

from __future__ import annotations

from .methods import BARS, MAIN, METHODS, STEP_TOKENS
from .rows import MISSING, Row, distinct, share, spread, tokens_to_reach, undivided, where


def speed(rows: list[Row]) -> str:
    """How many times the tokens GQA needs for our loss at 0.25 %."""
    parts = []
    for budget in sorted((b for b in distinct(rows, "budget") if b < 1), reverse=True):
        ours = spread(where(rows, method="aligned", budget=budget, fraction=0.0025, share=METHODS["aligned"].share))
        if ours is None or not where(rows, method="gqa", budget=budget):
            continue
        needed = tokens_to_reach(rows, "gqa", budget, ours.mean)
        most = max(distinct(where(rows, method="gqa", budget=budget), "fraction"))
        times = (
            f"{needed / 0.0025:.1f} times as many"
            if needed
            else f"more than {most / 0.0025:.0f} times as many ({share(most)} were not enough)"
        )
        parts.append(f"at {share(budget)} of the heads {times}")
    return f"For our loss at 0.25 % of the tokens GQA needs {'; '.join(parts)}." if parts else MISSING


def adaptive(rows: list[Row]) -> str:
    """In how many cells adaptive budgets are better than equal ones, and where they are not."""
    gains = {}
    steps = {STEP_TOKENS * count for count in (0, *BARS)}
    for budget, tokens in {(r["budget"], r["tokens"]) for r in where(rows, method="uniform", share=0.0)}:
        cells = [spread(where(rows, method=m, budget=budget, tokens=tokens, share=0.0)) for m in ("uniform", "aligned")]
        if all(cells) and tokens in steps:
            gains[budget, tokens] = cells[0].mean - cells[1].mean
    if not gains:
        return MISSING
    worse = [
        f"at {share(budget)} of the heads after {tokens / 1e6:.1f} M tokens they are worse by {-gain:.4f}"
        for (budget, tokens), gain in sorted(gains.items(), reverse=True)
        if gain < 0
    ]
    better = f"Adaptive budgets are better than equal ones in {len(gains) - len(worse)} of {len(gains)} cells"
    return f"{better}; {'; '.join(worse)}." if worse else f"{better}."


def unfused(rows: list[Row]) -> str:
    """What keeping one member of each group costs after the most tokens that it was trained on."""
    own = [r for r in where(rows, method="one-member") if r["fraction"]]
    if not own:
        return MISSING
    last = max(own, key=lambda r: r["fraction"])
    cell = {name: last[name] for name in ("budget", "fraction", "share")}
    losses = (spread(where(rows, method=name, **cell)) for name in ("one-member", "aligned"))
    left, fused = (f"{loss.mean:.3f}" if loss else MISSING for loss in losses)
    return f"After {share(cell['fraction'])} of the tokens it reaches {left}, the default {fused}."


def retained(rows: list[Row]) -> str:
    """Mean score against the base's, at 25 % of the heads and 0.25 % of the tokens."""
    rows = undivided(where(rows, metric="acc"))
    base = spread(where(rows, method="base"), "value")
    parts = []
    for name in MAIN:
        found = spread(where(rows, method=name, budget=0.25, fraction=0.0025), "value")
        if base and found:
            parts.append(f"{METHODS[name].label} {100 * found.mean / base.mean:.1f} %")
    return "; ".join(parts) or MISSING


def similarity(rows: list[Row]) -> str:
    """Mean similarity of different heads, raw and aligned."""
    parts = []
    for layer in distinct(rows, "layer"):
        for kind in ("key", "value"):
            own = [r for r in where(rows, layer=layer, kind=kind) if r["i"] != r["j"]]
            raw, aligned = (spread(where(own, measure=m), "similarity").mean for m in ("raw", "aligned"))
            parts.append(f"{kind} heads of layer {layer:.0f} {raw:.2f} raw and {aligned:.2f} aligned")
    return f"Mean over pairs of different heads: {', '.join(parts)}."


def redundancy(rows: list[Row]) -> str:
    """Means over layers."""
    parts = []
    for kind in ("query", "key", "value"):
        values = (spread(where(rows, kind=kind, measure=m), "nearest").mean for m in ("raw", "CKA", "aligned"))
        parts.append(f"{kind} heads " + " / ".join(f"{v:.2f}" for v in values))
    return f"Means over all layers (raw / CKA / aligned): {', '.join(parts)}."


def caches(rows: list[Row]) -> str:
    """What quantization costs every model, and what the base's own smaller caches lose at a fused model's bytes."""
    models = [(m, b) for m in distinct(rows, "method") for b in distinct(where(rows, method=m), "budget")]
    cells = {model: {r["cache"]: r for r in where(rows, method=model[0], budget=model[1])} for model in models}
    costs = [
        f"{bits} cost "
        + ", ".join(f"{own[bits]['loss'] - own['full']['loss']:+.3f} at {share(b)}" for (_, b), own in cells.items())
        for bits in ("4 bits", "2 bits")
    ]
    base, best = cells["base", 1.0], []
    for (method, budget), own in cells.items():
        small = [r for r in base.values() if r["bytes_per_token"] <= own["full"]["bytes_per_token"]]
        if method != "base" and small:
            found = min(small, key=lambda r: r["loss"])
            best.append(
                f"{share(budget)} of the heads {own['full']['loss']:.3f}, the base with {found['cache']} {found['loss']:.3f}"
            )
    return f"{'; '.join(costs)} of the heads. Where a fused model's full cache and the base's cache are about as small: {'; '.join(best)}."


def budgets(rows: list[Row]) -> str:
    """Fewest and most heads under each rule."""
    names = {"uniform": "equal", "undamped": "by sensitivity alone", "aligned": "by default"}
    parts = []
    for rule, label in names.items():
        own = where(rows, rule=rule)
        keys, values = (_range([int(r[kind]) for r in own]) for kind in ("keys", "values"))
        parts.append(f"{label}: {keys} key heads and {values} value heads")
    return f"Heads kept per layer at {share(rows[0]['budget'])}, {'; '.join(parts)}."


def _range(counts: list[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
