"""Decode steps of whole models, compiled side by side and timed one after the other, each with its kernels by time.

    python benchmarks/decode_step.py --csv step.csv mha:reduce-overhead:32:16x4096 dha:reduce-overhead:32:16x4096

A job is model : compile mode : layers : batch x context, with "+fused" after the model for `fuse_projections()`, and
"+combo" or "+pdl" after the mode for inductor's combo kernels and programmatic launches. Compiling is work for the host, so all jobs do it at once; then one at a time has the GPU.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROOM, REPEATS = 120, 3


def worker(job: str) -> None:
    import torch
    from decode_model import ModelShape, build, decode_loop, filled_cache, heads_of, step_bytes, step_milliseconds

    import dha_peft  # noqa: F401  plugs the kernel in

    model_name, mode, layers, batch, context = re.fullmatch(r"([a-z+]+):([a-z+-]+):(\d+):(\d+)x(\d+)", job).groups()
    shape = ModelShape(layers=int(layers), batch=int(batch), context=int(context))
    device, begin = torch.device("cuda"), time.perf_counter()
    torch.manual_seed(0)
    kind = model_name.split("+")[0]
    model = build(kind, shape, device, torch.bfloat16)
    read = step_bytes(model, shape, heads_of(kind, shape))
    cache = filled_cache(model, shape, shape.batch, "static", ROOM)
    if model_name.endswith("+fused"):
        model.fuse_projections()
    torch.cuda.empty_cache()
    steps = decode_loop(model, cache, shape.batch, mode)
    steps(5)
    print("READY", round(time.perf_counter() - begin, 1), flush=True)
    sys.stdin.readline()
    times = []
    for _ in range(REPEATS):
        steps(2)
        times.append(step_milliseconds(steps, 20))
    result = {"job": job, "ms": sorted(times)[REPEATS // 2], "all_ms": times, "bytes": read}
    result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print("RESULT", json.dumps(result), flush=True)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        steps(4)
    spent: dict[str, list[float]] = {}
    busy, first, last = 0.0, float("inf"), 0.0
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            entry = spent.setdefault(event.name[:90], [0.0, 0])
            entry[0] += event.device_time
            entry[1] += 1
            busy += event.device_time
            first, last = min(first, event.time_range.start), max(last, event.time_range.end)
    result["gpu_busy_ms"], result["gpu_span_ms"] = busy / 4e3, (last - first) / 4e3
    result["kernels"] = [[n, round(t / 4e3, 4), c / 4] for n, (t, c) in sorted(spent.items(), key=lambda x: -x[1][0])]
    print("RESULT", json.dumps(result), flush=True)


class Job:
    """A worker in its own process: it prints READY, waits for `go`, and prints RESULT."""

    def __init__(self, text: str, script: str = __file__) -> None:
        self.text, self.result, self.ready = text, None, threading.Event()
        self.done, self.tail = threading.Event(), []
        command = [sys.executable, script, "--worker", text]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, text=True, **pipes)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            if line.startswith("READY"):
                print(f"ready {self.text} after {line.split()[1]} s", flush=True)
                self.ready.set()
            elif line.startswith("RESULT"):
                self.result = json.loads(line[7:])
            else:
                self.tail = [*self.tail, line.rstrip()[:200]][-6:]
        self.ready.set()
        self.done.set()

    def go(self, seconds: float = 25) -> None:
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except OSError:
            return
        self.done.wait(seconds)
        self.process.kill()
        self.process.wait()  # its memory is free only then


def wait_for(processes: list[int], seconds: float = 120) -> None:
    """Until these processes have ended, and no longer than that."""
    deadline = time.time() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in processes) and time.time() < deadline:
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*")
    parser.add_argument("--worker")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--seconds", type=float, default=120, help="jobs that are not ready by then are given up")
    parser.add_argument("--after", type=int, nargs="*", default=[], help="process ids to wait for before timing")
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker)
    deadline, jobs, results = time.time() + args.seconds, [Job(text) for text in args.jobs], []
    for job in jobs:
        job.ready.wait(max(0.0, deadline - time.time()))
    for job in jobs:  # late ones would disturb the others' times
        if not job.ready.is_set():
            job.process.kill()
    print("all compiled", flush=True)
    wait_for(args.after)
    for job in jobs:
        job.go()
        if job.result is None:
            print(f"no result of {job.text}: {job.tail}", flush=True)
            continue
        results.append(job.result)
        span = job.result.get("gpu_span_ms", float("nan"))
        print(f"===== {job.text} {job.result['ms']:.3f} ms a step, GPU span {span:.3f}", flush=True)
        for name, ms, count in job.result.get("kernels", [])[:14]:
            print(f"   {ms:7.3f} ms {count:6.1f} x {name[:76]}", flush=True)
        if args.csv:
            args.csv.with_suffix(".json").write_text(json.dumps(results))
            _write(args.csv, results)


def _write(path: Path, results: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["job", "ms", "gpu_busy_ms", "gpu_span_ms", "peak_gib"])
        writer.writerows(
            [r.get(key) for key in ("job", "ms", "gpu_busy_ms", "gpu_span_ms", "peak_gib")] for r in results
        )


if __name__ == "__main__":
    main()
