"""`dha bench`: decode speed and cache memory of base and result on this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import options as o
from .console import banner, gib, note
from .env import versions
from .evaluate import Base
from .loading import device_of, load_model
from .measure import decode_speed
from .result import read_facts, write_facts
from .settings import load_run


def bench(
    result: o.Result,
    batch: Annotated[int, typer.Option("--batch", help="Sequences.")] = 1,
    context: Annotated[int, typer.Option("--context", help="Tokens in the cache before decoding starts.")] = 1024,
    steps: Annotated[int, typer.Option("--steps", help="Decode steps; the median is reported.")] = 16,
    base: Base = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
) -> None:
    """Measure decoding of base and result (eager, dynamic cache) here; figures go into the card and the report."""
    facts, own = read_facts(result), result / "run.yaml"
    run = load_run(own if own.is_file() else None, {"model": base, "device": device, "dtype": dtype})
    if min(batch, context, steps) < 1:
        raise ValueError(f"`--batch` {batch}, `--context` {context} and `--steps` {steps} must all be at least 1.")
    banner("bench", {"result": result, "device": device_of(run), "batch": batch, "context": context})
    speed: dict[str, Any] = {"batch": batch, "context": context, "steps": steps, "device": versions()["device"]}
    for name, path in (("base", run.model), ("result", str(result))):
        speed[name] = decode_speed(load_model(path, run), batch, context, steps)
        peak = speed[name].get("peak_bytes")
        text = f"  {name:7s} {speed[name]['ms_per_step']:8.2f} ms/step  cache {gib(speed[name]['cache_bytes'])}"
        note(text + (f"  peak {gib(peak)}" if peak else ""))
    facts["speed"] = speed
    write_facts(result, facts, run.report)
