"""Everything that docs/results.md says of decoding on a GPU, in one go: tests, kernel, models, `generate`.

    python benchmarks/decode_all.py --out results
    python benchmarks/decode_all.py --out results --parts kernel      # that part alone

Writes `decode_kernel.csv` and `decode_model.csv`, whose rows of parts that are not run stay. Compiling is work for the
host, so the jobs of a part compile side by side, the first part's beside the tests; then one at a time has the GPU. The
jobs of a part fit into 80 GB together.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import re
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from decode_measure import Result, read_csv, write_csv
from decode_model import ModelShape, build, generate_results, heads_of, prefill_milliseconds, step_mode
from decode_step import Job

ROOT, BEGIN = Path(__file__).resolve().parents[1], time.time()
OTHERS = ("generate", "prefill")


def step(name: str, shape: str) -> str:
    return f"{name}:{step_mode(name)}:{shape}"


PARTS = {
    "single": tuple(step(name, f"16:1x{context}") for context in (512, 4096, 32768) for name in ("mha", "dha+fused")),
    "deep": (step("mha", "32:16x4096"), step("dha+fused", "32:16x4096")),
    "more": (step("gqa", "32:16x4096"), "prefill:dynamic:4:4x4096", "generate+dha:static:32:16x2048"),
    "generate": ("generate+mha:static:16:16x2048", "generate+dha:static:16:16x2048", "generate+dha:dynamic:16:16x2048"),
}  # fmt: skip


def say(text: str) -> None:
    print(f"[{time.time() - BEGIN:5.1f} s] {text}", flush=True)


def worker(job: str) -> None:
    """What : cache : layers : batch x context."""
    import torch

    import dha_peft  # noqa: F401  plugs the kernel in

    (what, cache, shape), device, dtype = _job(job), torch.device("cuda"), torch.bfloat16
    what, *names = what.split("+")
    torch.manual_seed(0)
    if what == "generate":
        results = generate_results(names, shape, device, dtype, 48, cache, wait_for_go)
        found = {result.name: result.ms for result in results}
    else:
        wait_for_go()
        found = {
            name: prefill_milliseconds(build(name, shape, device, dtype), shape.batch, shape.context)
            for name in ("mha", "gqa", "dha", "pairs")
        }
    print("RESULT", json.dumps({"job": job, "times": found}), flush=True)


def wait_for_go() -> None:
    print("READY", round(time.time() - BEGIN, 1), flush=True)
    sys.stdin.readline()


def _job(text: str) -> tuple[str, str, ModelShape]:
    """Its first two words and its shape."""
    first, second, layers, batch, context = re.fullmatch(r"([\w+]+):([\w+-]+):(\d+):(\d+)x(\d+)", text).groups()
    return first, second, ModelShape(layers=int(layers), batch=int(batch), context=int(context))


def start(jobs: tuple[str, ...]) -> list[Job]:
    return [Job(job, __file__) if job.startswith(OTHERS) else Job(job) for job in jobs]


def timed(jobs: list[Job], seconds: float, device: str) -> list[Result]:
    """Results of these jobs, one after the other, once all of them have compiled or `seconds` are over."""
    deadline, results = time.time() + seconds, []
    for job in jobs:
        job.ready.wait(max(0.0, deadline - time.time()))
    for job in jobs:  # late ones would disturb the others' times
        if not job.ready.is_set():
            job.process.kill()
    say("compiled")
    for job in jobs:
        job.go(40)
        if job.result is None:
            say(f"no result of {job.text}: {' / '.join(job.tail)}")
            continue
        found = _several(job.result, device) if "times" in job.result else [_step(job.result, device)]
        for result in found:
            say(result.line())
        results += found
    return results


def _step(result: dict, device: str) -> Result:
    spent = ", ".join(f"{kernel[:24]} {busy:.3f}" for kernel, busy, _ in result.get("kernels", [])[:3])
    say(f"   {spent}")
    (name, _, shape), ms = _job(result["job"]), result["ms"]
    return Result(
        "model", f"{name} static compiled", shape.batch, shape.context, shape.query_heads,
        *heads_of(name.split("+")[0], shape), 128, "bfloat16", device, ms, result["bytes"] / ms / 1e6,
        tokens_s=shape.batch / ms * 1000, peak_gib=result["peak_gib"], note=f"{shape.layers} layers",
    )  # fmt: skip


def _several(result: dict, device: str) -> list[Result]:
    what, _, shape = _job(result["job"])
    what = what.split("+")[0]
    tokens = shape.batch * (shape.context if what == "prefill" else 1)
    return [
        Result(what, name, shape.batch, shape.context, shape.query_heads, *heads_of(name.split()[0], shape), 128,
               "bfloat16", device, ms, tokens_s=tokens / ms * 1000, note=f"{shape.layers} layers")
        for name, ms in result["times"].items()
    ]  # fmt: skip


def run(name: str, seconds: float, *command: str) -> None:
    """A step of its own process; what it prints last is shown, also when its time is over."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        out, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        say(f"{name} was stopped after {seconds:.0f} s")
    lines = [line[:118] for line in out.splitlines() if "Warning" not in line and "warn" not in line]
    print("\n".join(lines[-44:]), flush=True)
    say(f"{name} ended with {process.returncode}")


