"""The examples run as scripts, cut short, and leave what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import dha_peft  # noqa: F401  (registers the merged model types)

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *arguments: str) -> str:
    """Standard output of an example."""
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    ("script", "needs", "cut"),
    [
        ("train_with_trainer.py", ("datasets", "evaluate"), ["--rows", "32"]),
        ("train_with_trl.py", ("datasets", "trl"), ["--tokens", "4096"]),
        ("heal_with_lora.py", ("datasets",), ["--tokens", "8192"]),
    ],
)
def test_the_script_leaves_a_smaller_model(tmp_path, script, needs, cut):
    for package in needs:
        pytest.importorskip(package)
    out = run(script, "--steps", "3", "--out", str(tmp_path), *cut)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert sum(model.config.num_key_heads) + sum(model.config.num_value_heads) == 24
    if script == "train_with_trainer.py":
        base, fused = (float(out.split(name)[1].split()[0].strip(",.")) for name in ("base ", "fused "))
        assert 0.05 < fused < base < 1


def test_lm_eval_scores_base_and_result(tmp_path):
    pytest.importorskip("lm_eval")
    out = run("evaluate_with_lm_eval.py", "--documents", "48", "--tokens", "4096", "--out", str(tmp_path))
    base, small = (float(line.split("perplexity ")[1]) for line in out.splitlines() if "accuracy" in line)
    assert 1 < base < small
