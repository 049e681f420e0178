"""Progressive fusion under the augmented Lagrangian on a frozen base: the loss on both sides of the collapse.

    python benchmarks/lagrangian.py --model FOLDER --text train.jsonl.xz --validation validation.jsonl.xz --csv out.csv

`linear` is the paper's method as reconstructed here: groups learned in a first stage, then scalar fusion. `aligned` is ours: it starts from
groups and frames of the closed form, whose own loss is printed beside it. Only the adapter is trained. Works for any supported model folder
or hub id, on a GPU where there is one.
"""

from __future__ import annotations

import argparse
import copy
import csv
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from dha_peft import DHACallback, DHAConfig, DHATrainer, get_dha_model
from dha_peft.texts import evaluate_loss, text_tokens, token_batches

METHODS = {"linear": {"fusion": "linear", "grouping": "learned"}, "aligned": {"fusion": "aligned"}}
CALIBRATION_TOKENS = 131_072


@dataclass
class Result:
    """Losses in nats per token; `fusion_loss` is the one right before the collapse."""

    method: str
    objective: str
    steps: int
    base: float
    closed_form: float | None
    before: float
    after: float
    fusion_loss: float
    heads: int
    seconds: float

    def __str__(self) -> str:
        closed = "" if self.closed_form is None else f", closed form {self.closed_form:.4f}"
        return (
            f"{self.method} ({self.objective}, {self.steps} steps, {self.seconds:.0f} s, {self.heads} heads): base {self.base:.4f}{closed}; "
            f"before the collapse {self.before:.4f}, after it {self.after:.4f} (difference {self.after - self.before:+.4f}), "
            f"fusion loss {self.fusion_loss:.1e}"
        )


class Progress(TrainerCallback):
    """One line per logging step."""

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if logs and "loss" in logs:
            figures = {name.removeprefix("dha/"): value for name, value in logs.items()}
            print("  step {step}: loss {loss:.4f} F {fusion_loss:.2e} target {target:.2e} lambda1 {lambda1:.3g} "
                  "lambda2 {lambda2:.3g} heads {realised_heads}".format(**{**figures, "step": state.global_step}), flush=True)  # fmt: skip


def main() -> None:
    args = parse()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    wanted = min(args.steps * args.step_tokens, args.tokens or args.steps * args.step_tokens)
    batches = token_batches(tokenizer, args.text, tokens=wanted, length=args.length, batch_size=args.micro_batch)
    validation = text_tokens(tokenizer, [args.validation], tokens=args.windows * args.length + 1)
    loss = evaluate_loss(base, validation, args.length)
    print(f"{args.model}: base {loss:.4f} over {(len(validation) - 1) // args.length} windows; {args.device}, "
          f"{args.steps} steps of {args.step_tokens} tokens", flush=True)  # fmt: skip
    results = []
    for method in args.methods:
        results.append(run(method, base, loss, batches, validation, args))
        print(results[-1], flush=True)
    if args.csv:
        write(args.csv, results)


def run(method: str, base: nn.Module, base_loss: float, batches: list, validation: torch.Tensor, args) -> Result:
    """Train one method's adapter on a copy of the base, and collapse it."""
    set_seed(args.seed)
    start = time.perf_counter()
    config = DHAConfig(head_budget=args.budget, task_type="CAUSAL_LM", **METHODS[method])
    calibration = batches[: max(CALIBRATION_TOKENS // batches[0]["input_ids"].numel(), 1)]
    adapted = get_dha_model(copy.deepcopy(base), config, calibration)
    closed = None if method == "linear" else evaluate_loss(closed_form(adapted), validation, args.length)
    train(adapted, batches, args)
    fusion_loss = adapted.base_model.fusion_loss()
    before = evaluate_loss(adapted, validation, args.length)
    merged = adapted.merge_and_unload()
    after = evaluate_loss(merged, validation, args.length)
    heads = sum(merged.config.num_key_heads) + sum(merged.config.num_value_heads)
    seconds = time.perf_counter() - start
    return Result(method, args.objective, args.steps, base_loss, closed, before, after, fusion_loss, heads, seconds)


def closed_form(adapted: PeftModel) -> nn.Module:
    """The same groups and frames collapsed at once, without training."""
    copied = copy.deepcopy(adapted)
    copied.base_model.tie_groups()
    return copied.merge_and_unload()


def train(adapted: PeftModel, batches: list, args: argparse.Namespace) -> None:
    rows = [{"input_ids": row, "labels": row} for batch in batches for row in batch["input_ids"]]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.micro_batch,
            gradient_accumulation_steps=max(args.step_tokens // (args.micro_batch * args.length), 1),
            learning_rate=args.lr,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.02},
            warmup_steps=min(10, args.steps // 10),
            weight_decay=0.0,
            bf16=True,
            use_cpu=args.device == "cpu",
            logging_steps=max(args.steps // 20, 1),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=args.seed,
        )
        trainer_class = DHATrainer if args.objective == "kl" else Trainer
        schedule = DHACallback(ramp=args.ramp, project=args.project)
        trainer = trainer_class(
            adapted,
            arguments,
            train_dataset=rows,
            callbacks=[schedule, Progress()],
            optimizers=(optimizer(adapted, args.lr, args.omega_lr), None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    adapted.eval()


def optimizer(adapted: PeftModel, lr: float, omega_lr: float) -> torch.optim.Optimizer:
    """AdamW with a rate of its own for fusion matrices: they travel from the identity to 1 / n, frames only need small changes."""
    named = [(name, p) for name, p in adapted.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if name.endswith("omega") == omega], "lr": rate}
        for omega, rate in ((True, omega_lr), (False, lr))
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)


def write(path: Path, results: list[Result]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(results[0])))
        writer.writeheader()
        writer.writerows(map(asdict, results))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of a supported model")
    parser.add_argument(
        "--text", type=Path, nargs="+", required=True, help="training text: .txt, .jsonl, also .gz, .xz"
    )
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--objective", choices=["next-token", "kl"], default="next-token", help="kl: from the base")
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--step-tokens", type=int, default=32_768)
    parser.add_argument("--micro-batch", type=int, default=64, help="rows at a time")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row and of a validation window")
    parser.add_argument("--tokens", type=int, help="training tokens before they repeat; default: no repeat")
    parser.add_argument("--windows", type=int, default=400)
    parser.add_argument("--lr", type=float, default=5e-3, help="of the frames")
    parser.add_argument("--omega-lr", type=float, default=3e-2, help="of the fusion matrices")
    parser.add_argument("--ramp", type=float, default=0.7, help="share of the fusion steps until the target is 0")
    parser.add_argument("--project", action="store_true", help="hold the fusion loss to the target (ours)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
