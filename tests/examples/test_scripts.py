"""The examples run as scripts, cut short, and leave a merged model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import dha_peft  # noqa: F401  (registers the merged model types)

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("script", "cut"),
    [("train_with_trainer.py", ["--rows", "32"]), ("heal_with_lora.py", ["--tokens", "8192"])],
)
def test_the_script_leaves_a_smaller_model(tmp_path, script, cut):
    pytest.importorskip("datasets")
    command = [sys.executable, str(EXAMPLES / script), "--steps", "3", "--out", str(tmp_path), *cut]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert sum(model.config.num_key_heads) + sum(model.config.num_value_heads) == 24
