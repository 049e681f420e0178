"""What one healing step costs beside plain next-token training: milliseconds and peak memory.

    python benchmarks/healing_cost.py --model FOLDER --csv out.csv

Both train the same merged model in fp32 under bf16 autocast with AdamW. `next-token` trains all weights, `healing` the parts that `Rates` trains
by default, on the distribution and the hidden states of the base. Tokens are random; only the cost is measured.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dha_peft import DHAConfig, convert
from dha_peft.training import Rates, healing_loss
from dha_peft.training.healing import freeze_parts, rate_groups

WARM_STEPS = 5


def main() -> None:
    args = parse()
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    base.requires_grad_(False)
    rows = list(measured(base, args))
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def measured(base: nn.Module, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per kind of training and size of a step, printed as soon as it is known."""
    for tokens in args.step_tokens:
        shape = (max(tokens // args.length, 1), args.length)
        ids = torch.randint(base.config.vocab_size, shape, device=args.device)
        plain = None
        for name in ("next-token", "healing"):
            milliseconds, memory = cost(base, name, ids, args.steps)
            plain = plain or milliseconds
            row = {"training": name, "tokens": ids.numel(), "ms": round(milliseconds, 2), "peak_gib": round(memory, 2)}
            row |= {"times_next_token": round(milliseconds / plain, 3), "device": device_name(args.device)}
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
            yield row


def cost(base: nn.Module, name: str, ids: Tensor, steps: int) -> tuple[float, float]:
    """Milliseconds of one step, and GiB at its peak (0 on a CPU)."""
    student = convert(base, DHAConfig(head_budget=0.25)).train().requires_grad_(True)
    if name == "healing":
        freeze_parts(student, Rates())
        groups, loss = rate_groups(student, Rates(), 1e-5), lambda: healing_loss(student, ids, teacher=base)
    else:
        groups, loss = student.parameters(), lambda: student(input_ids=ids, labels=ids, use_cache=False).loss
    optimizer = torch.optim.AdamW(groups, lr=1e-5, fused=True)
    for _ in range(WARM_STEPS):
        step(loss, optimizer, ids.device.type)
    if ids.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    for _ in range(steps):
        step(loss, optimizer, ids.device.type)
    if ids.is_cuda:
        torch.cuda.synchronize()
    memory = torch.cuda.max_memory_allocated() / 2**30 if ids.is_cuda else 0.0
    return (time.perf_counter() - begin) * 1000 / steps, memory


def step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, device: str) -> None:
    with torch.autocast(device, torch.bfloat16):
        value = loss()
    value.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of a supported model")
    parser.add_argument("--step-tokens", type=int, nargs="+", default=[4096, 32_768])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