def compare(results: list[Result]) -> None:
    """How many times as fast ours is as each other model that was measured on the same shape and depth."""
    steps = [result for result in results if result.kind == "model"]
    for ours in (result for result in steps if result.name.startswith("dha")):
        for other in steps:
            same = (other.batch, other.context, other.note) == (ours.batch, ours.context, ours.note)
            if same and other is not ours:
                say(f"{ours.batch} x {ours.context}: {other.ms / ours.ms:.2f} times as fast as {other.name}")
    for ours in (result for result in results if result.kind == "generate" and " generate " in result.name):
        for loop in results:
            if (loop.name, loop.note) == (ours.name.replace("generate", "loop"), ours.note):
                say(f"{ours.name}, {ours.note}: {loop.ms / ours.ms:.1%} of the loop, {ours.ms - loop.ms:.2f} ms more")


def add_csv(path: Path, results: list[Result]) -> None:
    """Write these rows after those of other jobs that the file has already."""
    key = operator.attrgetter("kind", "name", "batch", "context", "note")
    known = {key(result) for result in results}
    write_csv(path, [row for row in read_csv(path) if key(row) not in known] + results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--worker")
    parser.add_argument("--processes", type=int, default=6, help="of the tests (needs pytest-xdist), 0 for none")
    parser.add_argument("--rivals", nargs="*", default=["cudnn", "flash", "flex"], help="of the kernel")
    parser.add_argument("--seconds", type=float, default=150, help="jobs that have not compiled by then are given up")
    parts = ["tests", *PARTS, "kernel"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker)
    import torch

    device = torch.cuda.get_device_name()
    say(f"torch {torch.__version__}, {device}, {os.cpu_count()} processors")
    args.out.mkdir(parents=True, exist_ok=True)
    path, results = args.out / "decode_model.csv", []
    chosen = [part for part in PARTS if part in args.parts]
    jobs = start(PARTS[chosen[0]]) if chosen else []
    if "tests" in args.parts:
        parallel = ("-p", "xdist", "-n", str(args.processes)) if args.processes else ()
        tests = ("tests/kernels", "-q", "--tb=line", "-p", "no:cacheprovider")
        run("tests", 150, "-m", "pytest", *tests, *parallel)
    for part in chosen:
        jobs = jobs or start(PARTS[part])
        results += timed(jobs, args.seconds, device)
        add_csv(path, results)
        jobs = []
    if "kernel" in args.parts:
        out = str((args.out / "decode_kernel.csv").resolve())
        run("kernel", 120, "benchmarks/decode.py", "kernel", "--csv", out, "--rivals", *args.rivals)
    compare(results)
    say("end")


if __name__ == "__main__":
    main()
