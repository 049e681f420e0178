"""The notebook runs from top to bottom in a kernel of its own, and fuses something."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (tmp_path / "demo_model").symlink_to(NOTEBOOK.parent / "demo_model")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    text = "\n".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) == 2
    base, pooled, ours = (
        float(re.search(rf"^{name} +(\d+\.\d+)", text, re.M)[1]) for name in ("base", "averaged.*?", "dha, .*?")
    )
    before, after = map(float, re.search(r"collapse ([\d.]+), after it ([\d.]+)", text).groups())
    assert base < after < ours < pooled and abs(after - before) < 1e-3
    sizes = [int(size.replace(",", "")) for size in re.findall(r"([\d,]+) bytes of cache", text)]
    assert sizes[0] == 4 * sizes[1]
