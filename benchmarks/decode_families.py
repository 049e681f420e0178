"""One decode step of families whose forward computes attention itself, beside GPT-2, whose attention is transformers' own.

    python benchmarks/decode_families.py --csv out.csv

Random weights, 4 layers of 16 heads of 64, 25 % of the KV heads kept, batch 2, float32, dynamic cache. "as stored" reads the
un-expanded cache; "all heads" repeats the stored heads for every step, which is the only road in BLOOM, Falcon and MPT.
Milliseconds are the median over the steps of one run, base and merged model in turn.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from dha_peft import DHAConfig, convert
from dha_peft.models import FAMILIES, set_attention_path

SIZES = {"vocab_size": 64, "hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16}
ROWS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 8192},
    "gptj": {"n_positions": 8192, "rotary_dim": 32},
    "codegen": {"n_positions": 8192, "n_ctx": 8192, "rotary_dim": 32},
    "gpt_neo": {"max_position_embeddings": 8192, "attention_types": [[["global"], 4]]},
    "bloom": {},
    "falcon": {"multi_query": False},
    "mpt": {"max_seq_len": 8192},
}
FIELDS = ("family", "attention", "context", "base_ms", "as_stored_ms", "all_heads_ms", "base_mib", "merged_mib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    rows = [row for family in ROWS for context in args.contexts for row in measure(family, context, args.steps)]
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


@torch.no_grad()
def measure(family: str, context: int, steps: int) -> list[dict[str, Any]]:
    """One row for each attention implementation that the family has."""
    rows = []
    for attention in ("eager", "sdpa") if FAMILIES[family].base_class("ForCausalLM")._supports_sdpa else ("eager",):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **SIZES, **ROWS[family])
        base = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        merged = convert(base, DHAConfig(head_budget=0.25, allocation="uniform", grouping="contiguous"))
        caches = [filled(model, context) for model in (base, merged, merged)]
        times: list[list[float]] = [[], [], []]
        for _ in range(steps):
            for index, (model, path) in enumerate(((base, "auto"), (merged, "auto"), (merged, "expand"))):
                set_attention_path(path)
                begin = time.perf_counter()
                model(torch.ones(2, 1, dtype=torch.long), past_key_values=caches[index])
                times[index].append(1e3 * (time.perf_counter() - begin))
        set_attention_path("auto")
        middle = [round(statistics.median(values), 1) for values in times]
        stored = FAMILIES[family].dispatch or FAMILIES[family].core
        cells = (middle[0], middle[1] if stored else "", middle[2], mib(caches[0]), mib(caches[1]))
        rows.append(dict(zip(FIELDS, (family, attention, context, *cells), strict=True)))
        print(rows[-1], flush=True)
    return rows


def filled(model: nn.Module, context: int) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    for _ in range(0, context, 512):
        model(torch.ones(2, 512, dtype=torch.long), past_key_values=cache)
    return cache


def mib(cache: DynamicCache) -> int:
    return round(sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)) / 2**20)


if __name__ == "__main__":
    main()
