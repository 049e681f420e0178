"""`dha plan`: what a budget would do to a model, without changing any weight."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..attention import find_attention
from ..plan import DHAPlan
from . import options as o
from .console import banner, gib, lines, note, parse_size
from .estimate import conversion_memory, conversion_seconds, serving, uniform_plan
from .loading import (
    calibration_batches,
    check_files,
    check_grouping,
    device_of,
    dtype_of,
    given_plan,
    load_config,
    load_model,
    load_tokenizer,
    skeleton,
)
from .settings import Run

Memory = Annotated[str | None, typer.Option("--memory", help="GPU memory, such as 24GB: what fits before and after.")]
Context = Annotated[int, typer.Option("--context", help="Tokens per sequence for the largest batch.")]
Search = Annotated[bool, typer.Option("--search", help="Load the weights and search (also with --text).")]


def plan(
    model: o.Model = None,
    budget: o.Budget = None,
    text: o.Text = None,
    tokens: o.Tokens = None,
    search: Search = False,
    memory: Memory = None,
    context: Context = 4096,
    config: o.Config = None,
    set_: o.Set = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    limit: o.Limit = None,
) -> None:
    """Per-layer heads, KV bytes per token, what fits a GPU, time and memory. Weights are not changed.

    A config alone is enough; then every layer gets equal counts. With --search or --text the weights are loaded and the counts follow from them.
    """
    run = o.make_run(
        config, set_, text=text, model=model, dha__head_budget=budget, calibration__tokens=tokens,
        device=device, dtype=dtype, limit=limit,
    )  # fmt: skip
    show_plan(run, search or bool(text), memory, context)


def show_plan(run: Run, search: bool = False, memory: str | None = None, context: int = 4096) -> DHAPlan:
    """Print the plan of a run; see `plan`."""
    check_files(run)
    if search:
        check_grouping(run)
    if context < 1:
        raise ValueError(f"`--context` is {context}; give at least one token per sequence.")
    room = parse_size(memory) if memory else None
    config = load_config(run.model)
    model = skeleton(config)
    sites, options = find_attention(model), run.config().search_options()
    width = (dtype_of(run) or getattr(config, "dtype", None) or _bfloat16()).itemsize
    given = given_plan(run, model)
    budget = options.head_budget if given is None else "as in `dha.plan`"
    banner("plan", {"model": f"{run.model} ({config.model_type})", "budget": budget})
    found = given or (_searched(run) if search else uniform_plan(sites, options))
    if given is None and not search:
        note(
            "  budgets    uniform over the layers, as no weights were read; --search or --text FILE finds each layer's own"
        )
    note(found.table(width))
    before, after = serving(model, sites, found, width)
    lines({"weights": f"{gib(before.weights)} -> {gib(after.weights)} at {width} bytes per number"})
    if room:
        pairs = [(s.longest_context(room), s.largest_batch(room, context)) for s in (before, after)]
        lines({
            f"longest context in {gib(room)}": f"{pairs[0][0]:,} -> {pairs[1][0]:,} tokens (one sequence{_positions(config)})",
            f"largest batch at {context:,} tokens": f"{pairs[0][1]:,} -> {pairs[1][1]:,}",
        })  # fmt: skip
    where, count = device_of(run), run.calibration.tokens
    seconds = conversion_seconds(model, sites, count, where)
    lines({
        "conversion, memory": f"about {gib(conversion_memory(model, sites, width))}",
        "conversion, time": f"about {_duration(seconds)} on {where} with {count:,} calibration tokens (rough)",
    })  # fmt: skip
    return found


def _positions(config: Any) -> str:
    """What memory alone does not say."""
    positions = getattr(config, "max_position_embeddings", None)
    return f"; the model was made for {positions:,}" if positions else ""


def _searched(run: Run) -> DHAPlan:
    from ..search import analyse

    config = run.config()
    batches = calibration_batches(run, load_tokenizer(run.model))
    return analyse(load_model(run.model, run), batches, config.grouping).plan(config.search_options())


def _bfloat16():
    import torch

    return torch.bfloat16


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
