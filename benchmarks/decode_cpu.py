"""Decode steps on a CPU: the MHA base and its fused counterpart take turns, so that other work on the machine meets both.

    python benchmarks/decode_cpu.py --csv decode_cpu.csv

Times are CPU time of one thread, medians over `--steps` steps of a small Llama (4 layers, 8 heads of 64, a quarter of the KV
heads). A dynamic cache grows by a token each step, as under `generate` with default arguments.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from decode_model import ModelShape, build, filled_cache

SHAPE = {
    "layers": 4,
    "hidden": 512,
    "intermediate": 1376,
    "vocab": 8000,
    "query_heads": 8,
    "key_heads": 2,
    "value_heads": 2,
}
WARM = 5


@torch.no_grad()
def step_milliseconds(shape: ModelShape, dtype: torch.dtype, kind: str, steps: int) -> dict[str, float]:
    """CPU time of a step by model name; the models take their steps in turn."""
    contestants, times = {}, {"mha": [], "dha": []}
    for name in times:
        torch.manual_seed(0)
        model = build(name, shape, torch.device("cpu"), dtype)
        contestants[name] = (model, filled_cache(model, shape, shape.batch, kind, WARM + steps))
    token = torch.zeros(shape.batch, 1, dtype=torch.long)
    for _ in range(WARM + steps):
        for name, (model, cache) in contestants.items():
            begin = time.process_time()
            model(token, past_key_values=cache, use_cache=True)
            times[name].append((time.process_time() - begin) * 1000)
    return {name: statistics.median(spent[WARM:]) for name, spent in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 256, 1024, 2048, 4096, 8192])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for dtype in args.dtypes:
        for kind in ("dynamic", "static"):
            for context in args.contexts:
                shape = ModelShape(**SHAPE, batch=args.batch, context=context)
                ms = step_milliseconds(shape, getattr(torch, dtype), kind, args.steps)
                rows.append([dtype, kind, args.batch, context, round(ms["mha"], 2), round(ms["dha"], 2)])
                ratio = ms["mha"] / ms["dha"]
                print(
                    f"{dtype:9s} {kind:8s} {args.batch} x {context:<6d} base {ms['mha']:8.2f} ms, ours {ms['dha']:8.2f} ms, {ratio:.2f} times as fast",
                    flush=True,
                )
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["dtype", "cache", "batch", "context", "base_ms", "fused_ms"])
            writer.writerows(rows)


if __name__ == "__main__":
    main()
