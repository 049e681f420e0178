"""Timing and results shared by the decode benchmarks."""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch


@dataclass
class Result:
    """One measured line. `gb_s` counts keys and values (kernel) or keys, values and weights (model), each once."""

    kind: str
    name: str
    batch: int
    context: int
    query_heads: int
    key_heads: int
    value_heads: int
    head_dim: int
    dtype: str
    device: str
    ms: float = float("nan")
    gb_s: float = float("nan")
    share_of_copy: float = float("nan")
    tokens_s: float = float("nan")
    peak_gib: float = float("nan")
    largest_batch: int = 0
    note: str = ""

    def line(self) -> str:
        heads = f"{self.key_heads}/{self.value_heads}"
        shape = f"{self.kind:9s} {self.batch:4d} x {self.context:<6d} {heads:>6s} of {self.query_heads:<3d}"
        if self.ms != self.ms:
            return f"{shape} {self.name:22s} not measured: {self.note}"
        text = f"{shape} {self.name:22s} {self.ms:9.4f} ms"
        text += f" {self.gb_s:8.1f} GB/s" if self.gb_s == self.gb_s else ""
        text += f" {self.share_of_copy:6.1%} of copy" if self.share_of_copy == self.share_of_copy else ""
        text += f" {self.tokens_s:10.0f} tokens/s" if self.tokens_s == self.tokens_s else ""
        text += f"  peak {self.peak_gib:.1f} GiB" if self.peak_gib == self.peak_gib else ""
        text += f"  largest batch {self.largest_batch}" if self.largest_batch else ""
        return f"{text}  {self.note}".rstrip()


def time_calls(call: Callable[[int], object], calls: int, device: torch.device, repeats: int = 5) -> float:
    """Milliseconds per call, median over `repeats` runs of `calls` calls; on CUDA inside a graph, so without launch gaps."""
    if device.type != "cuda":
        call(0)
        return statistics.median(_wall(call, calls) for _ in range(repeats))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for index in range(2):
            call(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            call(index)
    graph.replay()
    return statistics.median(cuda_milliseconds(graph.replay) / calls for _ in range(repeats))


def cuda_milliseconds(call: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def _wall(call: Callable[[int], object], calls: int) -> float:
    begin = time.perf_counter()
    for index in range(calls):
        call(index)
    return (time.perf_counter() - begin) * 1000 / calls


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a large copy, bytes read plus bytes written: the speed that memory-bound work is held against."""
    size = 2**31 if device.type == "cuda" else 2**27
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    calls = 8
    target.copy_(source)
    if device.type == "cuda":
        times = [cuda_milliseconds(lambda: [target.copy_(source) for _ in range(calls)]) / calls for _ in range(5)]
    else:
        times = [_wall(lambda _: target.copy_(source), calls) for _ in range(5)]
    return 2 * size / statistics.median(times) / 1e6


def write_csv(path: Path, results: Sequence[Result]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Result)])
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)


def read_csv(path: Path) -> list[Result]:
    """The rows of `write_csv`; none if there is no such file."""
    if not path.exists():
        return []
    kinds = {field.name: {"int": int, "float": float, "str": str}[str(field.type)] for field in fields(Result)}
    with path.open(newline="") as file:
        return [Result(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]


def draw(path: Path, results: Sequence[Result]) -> None:
    """Time per call or step, one bar per line measured, one panel per shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes: dict[tuple[str, int, int], list[Result]] = {}
    for result in results:
        if result.ms == result.ms:
            shapes.setdefault((result.kind, result.batch, result.context), []).append(result)
    figure, axes = pyplot.subplots(len(shapes), 1, figsize=(8, 2.4 * len(shapes)), squeeze=False, layout="constrained")
    for axis, ((kind, batch, context), group) in zip(axes[:, 0], shapes.items(), strict=True):
        labels = [f"{r.name} {r.key_heads}/{r.value_heads}" for r in group]
        axis.barh(labels, [r.ms for r in group], color=["tab:orange" if "dha" in r.name else "tab:blue" for r in group])
        axis.invert_yaxis()
        axis.set(title=f"{kind}, batch {batch} x {context}", xlabel="ms")
    figure.savefig(path)
