"""Writes the table in `docs/families.md` from the table of families: `python docs/make_families.py`."""

from __future__ import annotations

import ast
from pathlib import Path

from dha_peft.models import families
from dha_peft.models.families import ROWS, Family

PAGE = Path(__file__).with_name("families.md")
START, END = "<!-- table: made by docs/make_families.py -->\n", "<!-- end of table -->\n"

PACKING = {
    "separate": "separate",
    "heads": "fused, per head",
    "blocks": "fused, in blocks",
    "codegen": "fused, in four blocks",
}
POSITION = {"half": "RoPE, half-split", "interleaved": "RoPE, interleaved", "none": "none on the keys"}
NORM = {"": "", "head_rms": "RMSNorm per head", "head_layer": "LayerNorm per head", "all_rms": "RMSNorm over all heads"}


def kind(family: Family) -> str:
    """What the merged model is for."""
    roles = {role for part in family.parts() for role in part.attention.values()}
    return "encoder" if roles == {"encoder"} else "encoder-decoder" if "cross" in roles else "decoder"


def reads(family: Family) -> str:
    """What a decode step reads."""
    if kind(family) == "encoder":
        return "(no cache)"
    return "un-expanded heads" if family.dispatch or family.core else "all heads"


def row(family: Family) -> str:
    """One line of the table."""
    names = dict.fromkeys((family.q, family.k, family.v, family.o))
    cells = [
        f"`{family.model_type}`",
        kind(family),
        ", ".join(f"`{name}`" for name in names),
        PACKING[family.packing],
        POSITION[family.position],
        NORM[family.key_norm],
        reads(family),
    ]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """The table with its head, and how long its rows are."""
    head = "| model type | kind | projections | layout | positions | key norm | decode reads |\n|---|---|---|---|---|---|---|\n"
    lines = row_lines()
    sizes = f"{len(lines)} families: {lines.count(1)} rows of one line of code, the longest of {max(lines)}."
    return head + "\n".join(map(row, ROWS)) + f"\n\n{sizes}\n"


def row_lines() -> list[int]:
    """Lines of code of each row."""
    tree = ast.parse(Path(families.__file__).read_text())
    rows = next(n.value for n in tree.body if isinstance(n, ast.AnnAssign) and n.target.id == "ROWS")
    return [call.end_lineno - call.lineno + 1 for call in rows.elts]


def with_table(page: str) -> str:
    """The page with a fresh table between its two markers."""
    before, rest = page.split(START)
    return before + START + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
