"""How fast decoding is: the attention kernel alone, or whole models, beside their rivals in the same run.

    python benchmarks/decode.py kernel --shape 32x4096:8/8 --shape 1x32768:5/11
    python benchmarks/decode.py model --batch 16 --context 4096 --models mha gqa dha --largest-batch
    python benchmarks/decode.py model --layers 2 --hidden 512 --intermediate 1024 --batch 1 --context 2048   # on a CPU

A shape is batch x context : key heads / value heads. Works without a GPU (grouped torch beside sdpa on MHA).
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from decode_kernel import Shape, kernel_results
from decode_measure import Result, copy_bandwidth, draw, write_csv

BARS = ("32x4096:8/8", "32x4096:5/11", "32x4096:3/13", "8x32768:8/8", "8x32768:5/11", "8x32768:3/13", "1x32768:8/8")


def parse() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kernel", "model", "generate"])
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--figure", type=Path, help="needs matplotlib")
    kernel = parser.add_argument_group("kernel")
    kernel.add_argument("--shape", action="append", help="batch x context : key heads / value heads; may be repeated")
    kernel.add_argument("--query-heads", type=int, default=32)
    kernel.add_argument("--head-dim", type=int, default=128)
    kernel.add_argument("--rivals", nargs="*", default=["cudnn", "flash", "flex", "sdpa", "expand"])
    model = parser.add_argument_group("model and generate (query heads as above)")
    model.add_argument("--models", nargs="+", default=["mha", "gqa", "dha"], choices=["mha", "gqa", "dha"])
    for name, value in {"layers": 32, "hidden": 4096, "intermediate": 11008, "vocab": 32000, "key-heads": 8,
                        "value-heads": 8, "batch": 16, "context": 4096, "steps": 32}.items():  # fmt: skip
        model.add_argument(f"--{name}", type=int, default=value)
    model.add_argument("--cache", choices=["static", "dynamic"], help="static for model, dynamic for generate")
    model.add_argument("--eager", action="store_true", help="no torch.compile")
    model.add_argument("--largest-batch", action="store_true")
    return parser.parse_args()


def shape_of(text: str, query_heads: int, head_dim: int) -> Shape:
    match = re.fullmatch(r"(\d+)x(\d+):(\d+)/(\d+)", text)
    if not match:
        raise ValueError(f"`--shape` is {text!r}; write batch x context : key heads / value heads, as in 32x4096:5/11.")
    batch, context, keys, values = map(int, match.groups())
    return Shape(batch, context, query_heads, keys, values, head_dim)


def main() -> None:
    args = parse()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    copy = copy_bandwidth(device)
    print(f"torch {torch.__version__}, {args.device}, copy {copy:.0f} GB/s", flush=True)
    results: list[Result] = []
    for result in measured(args, device, dtype, copy):
        print(result.line(), flush=True)
        results.append(result)
    if args.csv:
        write_csv(args.csv, results)
    if args.figure:
        draw(args.figure, results)


def measured(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, copy: float):
    if args.what == "kernel":
        default = BARS if device.type == "cuda" else ("1x512:8/8", "1x2048:8/8", "1x4096:5/11", "4x2048:8/8")
        for text in args.shape or default:
            yield from kernel_results(
                shape_of(text, args.query_heads, args.head_dim), device, dtype, copy, set(args.rivals)
            )
        return
    from decode_model import ModelShape, generate_results, model_results

    names = ("layers", "hidden", "intermediate", "vocab", "query_heads", "key_heads", "value_heads", "batch", "context")
    shape = ModelShape(**{name: getattr(args, name) for name in names})
    if args.what == "generate":
        yield from generate_results(args.models, shape, device, dtype, args.steps, args.cache or "dynamic")
    else:
        yield from model_results(
            args.models,
            shape,
            device,
            dtype,
            copy,
            args.steps,
            args.cache or "static",
            not args.eager,
            args.largest_batch,
        )


if __name__ == "__main__":
    main()
