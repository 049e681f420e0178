"""Fuses a model with TRL's SFTTrainer, which takes care of chat data, packing and its own loss.

python examples/train_with_trl.py --steps 60 --out outputs/trl-example
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from dha_peft import DHACallback, DHAConfig, get_dha_model
from dha_peft.texts import token_batches

DEMO = Path(__file__).parent / "demo_model"


def main() -> None:
    options = parse()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.convert_ids_to_tokens(0)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    batches = token_batches(tokenizer, [options.text], tokens=options.tokens, length=128)
    # SFTTrainer is given the PeftModel itself: without `peft_config`, it wraps nothing a second time.
    model = get_dha_model(base, DHAConfig(head_budget=0.25, task_type="CAUSAL_LM"), calibration_data=batches)
    arguments = SFTConfig(
        str(options.out / "trainer"), max_steps=options.steps, learning_rate=5e-3, per_device_train_batch_size=8, max_length=128,
        report_to=[], save_strategy="no", use_cpu=not torch.cuda.is_available(), bf16=torch.cuda.is_available(), logging_steps=10,
    )  # fmt: skip
    data = load_dataset("json", data_files=str(options.text), cache_dir=str(options.out / "cache"), split="train")
    trainer = SFTTrainer(
        model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[DHACallback()]
    )
    trainer.train()
    merged = model.merge_and_unload()
    merged.save_pretrained(options.out / "model")
    tokenizer.save_pretrained(options.out / "model")
    print(f"Wrote {options.out / 'model'}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO), help="local folder or hub id")
    parser.add_argument(
        "--text", type=Path, default=DEMO / "text" / "calibration.jsonl.xz", help="JSON lines with `text`"
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=65_536, help="calibration tokens")
    parser.add_argument("--out", type=Path, default=Path("outputs/trl-example"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
