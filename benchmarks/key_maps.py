"""What fusing keys costs by what they may be turned by: any map (learned positions, ALiBi), or a complex factor per rotary pair.

    python benchmarks/key_maps.py --tokenizer FOLDER --text train.jsonl.gz --validation heldout.jsonl.gz --csv out.csv

Trains three small models from scratch that differ in family and positions alone (3 layers of 8 heads of 12), then fuses their
keys without any training; values stay. On the models without rotary positions the same keys are also fused with what rotary
ones would be left with. Loss in nats per token over windows of 128 tokens of held-out text.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dha_peft import DHAConfig, convert
from dha_peft.models import FAMILIES
from dha_peft.texts import evaluate_loss, text_tokens

LENGTH, ROWS = 128, 16
SIZES = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8, "max_position_embeddings": LENGTH}
ROPE = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 1.0}
MODELS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "gpt_neox": ("rotary", {"intermediate_size": 384, "rope_parameters": ROPE}, ("pairs",)),
    "gpt2": ("learned", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, ("pairs", "any")),
    "bloom": ("ALiBi", {}, ("pairs", "any")),
}  # fmt: skip
FIELDS = ("family", "positions", "maps", "kept", "base", "fused", "increase")


def main() -> None:
    args = parse()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    tokens = text_tokens(tokenizer, [args.text], args.steps * ROWS * LENGTH)
    train = tokens[: len(tokens) // (ROWS * LENGTH) * ROWS * LENGTH].view(-1, ROWS, LENGTH)
    validation = text_tokens(tokenizer, [args.validation], 256 * LENGTH + 1)
    rows = [row for family in MODELS for row in measure(family, len(tokenizer), train, validation, args.steps)]
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--csv", type=Path)
    return parser.parse_args()


def measure(family: str, vocabulary: int, train: Tensor, validation: Tensor, steps: int) -> list[dict[str, Any]]:
    """One row for every kind of maps and every budget."""
    positions, fields, kinds = MODELS[family]
    model = trained(AutoConfig.for_model(family, vocab_size=vocabulary, **SIZES, **fields), train, steps)
    base, calibration = evaluate_loss(model, validation, LENGTH), [{"input_ids": ids} for ids in train[:8]]
    rows = []
    for maps in kinds:
        for kept in (0.5, 0.25, 0.125):
            with turned_by(family, maps):
                small = convert(model, DHAConfig(key_budget=kept, value_budget=1.0, allocation="uniform"), calibration)
            loss = evaluate_loss(small, validation, LENGTH)
            cells = (family, positions, maps, kept, round(base, 4), round(loss, 4), round(loss - base, 4))
            rows.append(dict(zip(FIELDS, cells, strict=True)))
            print(rows[-1], flush=True)
    return rows


def trained(config: Any, train: Tensor, steps: int) -> nn.Module:
    """A model of this config after `steps` batches of `train` `[batches, rows, length]`, from the start again at its end."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    wall, cpu = time.perf_counter(), time.process_time()
    for ids in (train[step % len(train)] for step in range(steps)):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    seconds = f"{time.perf_counter() - wall:.0f} s, processor time {time.process_time() - cpu:.0f} s"
    print(f"{config.model_type}: {steps} steps, last loss {loss.item():.3f}, {seconds}", flush=True)
    return model.eval()


@contextmanager
def turned_by(family: str, maps: str) -> Iterator[None]:
    """With "pairs" a family without rotary positions is treated as if it had them: a stricter choice, and so as correct."""
    row = FAMILIES[family]
    FAMILIES[family] = replace(row, position="half") if maps == "pairs" else row
    yield
    FAMILIES[family] = row


if __name__ == "__main__":
    main()
