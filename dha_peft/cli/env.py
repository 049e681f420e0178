"""`dha env`: versions, for a bug report."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

from .console import banner, lines

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "triton",
    "datasets",
    "trl",
    "lm_eval",
    "matplotlib",
)


def env() -> None:
    """Print the versions of everything that matters in a bug report."""
    banner("env", {})
    lines(versions())


def versions() -> dict[str, str]:
    """Package to version, and the machine; "-" where something is not installed."""
    import torch

    from .. import __version__

    found = {"dha_peft": __version__, "python": sys.version.split()[0], "platform": platform.platform()}
    found |= {name: _version(name) for name in PACKAGES}
    cuda = torch.cuda.is_available()
    found["device"] = torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads"
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "-"
