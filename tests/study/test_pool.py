"""Workers: every process sees one GPU and no other."""

from __future__ import annotations

import os
from concurrent.futures import Future

from benchmarks.study.methods import Job
from benchmarks.study.pool import Workers


class Recorded:
    """A pool that notes what a process would inherit."""

    def __init__(self, *_) -> None:
        self.seen: list[str | None] = []

    def submit(self, _function, job: Job) -> Future:
        self.seen.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
        future: Future = Future()
        future.set_result(job)
        return future


def test_gpus_are_handed_out_in_turn_among_the_visible_ones(monkeypatch):
    monkeypatch.setattr("benchmarks.study.pool.ProcessPoolExecutor", Recorded)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    workers = Workers(3, ["cuda:0", "cuda:1"], lambda device: None)
    for seed in range(3):
        workers.submit(Job("gqa", 0.5, 0.01, 0.0, seed))
    assert not workers.free and [pool.seen for pool in workers.pools] == [["4", "4"], ["7"]]
    assert len(workers.ended()) == 3 and sorted(workers.free) == [0, 0, 1]
