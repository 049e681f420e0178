"""Products of a few rows with large weights, as in a decode step: a streaming kernel in Triton beside cuBLAS.

    python benchmarks/decode_linear.py --csv linear.csv --seconds 40

Every product is timed on weights that take turns, so that none is in the chip's own cache, and all four of a layer in
a row, with a small kernel between them as in a model.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from dataclasses import astuple, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import triton
import triton.language as tl
from decode_measure import copy_bandwidth, time_calls
from decode_step import wait_for

LAYER = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)}
# rows, depth, stages, warps, programs that run at once on 132 multiprocessors
SHAPES = ((64, 128, 3, 4, 396), (64, 128, 4, 4, 264), (128, 128, 4, 4, 132), (128, 64, 5, 4, 264), (64, 256, 3, 4, 132))


@dataclass(frozen=True)
class Tile:
    rows: int  # outputs of one program
    depth: int  # inputs of one step
    stages: int
    warps: int
    splits: int
    pdl: bool = True
    prefetch: int = 0


@triton.jit(do_not_specialize=["tokens", "splits"])
def linear_kernel(
    x_ptr, w_ptr, out_ptr, part_ptr, count_ptr, tokens, outputs, inputs, splits,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr,
    PDL: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of outputs, splits). `out [tokens, outputs] = x [tokens, inputs] w [outputs, inputs]^T`.

    With SPLIT the last program of a block adds up what all of them left in `part [blocks, splits, ROWS, TOKENS]`, and
    sets its count back to 0.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row, token, col = block * ROWS + tl.arange(0, ROWS), tl.arange(0, TOKENS), tl.arange(0, DEPTH)
    steps = tl.cdiv(inputs, DEPTH)
    share = tl.cdiv(steps, splits)
    first, last = split * share, tl.minimum(steps, split * share + share)
    w_row = w_ptr + tl.minimum(row, outputs - 1)[:, None].to(tl.int64) * inputs
    if PREFETCH:  # weights do not depend on the kernel ahead
        line = tl.arange(0, DEPTH // 64)[None, :] * 64
        for step in tl.static_range(PREFETCH):
            ahead = (w_row + tl.minimum((first + step) * DEPTH, inputs - DEPTH) + line).to(tl.int64)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [ahead], dtype=tl.int32, is_pure=False, pack=1
            )
    if PDL:
        tl.extra.cuda.gdc_wait()
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        at = step * DEPTH + col
        w = tl.load(w_row + at[None, :], mask=(at < inputs)[None, :], other=0.0)
        x = tl.load(
            x_ptr + token[None, :] * inputs + at[:, None],
            mask=(at < inputs)[:, None] & (token < tokens)[None, :],
            other=0.0,
        )
        total = tl.dot(w, x, total)
    out_at = out_ptr + token[None, :] * outputs + row[:, None]
    real = (row < outputs)[:, None] & (token < tokens)[None, :]
    if SPLIT:
        inside = tl.arange(0, ROWS)[:, None] * TOKENS + token[None, :]
        base = part_ptr + block * splits * ROWS * TOKENS + inside
        tl.store(base + split * ROWS * TOKENS, total)
        tl.debug_barrier()
        done = tl.atomic_add(count_ptr + block, 1, sem="acq_rel")
        if done == splits - 1:
            total = tl.zeros([ROWS, TOKENS], tl.float32)
            for other in range(splits):
                total += tl.load(base + other * ROWS * TOKENS, cache_modifier=".cg")
            tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=real)
            tl.atomic_xchg(count_ptr + block, 0)
    else:
        tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=real)


class Linear:
    """Buffers of one shape, and a call."""

    def __init__(self, outputs: int, inputs: int, device: str = "cuda") -> None:
        self.outputs, self.inputs = outputs, inputs
        self.count = torch.zeros(4096, dtype=torch.int32, device=device)
        self.part = torch.empty(4 * 2**20, dtype=torch.float32, device=device)

    def __call__(self, x, w, tile: Tile):
        out = x.new_empty(x.shape[0], self.outputs)
        blocks = -(-self.outputs // tile.rows)
        linear_kernel[(blocks, tile.splits)](
            x, w, out, self.part, self.count, x.shape[0], self.outputs, self.inputs, tile.splits,
            TOKENS=max(16, triton.next_power_of_2(x.shape[0])), ROWS=tile.rows, DEPTH=tile.depth, STAGES=tile.stages, SPLIT=tile.splits > 1,
            PDL=tile.pdl, PREFETCH=tile.prefetch, num_warps=tile.warps, **({"launch_pdl": True} if tile.pdl else {}),
        )  # fmt: skip
        return out


def tiles(outputs: int, inputs: int) -> list[Tile]:
    found = []
    for rows, depth, stages, warps, fit in SHAPES:
        blocks = -(-outputs // rows)
        best = [n for n in range(1, 9) if blocks * n <= fit] or [1]
        for splits in {best[-1], max(1, best[-1] // 2)}:
            found += [Tile(rows, depth, stages, warps, splits, True, fetch) for fetch in (0, 2)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--after", type=int, nargs="*", default=[], help="process ids to wait for before timing")
    args = parser.parse_args()
    device, begin = torch.device("cuda"), time.time()
    new, rows, best = {"device": device, "dtype": torch.bfloat16}, [], {}
    turns = 12
    weights = {name: [torch.randn(*shape, **new) / 64 for _ in range(turns)] for name, shape in LAYER.items()}
    inputs = {name: torch.randn(args.tokens, shape[1], **new) for name, shape in LAYER.items()}
    linears = {name: Linear(*shape) for name, shape in LAYER.items()}
    candidates = [(name, tile) for name, shape in LAYER.items() for tile in tiles(*shape)]

    def compile_one(pair):
        try:
            linears[pair[0]](inputs[pair[0]], weights[pair[0]][0], pair[1])
        except Exception as error:  # one that does not fit must not lose the others
            return f"{pair}: {str(error)[:100]}"

    for failure in filter(None, map(compile_one, candidates)):
        print(failure)
    torch.cuda.synchronize()
    print(f"compiled {len(candidates)} in {time.time() - begin:.0f} s", flush=True)
    wait_for(args.after)
    begin, copy = time.time(), copy_bandwidth(device)
    with args.csv.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["product", "tile", "error", "ms", "share_of_copy"])

        def note(name, what, error, ms, size):
            rows.append((name, what, error, ms, size / ms / 1e6 / copy))
            writer.writerow(rows[-1])
            file.flush()

        for name, linear in linears.items():
            x, all_w = inputs[name], weights[name]
            size = all_w[0].numel() * 2
            ms = time_calls(lambda i: x @ all_w[i % 12].t(), 48, device, 3)  # noqa: B023
            note(name, "cublas", 0.0, ms, size)
            want = x.double() @ all_w[1].double().t()
            for tile in [tile for other, tile in candidates if other == name]:
                if time.time() - begin > args.seconds * 0.8:
                    break
                try:
                    errors = [float((linear(x, all_w[1], tile).double() - want).norm() / want.norm()) for _ in range(3)]
                    ms = time_calls(lambda i: linear(x, all_w[i % 12], tile), 48, device, 3)  # noqa: B023
                    note(name, astuple(tile), max(errors), ms, size)
                    if max(errors) < 4e-3 and ms < best.get(name, (1e9,))[0]:
                        best[name] = ms, tile
                except RuntimeError as error:
                    print("failed", name, tile, str(error)[:100])
            for row in sorted((r for r in rows if r[0] == name), key=lambda r: r[3])[:5]:
                print(f"{row[0]:8s} {row[3]:.4f} ms {row[4]:6.1%} error {row[2]:.1e} {row[1]}", flush=True)

        def layer(i, ours):
            for name, linear in linears.items():
                x = inputs[name] + 1
                linear(x, weights[name][i % 12], best[name][1]) if ours else x @ weights[name][i % 12].t()

        size = sum(w[0].numel() * 2 for w in weights.values())
        for ours in (False, True):
            ms = time_calls(lambda i: layer(i, ours), 24, device, 5)  # noqa: B023
            note("layer", "ours" if ours else "cublas", 0.0, ms, size)
            print(f"layer {rows[-1][1]} {ms:.4f} ms {rows[-1][4]:.1%}", flush=True)


if __name__ == "__main__":
    main()
