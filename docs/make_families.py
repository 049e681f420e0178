"""Writes the table in `docs/families.md` from the table of families: `python docs/make_families.py`."""

from __future__ import annotations

from pathlib import Path

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


def row(family: Family) -> str:
    """One line of the table."""
    names = dict.fromkeys((family.q, family.k, family.v, family.o))
    cells = [
        f"`{family.model_type}`",
        ", ".join(f"`{name}`" for name in names),
        PACKING[family.packing],
        POSITION[family.position],
        NORM[family.key_norm],
        "un-expanded heads" if family.dispatch else "all heads",
    ]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """The table with its head."""
    head = "| model type | projections | layout | positions | key norm | attention reads |\n|---|---|---|---|---|---|\n"
    return head + "\n".join(map(row, ROWS)) + "\n"


def with_table(page: str) -> str:
    """The page with a fresh table between its two markers."""
    before, rest = page.split(START)
    return before + START + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
