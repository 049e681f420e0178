"""Where data that is too large for the repository lies: the folder that `DHA_SHARED_DATA` names, else one beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def shared_data(name: str) -> Path:
    """A file or folder of the shared data; skips the test where it is absent."""
    root = Path(os.environ.get("DHA_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (root / name).exists():
        pytest.skip(f"`{root / name}` is absent; set DHA_SHARED_DATA to the folder of the shared data.")
    return root / name
