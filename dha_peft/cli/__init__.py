"""The `dha` command. Every command is a thin file that calls the rooms of the package."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from transformers.utils import logging as transformers_logging

from . import console
from .bench import bench
from .convert import convert
from .env import env, versions
from .evaluate import evaluate
from .export import export
from .plan import plan
from .push import push
from .sweep import sweep
from .train import train

app = typer.Typer(
    name="dha",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dha_peft {versions()['dha_peft']}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Turn a pretrained multi-head-attention model into one that keeps fewer key heads and value heads."""


COMMANDS: dict[str, Callable[..., None]] = {
    "plan": plan,
    "convert": convert,
    "train": train,
    "eval": evaluate,
    "bench": bench,
    "sweep": sweep,
    "export": export,
    "push": push,
    "env": env,
}
for name, command in COMMANDS.items():
    app.command(name)(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a bad input is one line on stderr and exit status 1."""
    warnings.showwarning = _show_warning
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        app(args=arguments)
    except (ValueError, TypeError, OSError, ImportError) as error:
        console.error(" ".join(str(error).split()))
        sys.exit(1)
    except torch.OutOfMemoryError as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        console.error(f"{reason}; `dha plan` says what a conversion takes, and --device cpu works in main memory.")
        sys.exit(1)


def _show_warning(message, category, *_args, **_kwargs) -> None:
    """One line each, and only what users can act on."""
    if issubclass(category, UserWarning) and not issubclass(category, (DeprecationWarning, FutureWarning)):
        typer.secho(f"warning: {message}", fg=typer.colors.YELLOW, err=True)
