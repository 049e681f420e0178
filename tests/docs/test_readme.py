"""Every `dha` command of the README runs, in order, as a new user would run them (cut short)."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from dha_peft.cli import main
from dha_peft.cli.settings import load_run

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


def block(language):
    return re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)[1]


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
