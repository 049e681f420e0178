"""The study's tables: loss and task scores against tokens, ablation, fusion against continued training, grouping by CKA.

    python -m benchmarks.study.tables --model FOLDER --text TRAIN... --validation FILE --pretraining-tokens 286e6

Every job appends a row to `losses.csv` (and rows of lm-eval's scores to `scores.csv`) under `--results`; jobs that have a row are
skipped, so the command can be stopped and given again. Methods and jobs are listed in `methods.py`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch

from .methods import METHODS, TABLES, Sizes, jobs
from .pool import Table, Workers, fill
from .prepare import load, prepare
from .recovery import FIELDS, SCORE_FIELDS, Tasks
from .training import Settings


def main() -> None:
    args, start = parse(), time.monotonic()
    sizes = Sizes(**{f.name: _tuple(getattr(args, f.name)) for f in fields(Sizes)})
    wanted = [job for job in jobs(args.tables, sizes) if job.method in args.methods]
    tasks = Tasks(
        tuple(args.tasks),
        args.include_path,
        limit=args.limit,
        fractions=tuple(args.task_fractions),
        seeds=tuple(args.task_seeds),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = (args.work or Path(folder)) / "prepared.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            prepare(
                args, path, args.train_tokens or round(max(job.fraction for job in wanted) * args.pretraining_tokens)
            )
            print(f"prepared in {time.monotonic() - start:.0f} s", flush=True)
        context = {
            "pretraining_tokens": args.pretraining_tokens,
            "settings": Settings(args.rows, args.lr),
            "tasks": tasks,
        }
        losses, scores = (Table(args.results / name, columns) for name, columns in
                          (("losses.csv", FIELDS), ("scores.csv", SCORE_FIELDS)))  # fmt: skip
        minutes = args.minutes - (time.monotonic() - start) / 60
        workers = Workers(args.workers, args.devices, partial(load, path, args.model, **context))
        left = fill(wanted, losses, scores, workers, minutes)
        workers.close()
    print(f"{left} jobs left, {time.monotonic() - start:.0f} s", flush=True)


def _tuple(value):
    return tuple(value) if isinstance(value, list) else value


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data(parser)
    parser.add_argument("--pretraining-tokens", type=float, required=True, help="tokens that the base was trained on")
    parser.add_argument(
        "--train-tokens", type=int, help="tokens of text to read; more are epochs over them (default: no repeat)"
    )
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="only jobs of these")
    for field in [f for f in fields(Sizes) if f.name != "pretraining_tokens"]:
        many = {"nargs": "+"} if isinstance(field.default, tuple) else {}
        kind = int if field.name == "seeds" else float
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, **many)
    parser.add_argument(
        "--rows",
        type=int,
        default=Settings.rows,
        help="rows of an update on the next token or in fusion; healing has its own",
    )
    parser.add_argument(
        "--lr",
        type=float,
        default=Settings.weights,
        help="rate of training on the next token; fusion and healing have their own",
    )
    parser.add_argument("--tasks", nargs="+", default=[], help="tasks of lm-eval; none by default")
    parser.add_argument("--include-path", help="folder of lm-eval task files")
    parser.add_argument("--limit", type=int, help="documents per task")
    parser.add_argument("--task-fractions", type=float, nargs="+", default=list(Tasks.fractions))
    parser.add_argument("--task-seeds", type=int, nargs="+", default=list(Tasks.seeds))
    parser.add_argument("--results", type=Path, default=Path("docs/results/study"))
    parser.add_argument(
        "--work", type=Path, help="folder that keeps tokens and analysis for the next call with the same data"
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--devices", nargs="+", default=devices())
    parser.add_argument("--minutes", type=float, default=60 * 24.0, help="time to end within")
    args = parser.parse_args()
    args.device = args.devices[0]
    return args


def add_data(parser: argparse.ArgumentParser) -> None:
    """Model and text: the same flags in every command of the study."""
    parser.add_argument("--model", required=True, help="folder or hub id of a supported model")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help=".txt or .jsonl files, also .gz or .xz")
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--calibration-tokens", type=int, default=131_072)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row and of a validation window")
    parser.add_argument("--windows", type=int, default=400, help="validation windows")


def devices() -> list[str]:
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]


if __name__ == "__main__":
    main()
