"""Everything that docs/results.md says of decoding on a GPU, in one go of about 110 s: tests, kernel, models, `generate`.

    python benchmarks/decode_all.py --out results
    python benchmarks/decode_all.py --out results --parts generate      # another 80 s: a static cache at full depth

Writes `decode_kernel.csv` and `decode_model.csv`, whose rows of parts that are not run stay. Compiling is work for the host, so the jobs of a group compile side by
side, the first group beside the tests; then one at a time has the GPU. A group fits into 80 GB.
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
from decode_model import ModelShape, build, generate_results, heads_of, prefill_milliseconds
from decode_step import Job

ROOT, BEGIN = Path(__file__).resolve().parents[1], time.time()
MODE = "reduce-overhead"
OTHERS = ("generate:dynamic:6:16x2048", "prefill:dynamic:4:4x4096")
LONG = ("generate:static:32:16x2048",)
FIRST = tuple(f"{name}:{MODE}:16:1x{context}" for context in (512, 32768) for name in ("mha", "dha+fused"))
FIRST = (*FIRST, f"gqa:{MODE}:8:16x4096", f"dha+fused:{MODE}:8:16x4096")
SECOND = (f"dha+fused:{MODE}:32:16x4096", f"mha:{MODE}:32:16x4096")


def say(text: str) -> None:
    print(f"[{time.time() - BEGIN:5.1f} s] {text}", flush=True)


def worker(job: str) -> None:
    """What : cache : layers : batch x context. Runs once to compile and once to be timed, unless it is alone on the machine."""
    import torch

    import dha_peft  # noqa: F401  plugs the kernel in

    what, cache, shape = _job(job)
    device, dtype = torch.device("cuda"), torch.bfloat16

    def run(steps: int) -> dict[str, float]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        if what == "generate":
            results = generate_results(["dha"], shape, device, dtype, steps, cache)
            return {result.name: result.ms for result in results}
        names = ("mha", "gqa", "dha", "pairs")
        return {
            name: prefill_milliseconds(build(name, shape, device, dtype), shape.batch, shape.context) for name in names
        }

    if job not in LONG:
        run(8)
    print("READY", round(time.time() - BEGIN, 1), flush=True)
    sys.stdin.readline()
    print("RESULT", json.dumps({"job": job, "times": run(48)}), flush=True)


def _job(text: str) -> tuple[str, str, ModelShape]:
    """Its first two words and its shape."""
    first, second, layers, batch, context = re.fullmatch(r"([\w+]+):([\w+-]+):(\d+):(\d+)x(\d+)", text).groups()
    return first, second, ModelShape(layers=int(layers), batch=int(batch), context=int(context))


def start(jobs: tuple[str, ...]) -> list[Job]:
    return [Job(job, __file__) if job in OTHERS + LONG else Job(job) for job in jobs]


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
        job.go(150 if job.text in LONG else 25)
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
    generated = {result.name: result.ms for result in results if result.kind == "generate"}
    for cache in ("dynamic", "static"):
        if f"dha loop {cache}" in generated:
            share = generated[f"dha loop {cache}"] / generated[f"dha generate {cache}"]
            say(f"generate reaches {share:.1%} of the loop with a {cache} cache")


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
    parts = ["tests", "models", "kernel", "deep", "generate"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts[:-1])
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker)
    import torch

    device = torch.cuda.get_device_name()
    say(f"torch {torch.__version__}, {device}, {os.cpu_count()} processors")
    args.out.mkdir(parents=True, exist_ok=True)
    path, results = args.out / "decode_model.csv", []
    jobs = start((*FIRST, *OTHERS)) if "models" in args.parts else []
    if "tests" in args.parts:
        parallel = ("-p", "xdist", "-n", str(args.processes)) if args.processes else ()
        run("tests", 60, "-m", "pytest", "tests/kernels", "-q", "--tb=line", "-p", "no:cacheprovider", *parallel)
    results += timed(jobs, max(25, 75 - (time.time() - BEGIN)), device)
    add_csv(path, results)
    if "kernel" in args.parts:
        out = str((args.out / "decode_kernel.csv").resolve())
        run("kernel", 40, "benchmarks/decode.py", "kernel", "--rivals", "cudnn", "flash", "--csv", out)
    for part, texts in (("deep", SECOND), ("generate", LONG)):
        if part in args.parts:
            results += timed(start(texts), 75, device)
            add_csv(path, results)
    compare(results)
    say("end")


if __name__ == "__main__":
    main()
