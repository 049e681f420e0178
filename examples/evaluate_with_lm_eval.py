"""Converts a model and runs lm-eval on base and result, on a task of its own: the last word of passages from local text.

python examples/evaluate_with_lm_eval.py --documents 200 --out outputs/lm-eval-example
"""

import argparse
import json
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dha_peft import DHAConfig, convert
from dha_peft.evaluation import evaluate_tasks
from dha_peft.texts import read_texts, token_batches

DEMO = Path(__file__).parent / "demo_model"


def main() -> None:
    options = parse()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    batches = token_batches(tokenizer, [options.text], tokens=options.tokens)
    models = {"base": base, "converted": convert(base, DHAConfig(head_budget=options.budget), batches)}
    tasks = write_task(options.out / "tasks", passages(options.validation, options.documents))
    for name, model in models.items():
        scores = evaluate_tasks(model, ["last_word"], tokenizer, include_path=tasks)["last_word"]
        print(
            f"{name:10s} accuracy {scores['acc']:.4f} ± {scores['acc_stderr']:.4f}, perplexity {scores['perplexity']:.1f}"
        )


def passages(file: Path, count: int, words: int = 40) -> list[dict[str, str]]:
    """Rows of `words` words and the word that follows."""
    rows = []
    for text in read_texts([file]):
        found = re.findall(r"\S+", text)
        blocks = (found[i : i + words + 1] for i in range(0, len(found) - words, words + 1))
        # Punctuation is part of the answer only by accident.
        rows += [{"text": " ".join(block[:-1]), "word": block[-1]} for block in blocks if block[-1].isalpha()]
    return rows[:count]


def write_task(folder: Path, rows: list[dict[str, str]]) -> Path:
    """A task file of lm-eval and its data; JSON is YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "last_word.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    metrics = [("acc", "mean", True), ("perplexity", "perplexity", False)]
    task = {
        "task": "last_word", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test", "output_type": "loglikelihood", "doc_to_text": "{{text}}", "doc_to_target": " {{word}}",
        "metric_list": [{"metric": m, "aggregation": a, "higher_is_better": up} for m, a, up in metrics],
        "metadata": {"version": 1.0},
    }  # fmt: skip
    (folder / "last_word.yaml").write_text(json.dumps(task, indent=1), encoding="utf-8")
    return folder


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO), help="local folder or hub id")
    parser.add_argument("--text", type=Path, default=DEMO / "text" / "calibration.jsonl.xz")
    parser.add_argument("--validation", type=Path, default=DEMO / "text" / "validation.jsonl.xz")
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--tokens", type=int, default=65_536, help="calibration tokens")
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("outputs/lm-eval-example"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
