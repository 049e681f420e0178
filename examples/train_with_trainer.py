"""Fuses a model with transformers' Trainer; data by `datasets`, accuracy by scoring with the same Trainer.

python examples/train_with_trainer.py --steps 60 --out outputs/trainer-example
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from dha_peft import DHACallback, DHAConfig, get_dha_model
from dha_peft.texts import read_texts

HERE = Path(__file__).parent / "demo_model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE))
    parser.add_argument("--text", default=str(HERE / "text" / "calibration.jsonl.xz"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("outputs/trainer-example"))
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    data = Dataset.from_dict({"text": list(read_texts([options.text]))})
    data = data.map(lambda row: rows(tokenizer, row["text"]), batched=True, remove_columns="text")
    data = data.select(range(min(options.rows, len(data)))).with_format("torch")
    batches = [{"input_ids": data[i : i + 8]["input_ids"]} for i in range(0, min(64, len(data)), 8)]
    model = get_dha_model(model, DHAConfig(head_budget=0.25, task_type="CAUSAL_LM"), calibration_data=batches)
    arguments = TrainingArguments(
        str(options.out / "trainer"), max_steps=options.steps, learning_rate=5e-3, per_device_train_batch_size=8,
        report_to=[], save_strategy="no", use_cpu=not torch.cuda.is_available(), logging_steps=10,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data, callbacks=[DHACallback()]).train()
    merged = model.merge_and_unload()
    merged.save_pretrained(options.out / "model")
    tokenizer.save_pretrained(options.out / "model")
    print(
        f"Wrote {options.out / 'model'}, with {merged.config.num_key_heads} key and {merged.config.num_value_heads} value heads."
    )


def rows(tokenizer, texts: list[str], length: int = 128) -> dict[str, list[list[int]]]:
    """Blocks of `length` tokens."""
    ids = [token for text in texts for token in tokenizer(text, verbose=False)["input_ids"]]
    blocks = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    return {"input_ids": blocks, "labels": blocks}


if __name__ == "__main__":
    main()
