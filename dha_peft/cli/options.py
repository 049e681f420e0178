"""The flags that commands share, and how they and a YAML file become one `Run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .loading import device_of, dtype_of
from .settings import Run, load_run, parse_assignment

Model = Annotated[str | None, typer.Argument(help="Local folder or hub id of the base model.", show_default=False)]
Result = Annotated[Path, typer.Argument(help="Folder that `dha convert` or `dha train` wrote.", show_default=False)]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write; must be new or empty.")]
Config = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file with a whole run; flags override it.")]
Budget = Annotated[float | None, typer.Option("--budget", "-b", help="Share of key and value heads to keep [0.25].")]
Text = Annotated[list[Path] | None, typer.Option("--text", help=".txt/.jsonl(.gz/.xz) to calibrate (and train) on.")]
Held = Annotated[list[Path] | None, typer.Option("--validation", help="Held-out text; losses are measured on it.")]
Tokens = Annotated[int | None, typer.Option("--tokens", help="Calibration tokens [131072].")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Any key of the run file, as in dha.damping=0.5.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, ... [auto: a GPU if there is one].")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, float16 [auto: the checkpoint's].")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, load no weights, write nothing.")]
Limit = Annotated[int | None, typer.Option("--limit", help="Cut every stage to this many batches, steps, documents.")]


def make_run(
    config: Path | None,
    assignments: list[str] | None,
    *,
    text: list[Path] | None = None,
    validation: list[Path] | None = None,
    **flags: Any,
) -> Run:
    """YAML, then `--set`, then the named flags (dots are written as two underscores)."""
    overrides = dict(parse_assignment(item) for item in assignments or [])
    overrides |= {name.replace("__", "."): value for name, value in flags.items() if value is not None}
    if text:
        overrides["calibration.files"] = [str(path) for path in text]
    if validation:
        overrides["validation.files"] = [str(path) for path in validation]
    if "output" in overrides:
        overrides["output"] = str(overrides["output"])
    run = load_run(config, overrides)
    # Checks come before any long work.
    run.config()
    device_of(run)
    dtype_of(run)
    return run
