"""Loss against healing tokens: the closed form, full healing by the base, the adapter alone, and mean-pooled GQA.

    python benchmarks/healing.py --model FOLDER --text train.jsonl.xz --validation validation.jsonl.xz --csv out.csv

A step of the tables is `--step-tokens` tokens; the optimizer may take several smaller ones in it (`--updates`). Methods:

    full      convert, then train all weights on the KL from the base
    adapter   groups tied at the closed form, base frozen, only the adapter trained on the KL, then collapsed
    gqa       mean-pooled contiguous equal groups, all weights trained on the next token
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from dha_peft import DHAConfig, FusionSchedule, ScheduleOptions, analyse, convert, get_dha_model
from dha_peft.texts import evaluate_loss, text_tokens
from dha_peft.training import healing_loss

METHODS = ("full", "adapter", "gqa")
GQA = {"fusion": "linear", "grouping": "contiguous", "allocation": "uniform"}
FIELDS = (
    "method",
    "budget",
    "steps",
    "updates",
    "lr",
    "seed",
    "base",
    "closed_form",
    "loss",
    "after_collapse",
    "seconds",
    "peak_gib",
)


def main() -> None:
    args = parse()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = (
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        .to(args.device)
        .eval()
        .requires_grad_(False)
    )
    validation = text_tokens(tokenizer, [args.validation], args.windows * args.length + 1).to(args.device)
    wanted = max(max(args.steps) * args.step_tokens, args.calibration_tokens)
    ids = text_tokens(tokenizer, args.text, wanted)
    rows = ids[: len(ids) // args.length * args.length].view(-1, args.length).to(args.device)
    calibration = [{"input_ids": b} for b in rows[: args.calibration_tokens // args.length].split(8)]
    base_loss = evaluate_loss(base, validation, args.length)
    analysis = analyse(base, calibration)
    print(f"base {base_loss:.4f}, {rows.numel()} training tokens on {args.device}", flush=True)
    with args.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for seed in args.seeds:
            for method in args.methods:
                for budget in args.budgets:
                    for steps in args.steps:
                        result = run(method, budget, steps, seed, base, analysis, rows, validation, args)
                        writer.writerow({**result, "base": round(base_loss, 4)})
                        file.flush()
                        print(" ".join(f"{name}={value}" for name, value in result.items()), flush=True)


def run(
    method: str, budget: float, steps: int, seed: int, base, analysis, rows: Tensor, validation: Tensor, args
) -> dict:
    """One cell: closed form, `steps` steps of training, and for the adapter the collapse."""
    set_seed(seed)
    config = DHAConfig(head_budget=budget, task_type="CAUSAL_LM", **(GQA if method == "gqa" else {}))
    if method == "adapter":
        student = get_dha_model(copy.deepcopy(base), config, analysis=analysis)
        student.base_model.tie_groups()
    else:
        student = convert(base, config, analysis=analysis)
    closed = evaluate_loss(student, validation, args.length)
    lr = args.adapter_lr if method == "adapter" else args.lr
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    train(student, None if method == "adapter" else base, rows, steps, lr, args, next_token=float(method == "gqa"))
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    loss = evaluate_loss(student, validation, args.length)
    after = evaluate_loss(student.merge_and_unload(), validation, args.length) if method == "adapter" else loss
    values = (
        method,
        budget,
        steps,
        args.updates,
        lr,
        seed,
        0,
        *(round(v, 4) for v in (closed, loss, after)),
        round(seconds, 1),
        round(peak, 2),
    )
    return dict(zip(FIELDS, values, strict=True))


def train(
    student: nn.Module, teacher: nn.Module | None, rows: Tensor, steps: int, lr: float, args, next_token: float
) -> None:
    """`steps * step_tokens` tokens in a random order, again and again if there are fewer; a tenth warms up, then cosine to 2 %."""
    student.train()
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, betas=(0.9, 0.95))
    total = steps * args.updates
    warm = max(total // 10, 1)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm, total_iters=warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - warm, lr * 0.02),
        ],
        [warm],
    )
    size = args.step_tokens // args.length // args.updates
    schedule_fusion = FusionSchedule(student, ScheduleOptions(ramp_steps=1)) if teacher is None else None
    for batch in order(rows, steps * args.step_tokens // args.length).split(size):
        with torch.autocast(rows.device.type, torch.bfloat16):
            if next_token:
                loss = student(input_ids=batch, labels=batch).loss
            else:
                loss = healing_loss(student, batch, teacher=teacher)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if schedule_fusion is not None:
            schedule_fusion.project()  # the groups stay tied
        optimizer.zero_grad()
        schedule.step()
    student.eval()


def order(rows: Tensor, count: int) -> Tensor:
    """`count` rows, each epoch in a random order of its own."""
    epochs = [rows[torch.randperm(len(rows), device=rows.device)] for _ in range(-(-count // len(rows)))]
    return torch.cat(epochs)[:count]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of a supported model")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--steps", type=int, nargs="+", default=[22, 400])
    parser.add_argument("--step-tokens", type=int, default=32_768)
    parser.add_argument("--updates", type=int, default=4, help="optimizer updates per step")
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--adapter-lr", type=float, default=2e-3)
    parser.add_argument("--calibration-tokens", type=int, default=131_072)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
