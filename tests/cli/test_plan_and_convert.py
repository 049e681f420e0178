"""`dha plan`, `dha convert`, the run file and the output folder."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest
import yaml
from transformers import AutoModelForCausalLM

from dha_peft.cli.console import parse_size
from dha_peft.cli.output import new_folder, partial_folder
from dha_peft.cli.settings import load_run

from .conftest import CALIBRATION, DEMO


def test_plan_of_a_config_alone_is_quick_and_right(llama_7b):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command = [sys.executable, "-m", "dha_peft.cli", "plan", str(llama_7b), "--memory", "24GB"]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=one)
    # Processor time, as tests share their machine; importing torch, transformers and peft is most of it.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 10
    assert "524,288 -> 131,072 bytes per token" in done.stdout
    assert "uniform" in done.stdout and "longest context" in done.stdout


def test_plan_searches_with_text(dha):
    status, out, _ = dha("plan", DEMO, "--text", CALIBRATION, "--limit", 1, "--budget", 0.5)
    assert status == 0 and "KV heads 96 -> 48 (50.0%)" in out and "uniform" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget", 2], "`head_budget`"),
        (["--budget", 0.01], "fewer than one per layer"),
        (["--set", "dha.head_bugdet=0.5"], "did you mean `head_budget`"),
        (["--set", "calibraton.tokens=5"], "did you mean `calibration`"),
        (["--set", "train.arguments.learnin_rate=1"], "did you mean `learning_rate`"),
        (["--set", "calibration.tokens=many"], "`calibration.tokens`"),
        (["--set", "dha.damping"], "KEY=VALUE"),
        (["--text", "nowhere.txt"], "does not exist"),
        (["--memory", "much"], "`--memory`"),
        (["--config", "nowhere.yaml"], "does not exist"),
        (["--context", 0, "--memory", "8GB"], "`--context`"),
        (["--device", "toaster"], "`device`"),
        (["--dtype", "int3"], "`dtype`"),
        (["--tokens", -5], "`calibration.tokens`"),
        (["--limit", 0], "`limit`"),
        (["--set", "sweep.budgets=[a]"], "list[float]"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(dha, arguments, words):
    status, _, err = dha("plan", DEMO, *arguments)
    assert status == 1 and words in err and err.count("\n") == 1


def test_unsupported_and_missing_models(dha, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "nonsense"}')
    cases = (
        (tmp_path, "t5"),
        (tmp_path / "no", "does not exist"),
        (tmp_path / "odd", "nonsense"),
        ("nobody/none", "on the hub"),
    )
    for model, words in cases:
        status, _, err = dha("plan", model)
        assert status == 1 and words in err
    (tmp_path / "config.json").write_text('{"model_type": "bart"}')
    for command in ("plan", "convert"):
        status, _, err = dha(command, tmp_path, *(("-o", tmp_path / "out") if command == "convert" else ()))
        assert status == 1 and "no causal language model" in err


def test_convert_writes_a_whole_result(result, dha):
    model = AutoModelForCausalLM.from_pretrained(result)
    assert type(model).__name__ == "DhaLlamaForCausalLM"
    assert {"README.md", "results.json", "run.yaml", "tokenizer.json", "modeling_dha.py"} <= {
        p.name for p in result.iterdir()
    }
    card = (result / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert {"dha", "peft"} <= set(front["tags"]) and front["base_model"] == "demo_model"
    assert "trust_remote_code=True" in card and "import dha_peft" in card and "1,536" in card
    assert not partial_folder(result).exists()
    status, _, err = dha("convert", DEMO, "-o", result)
    assert status == 1 and "not empty" in err


def test_a_run_file_with_flags_over_it(dha, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {DEMO}\ndha: {{head_budget: 0.5, damping: 1e-1}}\ncalibration: {{files: {CALIBRATION}}}\nlimit: 1\n"
    )
    run = load_run(file, {"dha.head_budget": 0.25})
    assert run.dha == {"head_budget": 0.25, "damping": 0.1} and run.calibration.files == [str(CALIBRATION)]
    (tmp_path / "again.yaml").write_text(run.yaml())
    assert load_run(tmp_path / "again.yaml") == run
    out = tmp_path / "out"
    status, text, _ = dha("convert", "--config", file, "-o", out, "--dry-run")
    assert status == 0 and "dry run" in text and not out.exists()
    assert dha("convert", "--config", file, "-o", out, "--budget", 0.375, "--set", "report=false")[0] == 0
    assert (out / "run.input.yaml").read_text() == file.read_text()
    assert load_run(out / "run.yaml").dha["head_budget"] == 0.375


def test_a_given_plan_is_what_is_made_and_recorded(dha, tmp_path):
    """One that no search would find, and another budget than `dha.head_budget`."""
    groups = [[[0, 7], [1, 2, 3], [4], [5, 6]]] * 6
    file, out = tmp_path / "run.yaml", tmp_path / "out"
    dha_part = {"plan": {"head_dim": 32, "key_groups": groups, "value_groups": groups}}
    file.write_text(yaml.safe_dump({"model": str(DEMO), "dha": dha_part, "limit": 1, "report": False}))
    arguments = ["convert", "--config", file, "--text", CALIBRATION, "-o", out]
    status, text, _ = dha(*arguments, "--dry-run")
    assert status == 0 and "KV heads 96 -> 48 (50.0%)" in text
    status, text, err = dha(*arguments)
    assert status == 0 and "KV heads 96 -> 48 (50.0%)" in text, err
    facts = json.loads((out / "results.json").read_text())
    assert facts["budget"] == 0.5 and facts["plan"]["key_groups"] == groups
    assert AutoModelForCausalLM.from_pretrained(out).config.dha_plan["key_groups"] == groups
    status, _, err = dha("sweep", "--config", file, "-o", tmp_path / "sweep")
    assert status == 1 and "`dha.plan`" in err


@pytest.mark.parametrize("command", ["convert", "sweep", "plan"])
def test_learned_groups_need_training(dha, tmp_path, command):
    out = ["--search"] if command == "plan" else ["-o", tmp_path / "out"]
    status, text, err = dha(command, DEMO, *out, "--set", "dha.grouping=learned")
    assert status == 1 and "`dha train`" in err and "model" not in text


def test_nothing_is_half_written(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), new_folder(target) as folder:
        (folder / "file").write_text("half")
        raise RuntimeError
    assert not target.exists() and not partial_folder(target).exists()
    with pytest.raises(RuntimeError), new_folder(target, keep=True) as folder:
        (folder / "file").write_text("half")
        raise RuntimeError
    with pytest.raises(ValueError, match="--resume"), new_folder(target):
        pass
    with new_folder(target, resume=True) as folder:
        assert (folder / "file").read_text() == "half"
    assert (target / "file").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"words\n", "line 1 of"),
        ("b.jsonl", b'{"a": 1}\n', "no key `text`"),
        ("c.txt", b"\xff\xfe\x00", "UTF-8"),
        ("d.txt", b"", "give more text"),
    ],
)
def test_bad_text_is_named(dha, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    status, _, err = dha("convert", DEMO, "-o", tmp_path / "out", "--text", tmp_path / name)
    assert status == 1 and words in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]
    status, _, err = dha("convert", DEMO, "-o", tmp_path / name / "out")
    assert status == 1 and "which is a file" in err


def test_sizes():
    assert parse_size("24GB") == 24 * 10**9 and parse_size("80GiB") == parse_size("80") == 80 * 2**30


def test_env_names_versions(dha):
    status, out, _ = dha("env")
    assert status == 0 and "transformers" in out and "dha_peft" in out
    status, out, _ = dha("--version")
    assert status == 0 and out.startswith("dha_peft 0.")


@pytest.mark.parametrize("command", ["convert", "train", "sweep"])
def test_a_missing_model_is_named_in_one_line_and_leaves_nothing(dha, tmp_path, command):
    text = ["--text", f"{DEMO}/text/calibration.jsonl.xz"]
    status, _, err = dha(command, tmp_path / "no", "-o", tmp_path / "out", *text)
    assert status == 1 and f"the folder `{tmp_path / 'no'}` does not exist" in err
    assert not (tmp_path / "out").exists()
