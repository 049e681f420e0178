"""Which tiles and how many stretches are fastest on this GPU: the choices in `dha_peft/kernels/launch.py` are read off here.

    python benchmarks/decode_tune.py --csv tune.csv

"hot" times calls back to back over caches that take turns; "cold" puts a large matrix product before every call, as
a model does, and subtracts its time. The bounds are given as the merged model gives them with a static cache.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import statistics
import sys
import time
from dataclasses import astuple
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from decode_kernel import random_map
from decode_measure import copy_bandwidth, time_calls
from torch.nn.attention import SDPBackend, sdpa_kernel

from dha_peft.kernels import decode_kernel, naive_decode

DIM, ROWS = 128, 32
SHAPES = ((32, 4096, 8, 8), (32, 4096, 3, 13), (8, 32768, 8, 8), (1, 32768, 8, 8), (16, 4096, 8, 8), (16, 4110, 8, 8))
SHAPES = (*SHAPES, (1, 530, 8, 8), (1, 4110, 8, 8), (4, 1500, 8, 8))
COLD = ((16, 4096, 8, 8), (1, 32768, 8, 8))


def tilings() -> list:
    from dha_peft.kernels.launch import Tiling

    shapes = (
        (128, 4, 3, 1, True),
        (128, 4, 4, 1, True),
        (128, 4, 2, 2, True),
        (256, 8, 2, 1, True),
        (64, 4, 3, 2, True),
        (128, 8, 3, 1),
        (128, 8, 6, 1),
        (128, 4, 3, 1),
        (128, 4, 2, 2),
        (256, 8, 2, 1),
        (64, 4, 3, 2),
    )
    return [Tiling(ROWS, *shape) for shape in shapes]


class Work:
    """Inputs of one shape, with enough caches that none stays in the chip's own."""

    def __init__(self, batch: int, keys: int, key_heads: int, value_heads: int, turns: int | None = None) -> None:
        self.size = batch * keys * (key_heads + value_heads) * DIM * 2
        self.turns = turns or max(2, -(-3 * 2**28 // self.size))
        new = {"device": "cuda", "dtype": torch.bfloat16}
        self.q = torch.randn(batch, ROWS, 1, DIM, **new)
        self.caches = [
            tuple(torch.randn(batch, heads, keys, DIM, **new) for heads in (key_heads, value_heads))
            for _ in range(self.turns)
        ]
        self.maps = [random_map(heads, ROWS).cuda() for heads in (key_heads, value_heads)]
        full = torch.full((batch,), keys, dtype=torch.int32, device="cuda")
        self.mask = torch.ones(batch, 1, 1, keys, dtype=torch.bool, device="cuda")
        self.plain = {"length": full}
        self.masked = {"mask": self.mask, "start": torch.zeros_like(full), "length": full, "plain": full.clone()}

    def call(self, index: int, tiling=None, splits: int | None = None, masked: bool = False):
        from dha_peft.kernels.launch import launch_decode

        bounds = self.masked if masked else self.plain
        cache = self.caches[index % self.turns]
        return launch_decode(self.q, *cache, *self.maps, DIM**-0.5, tiling=tiling, splits=splits, **bounds)

    def cudnn(self, index: int):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            cache = self.caches[index % self.turns]
            return torch.nn.functional.scaled_dot_product_attention(self.q, *cache, enable_gqa=True)

    def splits(self, tiling) -> list[int]:
        from dha_peft.kernels.launch import choose_splits

        slots = torch.cuda.get_device_properties(0).multi_processor_count * tiling.per_processor
        batch, _, keys, _ = self.caches[0][0].shape
        heads = sum(cache.shape[1] for cache in self.caches[0])
        best = choose_splits(batch, slots, keys, heads, ROWS, tiling.keys)
        even = max(1, slots // batch)
        blocks = -(-keys // tiling.keys)
        rounds = -(-blocks // even)
        return sorted({best, -(-blocks // rounds), 2 * best})


def warm(tiling) -> tuple:
    """Compile one tiling with and without a mask; the error of each against the reference."""
    try:
        work, errors = Work(2, 1000, 3, 5, 1), []
        want = naive_decode(work.q.double(), *(x.double() for x in work.caches[0]), *work.maps)
        for masked in (False, True):
            out = work.call(0, tiling, 3, masked)
            errors.append(float((out.double() - want).norm() / want.norm()))
        return tiling, max(errors), ""
    except Exception as error:  # one variant that does not compile must not lose the others
        return tiling, float("inf"), repr(error)[:160]


def timed(call, size: int) -> float:
    return time_calls(call, max(8, round(6 / (size / 4e9))), torch.device("cuda"), 3)


def hot(good: list, copy: float):
    for shape in SHAPES:
        work = Work(*shape)
        contestants = [("cudnn gqa", 0, work.cudnn)] if shape[2] == shape[3] else []
        for tiling in good:
            for splits in work.splits(tiling):
                contestants.append(
                    (str(astuple(tiling)), splits, lambda i, w=work, t=tiling, s=splits: w.call(i, t, s)),
                )
        rows = []
        for name, splits, call in contestants:
            try:
                ms = timed(call, work.size)
                rows.append(("hot", *shape, name, splits, ms, work.size / ms / 1e6 / copy))
            except RuntimeError as error:
                print("failed", shape, name, splits, str(error)[:100], flush=True)
                torch.cuda.synchronize()
        yield from rows
        print(f"== hot {shape}, copy takes {work.size / copy / 1e6:.4f} ms")
        for row in sorted(rows, key=lambda r: r[7])[:9]:
            print(f"   {row[7]:.4f} ms {row[8]:6.1%}  {row[5]} splits {row[6]}", flush=True)
        if len(rows) > 9:
            best = min((r for r in rows if r[5] != "cudnn gqa"), key=lambda r: r[7])
            tiling = next(t for t in good if str(astuple(t)) == best[5])
            print(f"   of which without combine {_without_combine(work, tiling, best[6]):.4f} ms")
        del work, contestants, call
        torch.cuda.empty_cache()


def _without_combine(work: Work, tiling, splits: int) -> float:
    from dha_peft.kernels import launch

    kept, launch._combine = launch._combine, lambda *args: None
    try:
        return timed(lambda i: work.call(i, tiling, splits), work.size)
    finally:
        launch._combine = kept


def cold(good: list, copy: float):
    weights = [torch.randn(46000, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(24)]
    state = torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16)
    product = lambda i: torch.mm(state, weights[i % 24].t())  # noqa: E731
    base = statistics.median(time_calls(product, 48, torch.device("cuda"), 5) for _ in range(2))
    for shape in COLD:
        work = Work(*shape, turns=24)
        contestants = [("cudnn gqa", 0, work.cudnn)]
        for tiling in good:
            for splits in work.splits(tiling)[:1]:
                for masked in (False, True):
                    name = str(astuple(tiling)) + (" mask" if masked else "")
                    contestants.append(
                        (name, splits, lambda i, w=work, t=tiling, s=splits, m=masked: w.call(i, t, s, m)),
                    )
        rows = []
        for name, splits, call in contestants:
            both = time_calls(lambda i: (product(i), call(i)), 48, torch.device("cuda"), 3)  # noqa: B023
            ms = both - base
            rows.append(("cold", *shape, name, splits, ms, work.size / ms / 1e6 / copy))
        yield from rows
        print(f"== cold {shape}, after a product of {base:.4f} ms")
        for row in sorted(rows, key=lambda r: r[7])[:14] + [r for r in rows if r[5] == "cudnn gqa"]:
            print(f"   {row[7]:.4f} ms {row[8]:6.1%}  {row[5]} splits {row[6]}", flush=True)


def host(calls: int = 400) -> None:
    """Microseconds of host time per call, nothing waited for: what a model that is not compiled pays."""
    work = Work(1, 256, 8, 8, 2)
    ways = {
        "ours": lambda: decode_kernel(work.q, *work.caches[0], *work.maps, DIM**-0.5),
        "ours, mask": lambda: decode_kernel(work.q, *work.caches[0], *work.maps, DIM**-0.5, work.mask),
        "operator": lambda: torch.ops.dha_peft.decode(work.q, *work.caches[0], *work.maps, DIM**-0.5),
        "sdpa gqa": lambda: torch.nn.functional.scaled_dot_product_attention(work.q, *work.caches[0], enable_gqa=True),
    }
    for name, way in ways.items():
        for _ in range(20):
            way()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            way()
        print(f"host {name:12s} {(time.perf_counter() - begin) / calls * 1e6:7.1f} us a call", flush=True)
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=13, help="compile in parallel")
    parser.add_argument("--warm-only", action="store_true", help="fill Triton's cache and leave")
    args = parser.parse_args()
    begin = time.time()
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        warmed = pool.map(warm, tilings(), chunksize=1)
    for tiling, error, note in warmed:
        print(f"{astuple(tiling)} error {error:.1e} {note}")
    print(f"compiled in {time.time() - begin:.0f} s", flush=True)
    if args.warm_only:
        return
    good = [tiling for tiling, error, _ in warmed if error < 4e-3]
    copy = copy_bandwidth(torch.device("cuda"))
    print(f"copy {copy:.0f} GB/s", flush=True)
    with args.csv.open("w", newline="") as file, torch.no_grad():
        writer = csv.writer(file)
        writer.writerow(["way", "batch", "keys", "key_heads", "value_heads", "tiling", "splits", "ms", "share_of_copy"])
        host()
        for rows in (cold(good, copy), hot(good, copy)):
            for row in rows:
                writer.writerow(row)
                file.flush()
    print(f"{time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
