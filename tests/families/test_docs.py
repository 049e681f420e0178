"""The table in the docs is the table of families."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from dha_peft.models.families import ROWS

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_table_is_current():
    spec = importlib.util.spec_from_file_location("make_families", DOCS / "make_families.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (DOCS / "families.md").read_text()
    assert script.with_table(page) == page, "run `python docs/make_families.py`"
    assert page.count("\n| `") == len(ROWS)
