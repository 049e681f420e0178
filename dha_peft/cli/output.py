"""Output folders that are either whole or not there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .console import note


def check_free(target: str | Path, resume: bool = False) -> Path:
    """The target as a path, if a new result may be written there. Cheap, so it comes before any long work.

    Raises:
        ValueError: no target, a non-empty folder or a file in its place, or the leftovers of an unfinished run.
    """
    if not str(target):
        raise ValueError("no output folder is given; pass `--output FOLDER`, or set `output` in the run file.")
    target = Path(target)
    for parent in target.absolute().parents:
        if parent.is_file():
            raise ValueError(f"the output folder `{target}` would lie in `{parent}`, which is a file; choose another.")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"the output folder `{target}` is not empty; choose a new one, or remove it first.")
    partial = partial_folder(target)
    if partial.exists() and not resume:
        raise ValueError(
            f"`{partial}` holds an unfinished run; go on with `--resume` (train, sweep), or remove that folder first."
        )
    return target


def partial_folder(target: Path) -> Path:
    """The hidden sibling in which a result grows; a sibling, so that the last step is one rename."""
    target = target.absolute()
    return target.with_name(f".{target.name}.partial")


@contextmanager
def new_folder(target: str | Path, keep: bool = False, resume: bool = False) -> Iterator[Path]:
    """Yields the folder to write into; on success it becomes `target`. After an error it goes, or with `keep` stays for
    `--resume`."""
    target = check_free(target, resume)
    partial = partial_folder(target)
    partial.mkdir(parents=True, exist_ok=resume)
    try:
        yield partial
    except BaseException as stop:
        if keep and any(partial.iterdir()):
            note(f"Stopped; what is done lies in {partial}, and the same command with --resume goes on from there.")
        else:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(stop, KeyboardInterrupt):
                note("Interrupted; nothing was written.")
        raise
    if target.is_dir():
        target.rmdir()
    partial.rename(target)


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: a reader sees the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
