"""`dha train`: fusion, collapse and healing from one command, and going on after a kill."""

from __future__ import annotations

import json
import sys

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dha_peft.cli.output import partial_folder

from .conftest import CALIBRATION, DEMO, VALIDATION

SMALL = [
    "--text",
    CALIBRATION,
    "--limit",
    4,
    "--set",
    "train.length=64",
    "--set",
    "train.tokens=20000",
    "--set",
    "report=false",
]
SMALL += ["--set", "calibration.tokens=4096"]


def test_fusion_and_healing_write_a_result(dha, tmp_path):
    out = tmp_path / "out"
    arguments = ["train", DEMO, "-o", out, "--validation", VALIDATION, "--steps", 4, "--heal-steps", 2, *SMALL]
    status, text, err = dha(*arguments)
    assert status == 0, err
    facts = json.loads((out / "results.json").read_text())
    names = [
        "base",
        "mean-pooled GQA, no training",
        "after fusion, before the collapse",
        "after the collapse",
        "after healing",
    ]
    assert list(facts["losses"]) == names and len(facts["fusion"]) == 4 and facts["training_tokens"] == 6 * 8 * 64
    assert {(row["layer"], row["kind"]) for row in facts["similarity"]} == {
        (i, k) for i in (0, 5) for k in ("key", "value")
    }
    assert facts["losses"]["after healing"] < facts["losses"]["after the collapse"]
    assert type(AutoModelForCausalLM.from_pretrained(out)).__name__ == "DhaLlamaForCausalLM"
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(DEMO), out / "adapter")
    assert not (out / "fusion").exists() and not partial_folder(out).exists()
    assert dha("export", out / "adapter", "-o", tmp_path / "merged")[0] == 0


def test_a_killed_run_goes_on(dha, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = ["train", DEMO, "-o", out, "--steps", 2, "--heal-steps", 1, *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["dha_peft.cli.train"], "heal", _kill)
        status, text, _ = dha(*arguments)
        assert status == 130 and "--resume goes on" in text
    assert not out.exists() and (partial_folder(out) / "adapter").is_dir()
    status, _, err = dha(*arguments)
    assert status == 1 and "--resume" in err
    assert dha(*arguments, "--resume")[0] == 0 and (out / "results.json").is_file()


def _kill(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", 0], "not both 0"),
        (["--set", "train.objective=else"], "`train.objective`"),
        (["--set", "calibration.files=[]"], "no text to train on"),
    ],
    ids=str,
)
def test_bad_training_input(dha, tmp_path, arguments, words):
    text = [] if "no text" in words else ["--text", CALIBRATION]
    status, _, err = dha("train", DEMO, "-o", tmp_path / "out", *text, *arguments)
    assert status == 1 and words in err
