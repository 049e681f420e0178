"""`dha train`: fusion, collapse and healing from one command, and going on after a kill."""

from __future__ import annotations

import json

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dha_peft.cli.arguments import check_run, healing_arguments
from dha_peft.cli.output import partial_folder
from dha_peft.cli.settings import Run, Training
from dha_peft.training import DHATrainer

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
    """Killed at the second healing step; the first one's checkpoint and the adapter are taken, and no step is done twice."""
    out, done, killed = tmp_path / "out", [], []
    arguments = ["train", DEMO, "-o", out, "--steps", 2, "--heal-steps", 2, "--set", "train.arguments.save_steps=1"]
    arguments += SMALL
    compute_loss = DHATrainer.compute_loss

    def kill_once(trainer, *args, **options):
        stage, step = "fusion" if trainer.teacher is None else "healing", trainer.state.global_step
        if (stage, step) == ("healing", 1) and not killed:
            killed.append(step)
            raise KeyboardInterrupt
        done.append((stage, step))
        return compute_loss(trainer, *args, **options)

    monkeypatch.setattr(DHATrainer, "compute_loss", kill_once)
    status, text, _ = dha(*arguments)
    assert status == 130 and "--resume goes on" in text
    assert not out.exists() and (partial_folder(out) / "adapter").is_dir()
    status, _, err = dha(*arguments)
    assert status == 1 and "--resume" in err
    assert dha(*arguments, "--resume")[0] == 0 and (out / "results.json").is_file()
    assert done == [("fusion", 0), ("fusion", 1), ("healing", 0), ("healing", 1)]


def test_healing_takes_what_the_run_sets():
    usual = {"lr_scheduler_type": "a", "lr_scheduler_kwargs": {"b": 1}, "warmup_steps": 7, "adam_beta2": 0.95, "c": 0}
    usual["weight_decay"] = 0.0
    part = Training(arguments={"warmup_steps": 3, "bf16": False}, heal_arguments={"adam_beta2": 0.9})
    wanted = {"lr_scheduler_type": "a", "lr_scheduler_kwargs": {"b": 1}, "weight_decay": 0.0, "adam_beta2": 0.9}
    assert healing_arguments(part, usual) == wanted
    # Another scheduler has no use for the usual one's options.
    part = Training(arguments={"lr_scheduler_type": "linear"})
    assert healing_arguments(part, usual) == {"warmup_steps": 7, "adam_beta2": 0.95, "weight_decay": 0.0}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", 0], "not both 0"),
        (["--set", "train.objective=else"], "`train.objective`"),
        (["--set", "calibration.files=[]"], "no text to train on"),
        (["--set", "train.arguments.learning_rate=1"], "`train.learning_rate` and `train.heal_learning_rate`"),
        (["--set", "train.heal_arguments.max_steps=1"], "`train.steps` and `train.heal_steps`"),
        (["--steps", 0, "--heal-steps", 1, "--set", "dha.grouping=learned"], "`dha.grouping`"),
    ],
    ids=str,
)
def test_bad_training_input(dha, tmp_path, arguments, words):
    text = [] if "no text" in words else ["--text", CALIBRATION]
    status, _, err = dha("train", DEMO, "-o", tmp_path / "out", *text, *arguments)
    assert status == 1 and words in err and err.count("\n") == 1


def test_the_trainer_takes_no_index(tmp_path):
    run = Run(model=str(DEMO), output=str(tmp_path / "out"), device="cuda:1")
    run.calibration.files = [str(CALIBRATION)]
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=1"):
        check_run(run)
