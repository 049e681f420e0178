"""A pool of worker processes that fills CSV files with jobs. Small models leave a GPU mostly idle, so several workers share each."""

from __future__ import annotations

import csv
import logging
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from .methods import Job
from .recovery import KEYS, Study, run

Load = Callable[[str], Study]
_study: Study | None = None


class Table:
    """A CSV file that grows row by row; rows that it holds already need not be computed again."""

    def __init__(self, path: Path, fields: Sequence[str]) -> None:
        self.path, self.fields = path, fields
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.add([dict(zip(fields, fields, strict=True))])

    def keys(self) -> set[tuple[str, ...]]:
        """The jobs that have a row."""
        with self.path.open(newline="") as file:
            return {tuple(row[name] for name in KEYS) for row in csv.DictReader(file)}

    def add(self, rows: list[dict[str, Any]]) -> None:
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.fields, lineterminator="\n").writerows(rows)


class Pace:
    """How long jobs take, from those that ended."""

    def __init__(self) -> None:
        self.seconds: dict[float, float] = {}

    def learn(self, job: Job, seconds: float) -> None:
        self.seconds[job.fraction] = max(seconds, self.seconds.get(job.fraction, 0.0))

    def expected(self, job: Job) -> float:
        """The slowest job of as many tokens, or of the next larger number; 0 where none ended yet."""
        larger = [fraction for fraction in self.seconds if fraction >= job.fraction]
        return self.seconds[min(larger)] if larger else 0.0


def fill(
    jobs: list[Job], losses: Table, scores: Table, workers: int, devices: list[str], load: Load, minutes: float
) -> int:
    """Run the jobs that `losses` lacks, `workers` at a time on `devices` in turn, and return how many are left.

    `load(device)` makes a worker's `Study`. Nothing is started that by the pace of the jobs so far would not end within `minutes`. Only
    this process writes, so one command at a time may use the files.
    """
    done, pace, failed = losses.keys(), Pace(), 0
    waiting = [job for job in jobs if job.key not in done]
    print(f"{len(jobs)} jobs, {len(waiting)} to run, {workers} workers on {', '.join(devices)}", flush=True)
    deadline = time.monotonic() + 60 * minutes
    running: dict[Future, tuple[Job, float]] = {}
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (load, devices, context.Value("i", 0))) as pool:
        while True:
            while len(running) < workers and (job := _next(waiting, pace, deadline)):
                running[pool.submit(_run, job)] = job, time.monotonic()
            if not running:
                return len(waiting) + failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, start = running.pop(future)
                pace.learn(job, time.monotonic() - start)
                failed += not _finish(future, job, losses, scores)


def _next(waiting: list[Job], pace: Pace, deadline: float) -> Job | None:
    """Take the first job that still fits."""
    left = deadline - time.monotonic()
    for index, job in enumerate(waiting):
        if left > 0 and pace.expected(job) <= left:
            return waiting.pop(index)
    return None


def _finish(future: Future, job: Job, losses: Table, scores: Table) -> bool:
    """Write the job's rows, or say why there are none. The row of losses comes last: it marks the job as done."""
    try:
        row, score_rows = future.result()
    except Exception:
        print(f"FAILED {job}\n{traceback.format_exc()}", flush=True)
        return False
    scores.add(score_rows)
    losses.add([row])
    print(" ".join(f"{name}={value}" for name, value in row.items() if value is not None), flush=True)
    return True


def _start(load: Load, devices: list[str], counter: Any) -> None:
    """Give this worker one device, in turn, and load what its jobs share."""
    global _study
    with counter.get_lock():
        index, counter.value = counter.value, counter.value + 1
    device = devices[index % len(devices)]
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # a line per document that is too long
    _study = load(device)


def _run(job: Job) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return run(_study, job)
