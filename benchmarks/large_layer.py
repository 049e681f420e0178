"""How long the closed form takes for layers of a large model: search of the groups at every count, plan, collapse.

    python benchmarks/large_layer.py                        # 32 heads of 128, hidden size 4096, as in a 7B model
    python benchmarks/large_layer.py --layers 4 --csv out.csv

Weights are random, moments and metrics too (their spectra fall as those of trained models do), so no model is needed. The calibration run is
not part of it. Memory is the process's peak beyond model and statistics.
"""

from __future__ import annotations

import argparse
import csv
import resource
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dha_peft import DHAConfig, convert
from dha_peft.attention import KINDS, find_attention
from dha_peft.search import Statistics, search_groups


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    model = make_model(args).to(args.device)
    sites = find_attention(model)
    statistics = make_statistics(model, args)
    config, held = DHAConfig(head_budget=args.budget), peak_memory()
    analysis, search = timed(lambda: search_groups(sites, statistics))
    small, collapse = timed(lambda: convert(model, config, analysis=analysis))
    row = {
        "layers": args.layers, "heads": args.heads, "head_dim": args.head_dim, "device": args.device,
        "threads": torch.get_num_threads(), "budget": args.budget,
        **{f"search_{name}": value for name, value in search.items()},
        **{f"collapse_{name}": value for name, value in collapse.items()},
        "peak_gb": round((peak_memory() - held) / 1e9, 2),
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in row.items()))
    print("heads kept:", small.config.num_key_heads, small.config.num_value_heads)
    if args.csv:
        write(args.csv, row)


def make_model(args: argparse.Namespace) -> LlamaForCausalLM:
    hidden = args.heads * args.head_dim
    config = LlamaConfig(
        vocab_size=8, hidden_size=hidden, intermediate_size=8, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.heads, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def make_statistics(model: LlamaForCausalLM, args: argparse.Namespace) -> Statistics:
    """One moment and one set of metrics for all layers."""
    size = args.heads * args.head_dim
    tokens = torch.randn(2 * size, size, device=args.device) * torch.logspace(0, -1.5, size, device=args.device)
    roots = torch.randn(args.heads, args.head_dim, args.head_dim, device=args.device)
    metric = roots @ roots.transpose(1, 2) * torch.logspace(0, 1, args.heads, device=args.device)[:, None, None]
    moment = tokens.T @ tokens / len(tokens)
    return Statistics([moment] * args.layers, [dict.fromkeys(KINDS, metric)] * args.layers)


def timed(work: Any) -> tuple[Any, dict[str, float]]:
    """Result, and seconds of wall and processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, {
        "seconds": round(time.perf_counter() - wall, 2),
        "processor_seconds": round(time.process_time() - cpu, 2),
    }


def peak_memory() -> int:
    """Most bytes that the GPU, or else the process, has held."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
