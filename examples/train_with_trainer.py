"""Fuses a model with transformers' Trainer: data by `datasets`, accuracy by `evaluate`, before and after, all from local files.

python examples/train_with_trainer.py --steps 60 --out outputs/trainer-example
"""

import argparse
from pathlib import Path

import evaluate
import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from dha_peft import DHACallback, DHAConfig, get_dha_model

HERE = Path(__file__).parent
DEMO = HERE / "demo_model"


def main() -> None:
    options = parse()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    files = {"train": str(options.text), "test": str(options.validation)}
    data = load_dataset("json", data_files=files, cache_dir=str(options.out / "cache"))
    train, test = (blocks(data[part], tokenizer, options.rows) for part in files)
    batches = [{"input_ids": train[i : i + 8]["input_ids"]} for i in range(0, min(64, len(train)), 8)]
    model = get_dha_model(model, DHAConfig(head_budget=0.25, task_type="CAUSAL_LM"), calibration_data=batches)
    arguments = TrainingArguments(
        str(options.out / "trainer"), max_steps=options.steps, learning_rate=5e-3, per_device_train_batch_size=8,
        report_to=[], save_strategy="no", use_cpu=not torch.cuda.is_available(), logging_steps=10,
    )  # fmt: skip
    metric = evaluate.load(str(HERE / "metrics" / "token_accuracy.py"))
    trainer = Trainer(
        model, arguments, train_dataset=train, eval_dataset=test, callbacks=[DHACallback()],
        compute_metrics=lambda found: metric.compute(predictions=found.predictions[:, :-1], references=found.label_ids[:, 1:]),
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),  # tokens, not logits, are kept
    )  # fmt: skip
    before = trainer.evaluate()["eval_token_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_token_accuracy"]
    merged = model.merge_and_unload()
    merged.save_pretrained(options.out / "model")
    tokenizer.save_pretrained(options.out / "model")
    print(f"Token accuracy on held-out text: base {before:.4f}, fused {after:.4f}.")
    heads = f"{merged.config.num_key_heads} key and {merged.config.num_value_heads} value heads"
    print(f"Wrote {options.out / 'model'}, with {heads}.")


def blocks(data: Dataset, tokenizer, rows: int, length: int = 128) -> Dataset:
    """The first `rows` blocks of `length` tokens."""

    def cut(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = [token for text in batch["text"] for token in tokenizer(text, verbose=False)["input_ids"]]
        found = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        return {"input_ids": found, "labels": found}

    data = data.map(cut, batched=True, remove_columns=data.column_names)
    return data.select(range(min(rows, len(data)))).with_format("torch")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO), help="local folder or hub id")
    parser.add_argument(
        "--text", type=Path, default=DEMO / "text" / "calibration.jsonl.xz", help="JSON lines with `text`"
    )
    parser.add_argument("--validation", type=Path, default=DEMO / "text" / "validation.jsonl.xz")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=512, help="blocks of 128 tokens to train and to evaluate on")
    parser.add_argument("--out", type=Path, default=Path("outputs/trainer-example"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
