"""`dha sweep`, `eval`, `bench`, `export` and `push` on the embedded model."""

from __future__ import annotations

import csv
import json

import torch
from transformers import AutoModelForCausalLM

from .conftest import CALIBRATION, DEMO, VALIDATION


def test_sweep_measures_budgets_from_one_analysis(dha, tmp_path):
    out = tmp_path / "sweep"
    arguments = ["sweep", DEMO, "-o", out, "--text", CALIBRATION, "--validation", VALIDATION, "--limit", 1]
    status, text, _ = dha(*arguments, "--budgets", "0.5,0.25")
    assert status == 0 and text.count("analysis") == 1
    rows = list(csv.DictReader((out / "sweep.csv").open()))
    assert [(r["model"], float(r["budget"]), int(r["heads"])) for r in rows if r["model"] != "mean-pooled GQA"] == [
        ("base", 1.0, 96), ("dha", 0.5, 48), ("dha", 0.25, 24)
    ]  # fmt: skip
    ours, pooled = rows[3], rows[4]
    assert float(rows[0]["loss"]) < float(ours["loss"]) < float(pooled["loss"])
    assert dha(*arguments)[0] == 1


def test_eight_budgets_cost_little_more_than_one(dha, tmp_path):
    """The bar is 1.5 times one conversion; the analysis is most of it, so the parts are compared with it."""
    out = tmp_path / "sweep"
    status, text, _ = dha(
        "sweep", DEMO, "-o", out, "--text", CALIBRATION, "--limit", 8, "--set", "sweep.reference=false"
    )
    seconds = [float(r["seconds"]) for r in csv.DictReader((out / "sweep.csv").open()) if r["seconds"]]
    analysis = float(text.split("analysis ")[1].split(" s")[0])
    assert status == 0 and len(seconds) == 8
    assert analysis + sum(seconds) < 1.5 * (analysis + max(seconds))


def test_a_budget_too_small_is_refused_before_the_analysis(dha, tmp_path):
    status, text, err = dha("sweep", DEMO, "-o", tmp_path / "out", "--budgets", "0.5,1.5")
    assert status == 1 and "`head_budget`" in err and "analysis" not in text


def test_a_budget_of_one_kind_cannot_be_swept(dha, tmp_path):
    status, _, err = dha("sweep", DEMO, "-o", tmp_path / "out", "--set", "dha.key_budget=0.25")
    assert status == 1 and "`dha.key_budget`" in err and not (tmp_path / "out").exists()


def test_eval_puts_losses_into_the_card(dha, result):
    status, out, _ = dha("eval", result, "--validation", VALIDATION, "--limit", 1)
    assert status == 0 and "loss, base" in out and "loss, result" in out
    assert set(json.loads((result / "results.json").read_text())["losses"]) == {"base", "result"}
    assert "| result |" in (result / "README.md").read_text()
    # The same text again: nothing is named twice.
    assert dha("eval", result, "--validation", VALIDATION, "--limit", 1)[0] == 0
    assert list(json.loads((result / "results.json").read_text())["losses"]) == ["base", "result"]
    status, _, err = dha("eval", result, "--set", "validation.files=[]")
    assert status == 1 and "--tasks" in err


def test_lm_eval_side_by_side_without_a_trust_flag(dha, result, tmp_path):
    rows = [{"text": f"The sea was {word}"} for word in ("calm", "wild", "cold", "blue")]
    (tmp_path / "cloze.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "tiny_cloze", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "cloze.jsonl")}},
        "test_split": "test", "output_type": "loglikelihood", "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' ' + text.split(' ')[-1]}}", "metadata": {"version": 1.0},
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "tiny_cloze.yaml").write_text(json.dumps(task))
    status, out, err = dha("eval", result, "--tasks", "tiny_cloze", "--include-path", tmp_path, "--limit", 4)
    assert status == 0, err
    assert "tiny_cloze" in out and "->" in out
    (row,) = json.loads((result / "results.json").read_text())["scores"]
    assert row["metric"] == "acc" and len(row["base"]) == 2 and row["base"][1] is not None
    assert "first 4 documents" in (result / "README.md").read_text()


def test_bench_measures_cache_and_speed(dha, result):
    status, out, _ = dha("bench", result, "--context", 32, "--steps", 3)
    speed = json.loads((result / "results.json").read_text())["speed"]
    assert status == 0 and "ms/step" in out
    assert speed["base"]["cache_bytes"] == 4 * speed["result"]["cache_bytes"]


def test_export_changes_the_dtype_and_merges_adapters(dha, result, tmp_path):
    assert dha("export", result, "-o", tmp_path / "fp32", "--dtype", "float32")[0] == 0
    wide, narrow = (AutoModelForCausalLM.from_pretrained(p, dtype="auto") for p in (tmp_path / "fp32", result))
    assert wide.dtype == torch.float32 and narrow.dtype == torch.bfloat16
    ids = torch.arange(8)[None]
    torch.testing.assert_close(wide(ids).logits, narrow.float()(ids).logits)
    status, _, err = dha("export", tmp_path, "-o", tmp_path / "x")
    assert status == 1 and "neither" in err


def test_push_lists_what_it_would_upload(dha, result):
    status, out, _ = dha("push", result, "me/small", "--dry-run")
    assert status == 0 and "model.safetensors" in out and "nothing was uploaded" in out
    status, _, err = dha("push", result, "not a repo")
    assert status == 1 and "repo" in err.lower()
