"""Converts a model in one shot and heals it with a LoRA of peft's, merged at the end.

python examples/heal_with_lora.py --steps 40 --out outputs/lora-example
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from dha_peft import DHAConfig, DHATrainer, convert
from dha_peft.texts import token_batches

HERE = Path(__file__).parent / "demo_model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE))
    parser.add_argument("--text", default=str(HERE / "text" / "calibration.jsonl.xz"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--out", type=Path, default=Path("outputs/lora-example"))
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model)
    batches = token_batches(tokenizer, [options.text], tokens=options.tokens, length=128)
    small = convert(base, DHAConfig(head_budget=0.25), calibration_data=batches)
    student = get_peft_model(
        small, LoraConfig(r=16, target_modules=["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    )
    arguments = TrainingArguments(
        str(options.out / "trainer"), max_steps=options.steps, learning_rate=2e-3, per_device_train_batch_size=8,
        report_to=[], save_strategy="no", use_cpu=not torch.cuda.is_available(), logging_steps=10, remove_unused_columns=False,
    )  # fmt: skip
    data = [{"input_ids": row} for batch in batches for row in batch["input_ids"]]
    DHATrainer(model=student, args=arguments, train_dataset=data, teacher=base).train()
    merged = student.merge_and_unload()
    merged.save_pretrained(options.out / "model")
    tokenizer.save_pretrained(options.out / "model")
    print(f"Wrote {options.out / 'model'}")


if __name__ == "__main__":
    main()
