"""What the conversion loses without any training, beside a mean-pooled GQA of the same size, and how long it takes.

    python benchmarks/closed_form.py --model FOLDER --text train.jsonl.xz --validation validation.jsonl.xz --csv out.csv

Loss is nats per token over windows of 512 predicted tokens taken one after the other from the start of the validation text,
every text preceded by the tokenizer's BOS token; fp32 weights under bf16 autocast. Works for any supported model folder or hub id.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dha_peft import Analysis, DHAConfig, convert
from dha_peft.attention import find_attention
from dha_peft.search import collect_statistics, search_groups
from dha_peft.texts import evaluate_loss, text_tokens, token_batches

LENGTH = 512
MEAN_POOL = {"fusion": "linear", "grouping": "contiguous", "allocation": "uniform"}


class Clock:
    """Seconds of wall and processor time per stage."""

    def __init__(self) -> None:
        self.stages: dict[str, tuple[float, float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.stages[name] = (time.perf_counter() - wall, time.process_time() - cpu)

    def line(self) -> str:
        parts = ", ".join(f"{name} {wall:.1f} s" for name, (wall, _) in self.stages.items())
        wall, cpu = map(sum, zip(*self.stages.values(), strict=True))
        return f"conversion {wall:.1f} s ({parts}); processor time {cpu:.1f} s"


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    batches = token_batches(tokenizer, [args.text], tokens=args.tokens, length=LENGTH)
    validation = text_tokens(tokenizer, [args.validation], tokens=args.windows * LENGTH + 1)
    size = sum(parameter.numel() for parameter in model.parameters())
    calibration = sum(batch["input_ids"].numel() for batch in batches)
    print(f"{args.model}: {size / 1e6:.1f} M parameters, {calibration} calibration tokens, "
          f"{(len(validation) - 1) // LENGTH} windows, {args.device}, {torch.get_num_threads()} threads", flush=True)  # fmt: skip
    rows = list(measured(model, batches, validation, args.budgets, {"key_weight": args.key_weight}))
    if args.csv:
        write(args.csv, rows)


def measured(
    model: nn.Module, batches: list, validation: torch.Tensor, budgets: list[float], ours: dict[str, Any]
) -> Iterator[dict]:
    """One row per figure, printed as soon as it is known. `ours`: fields of `DHAConfig` for aligned fusion."""
    sites, clock = find_attention(model), Clock()
    with clock.stage("calibration"):
        statistics = collect_statistics(model, sites, batches)
    with clock.stage("plan"):
        aligned = search_groups(sites, statistics)
        aligned.plan(DHAConfig(head_budget=budgets[0]).search_options())
    with clock.stage("collapse"):
        convert(model, DHAConfig(head_budget=budgets[0]), analysis=aligned)
    print(clock.line(), flush=True)
    contiguous = search_groups(sites, statistics, "contiguous")
    yield row("base", 1.0, model, validation)
    for budget in budgets:
        for name, fields, analysis in (("mean pool", MEAN_POOL, contiguous), ("aligned", ours, aligned)):
            yield row(name, budget, converted(model, budget, fields, analysis), validation)
    for name, (wall, cpu) in clock.stages.items():
        yield {"what": name, "seconds": round(wall, 2), "processor_seconds": round(cpu, 2)}


def converted(model: nn.Module, budget: float, fields: dict[str, Any], analysis: Analysis) -> nn.Module:
    return convert(model, DHAConfig(head_budget=budget, **fields), analysis=analysis)


def row(name: str, budget: float, model: nn.Module, validation: torch.Tensor) -> dict:
    loss = evaluate_loss(model, validation, LENGTH)
    plan = getattr(model.config, "dha_plan", None)
    heads = None if plan is None else sum(map(len, plan["key_groups"] + plan["value_groups"]))
    print(f"{name:10s} {budget:7.1%} {'' if heads is None else heads:>5} heads   loss {loss:.4f}", flush=True)
    return {"what": name, "budget": budget, "heads": heads, "loss": round(loss, 4)}


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = ["what", "budget", "heads", "loss", "seconds", "processor_seconds"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of a supported model")
    parser.add_argument("--text", type=Path, required=True, help="calibration text, .txt or .jsonl, also .gz or .xz")
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--key-weight", type=float, default=DHAConfig.key_weight, help="as in DHAConfig")
    parser.add_argument("--tokens", type=int, default=131_072, help="calibration tokens")
    parser.add_argument("--windows", type=int, default=400, help="validation windows of 512 tokens")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
