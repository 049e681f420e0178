"""A pool of worker processes that fills CSV files with jobs. Small models leave a GPU mostly idle, so several workers share each."""

from __future__ import annotations

import csv
import logging
import os
import time
import traceback
from collections import deque
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
        """The slowest job of as many tokens. Without one, a part of what the next longer ones took, by the tokens, but a minute
        of it in any case, as not all of a job is training; 0 where none ended yet."""
        longer = [fraction for fraction in self.seconds if fraction >= job.fraction]
        if not longer:
            return 0.0
        nearest = min(longer)
        seconds = self.seconds[nearest]
        return max(seconds * job.fraction / nearest, min(seconds, 60.0)) if nearest else seconds


class Workers:
    """Processes that run one job at a time, spread over the devices. Each sees one GPU only: a Trainer takes all that it sees."""

    def __init__(self, count: int, devices: list[str], load: Load) -> None:
        context, most = get_context("spawn"), -(-count // len(devices))
        threads = max((os.cpu_count() or 1) // count, 1)
        self.visible = [_gpu_number(device) for device in devices]
        self.pools = [
            ProcessPoolExecutor(most, context, _start, (load, "cpu" if number is None else "cuda", threads))
            for number in self.visible
        ]
        self.free = deque(index % len(devices) for index in range(count))
        self.running: dict[Future, tuple[Job, int, float]] = {}

    def submit(self, job: Job) -> None:
        """Give a job to a free worker. A process that starts now inherits the environment as it is set here."""
        index = self.free.popleft()
        if self.visible[index] is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.visible[index]
        self.running[self.pools[index].submit(_run, job)] = job, index, time.monotonic()

    def ended(self) -> list[tuple[Future, Job, float]]:
        """Wait for a job, and return those that ended with the seconds that they took."""
        found = []
        for future in wait(self.running, return_when=FIRST_COMPLETED).done:
            job, index, start = self.running.pop(future)
            self.free.append(index)
            found.append((future, job, time.monotonic() - start))
        return found

    def close(self) -> None:
        for pool in self.pools:
            pool.shutdown()


def fill(jobs: list[Job], losses: Table, scores: Table, workers: Workers, minutes: float) -> int:
    """Run the jobs that `losses` lacks, and return how many are left.

    Nothing is started that by the pace of the jobs so far would not end within `minutes`. Only this process writes, so one command
    at a time may use the files.
    """
    done, pace, failed = losses.keys(), Pace(), 0
    waiting = [job for job in jobs if job.key not in done]
    print(f"{len(jobs)} jobs, {len(waiting)} to run, {len(workers.free)} workers", flush=True)
    deadline = time.monotonic() + 60 * minutes
    while True:
        while workers.free and (job := _next(waiting, pace, deadline)):
            workers.submit(job)
        if not workers.running:
            return len(waiting) + failed
        for future, job, seconds in workers.ended():
            pace.learn(job, seconds)
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


def _gpu_number(device: str) -> str | None:
    """What `CUDA_VISIBLE_DEVICES` must say for a process to see this GPU alone; None for the CPU."""
    if not device.startswith("cuda"):
        return None
    index = int(device.partition(":")[2] or 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index] if visible else str(index)


def _start(load: Load, device: str, threads: int) -> None:
    """Load what a worker's jobs share."""
    global _study
    torch.set_num_threads(threads)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it says a line for every document that is too long
    _study = load(device)


def _run(job: Job) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return run(_study, job)
