"""A result folder: the model, its plan, run.yaml, results.json, the card and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from ..card import write_card
from ..plan import DHAPlan
from .console import note
from .env import versions
from .loading import held_out
from .output import write_text
from .settings import Run

RESULTS = "results.json"


def facts_of(run: Run, base: nn.Module, plan: DHAPlan) -> dict[str, Any]:
    """What every result records; commands add losses, logs, scores and speed."""
    config = run.config()
    before, after = plan.kv_bytes_per_token(next(base.parameters()).element_size())
    return {
        "base": run.model,
        "model_type": base.config.model_type,
        "parameters": sum(p.numel() for p in base.parameters()),
        "budget": plan.kept,
        "method": {
            name: getattr(config, name) for name in ("fusion", "grouping", "allocation", "damping", "key_weight")
        },
        "kv_bytes": {"before": before, "after": after},
        "plan": plan.to_dict(),
        "losses": {},
        "held_out": held_out(run),
        "versions": versions(),
    }


def save_result(folder: Path, run: Run, model: nn.Module, tokenizer: Any, facts: dict[str, Any]) -> None:
    """Write everything that belongs to a result into `folder`."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_text(folder / "run.yaml", run.yaml())
    write_facts(folder, facts, run.report)


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts of a result.

    Raises:
        ValueError: the folder is not a result.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise ValueError(f"`{folder}` has no {RESULTS}; give a folder that `dha convert` or `dha train` wrote.")
    return json.loads(path.read_text(encoding="utf-8"))


def write_facts(folder: Path, facts: dict[str, Any], report: bool = True) -> None:
    """Write the facts, and from them the card and the report, anew."""
    write_text(folder / RESULTS, json.dumps(facts, indent=1) + "\n")
    run = folder / "run.yaml"
    text = run.read_text(encoding="utf-8") if run.is_file() else None
    # A sweep has no model of its own, and so no plan and no card.
    if "plan" in facts and not write_card(folder, facts, text):
        note(f"{folder / 'README.md'} was edited by hand and stays as it is; the figures are in {RESULTS}.")
    if report:
        try:
            from ..report import write_report
        except ImportError:
            note("no report: it needs matplotlib and jinja2; `pip install 'dha_peft[report]'`.")
            return
        write_report(folder, facts, text)


def copy_config(config: Path | None, folder: Path) -> None:
    """Keep the YAML file as the user wrote it, beside run.yaml, which has every default and flag."""
    if config is not None:
        write_text(folder / "run.input.yaml", config.read_text(encoding="utf-8"))
