"""Every `dha` command of the README runs, in order, as a new user would run them (cut short)."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from dha_peft.cli import main
from dha_peft.cli.settings import load_run
from dha_peft.texts import token_batches

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CUT = [
    "--limit",
    "1",
    "--set",
    "train.length=64",
    "--set",
    "calibration.tokens=4096",
    "--set",
    "sweep.budgets=[0.5, 0.25]",
]


def block(language, text=README):
    return re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)[1]


def test_every_command_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    commands = [shlex.split(line)[1:] for line in block("sh").splitlines()]
    assert {c[0] for c in commands} == {"plan", "convert", "eval", "bench", "train", "sweep", "export", "push", "env"}
    for command in commands:
        cut = CUT if command[0] in ("convert", "train", "sweep", "eval") else []
        try:
            main([*command, *cut])
        except SystemExit as stop:
            assert not stop.code, command
    assert (tmp_path / "outputs/small/report.html").is_file() and (tmp_path / "outputs/merged/config.json").is_file()
    assert (tmp_path / "outputs/sweep/report.html").is_file()


def test_the_run_file_is_valid(tmp_path):
    (tmp_path / "run.yaml").write_text(block("yaml"))
    assert load_run(tmp_path / "run.yaml").train.arguments == {"gradient_accumulation_steps": 2}


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_python_code_runs(tmp_path, monkeypatch, page):
    """As it stands, but for the model's name and the upload, which has a test of its own."""
    monkeypatch.chdir(tmp_path)
    demo = ROOT / "examples" / "demo_model"
    lines = block("python", (ROOT / page).read_text(encoding="utf-8")).replace("path/or/id", str(demo)).splitlines()
    tokenizer = AutoTokenizer.from_pretrained(demo)
    batches = token_batches(tokenizer, [demo / "text" / "calibration.jsonl.xz"], tokens=1024, length=128)
    given = {
        "batches": batches, "rows": batches[0]["input_ids"][:8], "base": AutoModelForCausalLM.from_pretrained(demo, dtype="float32"),
        "data": [{"input_ids": row, "labels": row} for row in batches[0]["input_ids"]],
        "args": TrainingArguments("out", max_steps=2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True),
    }  # fmt: skip
    exec("\n".join(line for line in lines if "push_to_hub" not in line), given)
    assert sum(given["small"].config.num_key_heads + given["small"].config.num_value_heads) == 24
    if page == "README.md":
        assert type(given["merged"]).__name__ == "DhaLlamaForCausalLM"
