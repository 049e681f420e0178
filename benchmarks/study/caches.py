"""Together with other ways to a smaller cache: quantization of keys and values, and eviction of tokens.

    python -m benchmarks.study.caches --model FOLDER --text TRAIN... --validation FILE --pretraining-tokens 286e6

A context is prefilled, the cache quantized (transformers' `QuantizedCache`) or thinned out (kvpress), and the loss of the continuation
measured on what is left, beside the bytes of the cache's tensors. Weights and cache are bfloat16.

kvpress picks tokens for every key head apart and reads the values of the same head, so it needs as many value heads as key heads. A DHA
layer has fewer of one kind; here the scores of a layer are averaged over its key heads, and all heads of the layer keep the same tokens, in
every model. Install it with `pip install --no-deps kvpress cachetools fire termcolor`: it asks for an older transformers, but works.
Quantization needs `optimum-quanto`.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, QuantizedCache, set_seed

from .heads import write
from .methods import METHODS, Job
from .prepare import load, prepare
from .recovery import Study, recover
from .tables import add_data, devices


@dataclass(frozen=True)
class Variant:
    """One way to hold the context: `bits` of quantization, or `press` (a class of kvpress) keeping `keep` of the tokens."""

    label: str
    bits: int = 16
    press: str = ""
    keep: float = 1.0


VARIANTS = (
    Variant("full"),
    Variant("4 bits", bits=4),
    Variant("2 bits", bits=2),
    *(Variant(f"{press.removesuffix('Press')}, {100 * keep:g} % of tokens", press=press, keep=keep)
      for press in ("KnormPress", "StreamingLLMPress", "KeyDiffPress") for keep in (0.5, 0.25)),
)  # fmt: skip
GROUP = 32
"""Numbers that share a scale and a shift in the quantized cache; a head of every model here is a multiple of it."""


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prepared.pt"
        prepare(args, path, round(args.fraction * args.pretraining_tokens))
        study = load(path, args.model, args.device, pretraining_tokens=args.pretraining_tokens)
    write(args.results / "caches.csv", measured(study, args))


def measured(study: Study, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per model and variant. `bytes_per_token`: of the prefilled cache, over the tokens of the context."""
    windows = study.validation[: args.windows * args.length].view(-1, args.length).to(args.measure_device)
    for method, budget in [("base", 1.0), *((m, b) for m in args.methods for b in args.budgets)]:
        model = trained(
            study, Job(method, budget, args.fraction, METHODS[method].share, args.seed), args.measure_device
        )
        for variant in VARIANTS:
            loss, size = continuation(model, windows, args.context, variant)
            yield {
                "method": method,
                "budget": budget,
                "fraction": args.fraction,
                "cache": variant.label,
                "loss": round(loss, 4),
                "bytes_per_token": round(size, 1),
            }
            print(f"{method} {budget} {variant.label}: {loss:.4f}, {size:.1f} bytes per token", flush=True)


def trained(study: Study, job: Job, device: str) -> nn.Module:
    """The job's model in bfloat16 on the device that measures; the base itself needs no training."""
    set_seed(job.seed)
    model = study.base if job.method == "base" else recover(study, job, study.order(job))[0]
    return copy.deepcopy(model).to(device=device, dtype=torch.bfloat16).eval()


@torch.no_grad()
def continuation(model: nn.Module, windows: Tensor, context: int, variant: Variant) -> tuple[float, float]:
    """Mean loss (nats per token) of the windows' tokens after the first `context + 1`, and bytes of cache per context token."""
    total, size = 0.0, 0
    for rows in windows.split(8):
        cache, places = new_cache(model, variant), torch.arange(rows.shape[1], device=rows.device)
        with thinned(model, variant):
            model(rows[:, :context], past_key_values=cache, cache_position=places[:context])
        size += cache_bytes(cache)
        inputs, positions = rows[:, context:-1], places[None, context:-1].expand(len(rows), -1)
        logits = model(inputs, past_key_values=cache, position_ids=positions).logits.float()
        total += float(
            nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, context + 1 :].flatten(), reduction="sum")
        )
    return total / (len(windows) * (windows.shape[1] - context - 1)), size / (len(windows) * context)


def new_cache(model: nn.Module, variant: Variant) -> Cache:
    if variant.bits == 16:
        return DynamicCache(config=model.config)
    axes = {"axis_key": 0, "axis_value": 0, "q_group_size": GROUP}
    return QuantizedCache(backend="quanto", config=model.config, nbits=variant.bits, **axes)


def thinned(model: nn.Module, variant: Variant):
    """Within it, a prefill keeps only the variant's tokens."""
    if not variant.press:
        return nullcontext()
    import kvpress  # patches transformers' attention functions, so only where it is used

    return shared_choice(getattr(kvpress, variant.press))(compression_ratio=1 - variant.keep)(model)


def shared_choice(press: type) -> type:
    """The press with one choice of tokens for all heads of a layer, by the mean of its scores over the key heads."""

    class Shared(press):
        def compress(self, module, hidden_states, keys, values, attentions, kwargs):
            scores = self.score(module, hidden_states, keys, values, attentions, kwargs).mean(1)
            count = int(scores.shape[-1] * (1 - self.compression_ratio))
            kept = scores.topk(count, dim=-1).indices.sort(-1).values[:, None, :, None]
            return tuple(
                states.gather(2, kept.expand(-1, states.shape[1], -1, states.shape[3])) for states in (keys, values)
            )

    return Shared


def cache_bytes(cache: Cache) -> int:
    """Bytes of all tensors that hold keys and values, scales and shifts of quantized ones included."""
    names = ("keys", "values", "_quantized_keys", "_quantized_values")
    return sum(_bytes(getattr(layer, name, None)) for layer in cache.layers for name in names)


def _bytes(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data(parser)
    parser.add_argument("--pretraining-tokens", type=float, required=True)
    parser.add_argument("--fraction", type=float, default=0.0025, help="of these tokens to train on; 0 trains nothing")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["aligned"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--context", type=int, default=384, help="tokens that are prefilled; the row's others continue")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("docs/results/study"))
    parser.add_argument("--device", default=devices()[0], help="for calibration and training")
    parser.add_argument(
        "--measure-device", help="for the caches (default: the same); quanto compiles its kernels on a GPU"
    )
    args = parser.parse_args()
    args.measure_device = args.measure_device or args.device
    return args


if __name__ == "__main__":
    main()
