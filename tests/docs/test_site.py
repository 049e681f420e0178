"""The site builds without a warning, and shows what it promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")
ROOT = Path(__file__).parents[2]


def test_the_site_builds_without_warnings(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    reference = (tmp_path / "reference" / "index.html").read_text(encoding="utf-8")
    for name in ("DHAConfig", "convert", "register_family", "evaluate_tasks", "Run"):
        assert f'id="dha_peft.{name}"' in reference or f'.{name}"' in reference
    assert "head_budget" in reference
    concepts = (tmp_path / "concepts" / "index.html").read_text(encoding="utf-8")
    figures = [part.split('"')[0] for part in concepts.split('src="../')[1:] if part.startswith("figures/")]
    assert len(figures) == 4 and all((tmp_path / name).is_file() for name in figures)
