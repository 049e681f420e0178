"""The merged model runs under lm-eval: by the package's own entry, and as remote code without the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from shared_data import REPOSITORY, shared_data
from transformers import AutoModelForCausalLM, AutoTokenizer

from dha_peft import DHAConfig, convert
from dha_peft.evaluation import evaluate_tasks
from dha_peft.texts import token_batches

pytest.importorskip("lm_eval")
DEMO = REPOSITORY / "examples" / "demo_model"
CLOZE = [
    ("The sun rose over the hills, and the birds began to", "sing"),
    ("He opened the door, and she came into the", "room"),
    ("They had been married for twenty", "years"),
    ("She put her hand upon his", "shoulder"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """The embedded model at half of its heads, saved with its tokenizer."""
    base = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    batches = token_batches(tokenizer, [DEMO / "text" / "calibration.jsonl.xz"], tokens=2048, length=256)
    path = tmp_path_factory.mktemp("merged")
    convert(base, DHAConfig(head_budget=0.5), batches).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory):
    """Two small tasks: a last word to predict, and one of two endings to choose."""
    path = tmp_path_factory.mktemp("tasks")
    rows = [{"text": text, "word": word, "choices": [word, "zxqv"]} for text, word in CLOZE]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path / "rows.jsonl")}}}
    shared |= {"test_split": "test", "doc_to_text": "{{text}}", "metadata": {"version": 1.0}}
    word = {"task": "own_word", "output_type": "loglikelihood", "doc_to_target": " {{word}}"}
    word["metric_list"] = [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}]
    choice = {"task": "own_choice", "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": 0}
    choice["metric_list"] = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    for task in (word, choice):  # JSON is valid YAML
        (path / f"{task['task']}.yaml").write_text(json.dumps({**shared, **task}))
    return path


@pytest.fixture(scope="module")
def cloze(tmp_path_factory):
    """`local_books_cloze` of the shared data."""
    data, out = shared_data("eval/books_cloze").parents[1], tmp_path_factory.mktemp("local")
    subprocess.run([sys.executable, data / "make_lm_eval_tasks.py", data, out], check=True, capture_output=True)
    return out


def test_own_tasks_by_folder_and_by_model(folder, own_tasks, tokenizer):
    tasks = ["own_word", "own_choice"]
    by_folder = evaluate_tasks(folder, tasks, include_path=own_tasks, device="cpu", dtype="float32")
    assert by_folder["own_choice"]["acc"] == 1.0 and 1 < by_folder["own_word"]["perplexity"] < 2000
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__name__ == "DhaLlamaForCausalLM"
    by_model = evaluate_tasks(model, tasks, tokenizer, own_tasks, batch_size=1)
    # One row at a time has no padding, so this also says that left padding changes nothing.
    assert by_model["own_word"]["perplexity"] == pytest.approx(by_folder["own_word"]["perplexity"], rel=1e-3)


def test_the_score_is_the_models_own_likelihood(folder, own_tasks, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total = 0.0
    for text, word in CLOZE:
        context = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = tokenizer(f"{text} {word}", add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            chances = model(whole).logits.log_softmax(-1)[0, len(context) - 1 : -1]
        total += float(chances.gather(1, whole[0, len(context) :, None]).sum())
    scores = evaluate_tasks(folder, ["own_word"], include_path=own_tasks, device="cpu", dtype="float32")
    assert scores["own_word"]["perplexity"] == pytest.approx(float(torch.tensor(-total / len(CLOZE)).exp()), rel=1e-3)


def test_half_of_the_heads_still_reads_books(folder, cloze):
    base = evaluate_tasks(DEMO, ["local_books_cloze"], include_path=cloze, limit=24, device="cpu", dtype="float32")
    ours = evaluate_tasks(folder, ["local_books_cloze"], include_path=cloze, limit=24, device="cpu", dtype="float32")
    before, after = base["local_books_cloze"], ours["local_books_cloze"]
    assert 0 <= after["acc"] <= 1 and after["perplexity"] < 3 * before["perplexity"]


def remote_code(folder, task, include_path, tmp_path):
    """Perplexity by lm-eval alone, in a process that cannot import the package."""
    code = """
import json, sys
sys.modules["dha_peft"] = None
import lm_eval
from lm_eval.tasks import TaskManager
folder, task, path, out = sys.argv[1:]
manager = TaskManager(include_path=path, include_defaults=False)
arguments = {"pretrained": folder, "trust_remote_code": True, "dtype": "float32"}
results = lm_eval.simple_evaluate("hf", arguments, [task], task_manager=manager, limit=8, device="cpu", batch_size=4)
json.dump(results["results"][task]["perplexity,none"], open(out, "w"))
"""
    command = [sys.executable, "-c", code, str(folder), task, str(include_path), str(tmp_path / "out.json")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((tmp_path / "out.json").read_text())


def test_remote_code_scores_the_same(folder, own_tasks, tmp_path):
    ours = evaluate_tasks(folder, ["own_word"], include_path=own_tasks, device="cpu", dtype="float32")
    assert remote_code(folder, "own_word", own_tasks, tmp_path) == pytest.approx(
        ours["own_word"]["perplexity"], rel=1e-4
    )


def test_remote_code_runs_a_local_task(folder, cloze, tmp_path):
    ours = evaluate_tasks(
        folder, ["local_books_cloze"], include_path=cloze, limit=8, batch_size=4, device="cpu", dtype="float32"
    )
    theirs = remote_code(folder, "local_books_cloze", cloze, tmp_path)
    assert theirs == pytest.approx(ours["local_books_cloze"]["perplexity"], rel=1e-4)


def test_bad_input_is_named(folder, own_tasks, tmp_path):
    with pytest.raises(ValueError, match="`tasks` is empty"):
        evaluate_tasks(folder, [])
    with pytest.raises(ValueError, match=r"names \['no_such_task'\]"):
        evaluate_tasks(folder, ["own_word", "no_such_task"], include_path=own_tasks)
    with pytest.raises(ValueError, match="not a folder"):
        evaluate_tasks(folder, ["own_word"], include_path=tmp_path / "absent")
