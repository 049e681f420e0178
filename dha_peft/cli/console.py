"""What a command prints: a banner at the start, `key: value` lines, one line per error."""

from __future__ import annotations

from typing import Any

import typer


def banner(title: str, facts: dict[str, Any]) -> None:
    """The start of a command: what will be done, on what, where to."""
    typer.secho(f"dha {title}", bold=True)
    lines({name: value for name, value in facts.items() if value not in (None, "", [])})


def lines(facts: dict[str, Any]) -> None:
    width = max((len(name) for name in facts), default=0)
    for name, value in facts.items():
        typer.echo(f"  {name:{width}s}  {value}")


def note(text: str) -> None:
    typer.echo(text)


def error(text: str) -> None:
    typer.secho(f"error: {text}", fg=typer.colors.RED, err=True)


def gib(number: float) -> str:
    """Bytes as a person reads them."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B"


def parse_size(text: str) -> int:
    """`24GB`, `80GiB` or `24` (GiB) in bytes.

    Raises:
        ValueError: anything else.
    """
    units = {"": 2**30, "g": 2**30, "gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6, "tb": 10**12, "tib": 2**40}
    digits = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text.strip()[len(digits) :].strip().lower()
    try:
        return int(float(digits) * units[unit])
    except (KeyError, ValueError):
        raise ValueError(f"`--memory` is {text!r}; write a size such as 24GB or 80GiB.") from None
