"""Whole decode steps: a random Llama, its GQA of equal bytes, and its fused counterpart, through transformers alone."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from decode_measure import Result
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache, StoppingCriteria

from dha_peft.models import build_merged
from dha_peft.models.cache_view import CacheView
from dha_peft.plan import DHAPlan, LayerPlan

WARM_STEPS = 6
# What a mode may be followed by, as in "reduce-overhead+pdl": inductor's programmatic launches, one kernel for several.
EXTRA = {"pdl": "triton.enable_pdl", "combo": "combo_kernels"}
Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ModelShape:
    """Defaults are Llama-2-7B with a quarter of its KV heads."""

    layers: int = 32
    hidden: int = 4096
    intermediate: int = 11008
    vocab: int = 32000
    query_heads: int = 32
    key_heads: int = 8
    value_heads: int = 8
    batch: int = 16
    context: int = 4096


def build(name: str, shape: ModelShape, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Name "mha", "gqa" (as many KV heads as ours on average), "dha" (random groups) or "pairs" (a key head and a value head
    for each run of neighbouring query heads), with random weights."""
    kv_heads = (shape.key_heads + shape.value_heads) // 2 if name == "gqa" else shape.query_heads
    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.query_heads, num_key_value_heads=kv_heads,
        max_position_embeddings=shape.context + 4096, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    return _fused(model, shape, _random_groups if name == "dha" else _runs) if name in ("dha", "pairs") else model


def _fused(base: PreTrainedModel, shape: ModelShape, groups: Callable[[int, int], Groups]) -> PreTrainedModel:
    head_dim = shape.hidden // shape.query_heads
    layers, weights = [], []
    for layer in base.model.layers:
        plan = LayerPlan(groups(shape.query_heads, shape.key_heads), groups(shape.query_heads, shape.value_heads))
        attention = layer.self_attn
        layers.append(plan)
        weights.append({
            "q": attention.q_proj.weight, "o": attention.o_proj.weight,
            "k": attention.k_proj.weight[: shape.key_heads * head_dim],
            "v": attention.v_proj.weight[: shape.value_heads * head_dim],
        })  # fmt: skip
    return build_merged(base, DHAPlan(tuple(layers), head_dim), weights, share=True)


def _random_groups(heads: int, groups: int) -> Groups:
    order = torch.randperm(heads).tolist()
    return tuple(tuple(order[index::groups]) for index in range(groups))


def _runs(heads: int, groups: int) -> Groups:
    size = heads // groups
    return tuple(tuple(range(index * size, (index + 1) * size)) for index in range(groups))


def filled_cache(
    model: PreTrainedModel, shape: ModelShape, batch: int, kind: str, room: int
) -> StaticCache | DynamicCache:
    """A cache that holds `context` random tokens; a static one has room for `room` more."""
    config, parameter = model.config, next(model.parameters())
    static = kind == "static"
    cache = StaticCache(config=config, max_cache_len=shape.context + room) if static else DynamicCache(config=config)
    head_dim = shape.hidden // shape.query_heads
    for index, layer in enumerate(model.model.layers):
        heads = (layer.self_attn.k_proj.out_features // head_dim, layer.self_attn.v_proj.out_features // head_dim)
        states = [
            torch.randn(batch, n, shape.context, head_dim, device=parameter.device, dtype=parameter.dtype)
            for n in heads
        ]
        CacheView(cache).update(*states, index)
    return cache


def step_mode(name: str) -> str:
    """How a model's step is compiled: GQA of transformers is slower with the extras, the others are faster."""
    return "reduce-overhead" if name == "gqa" else "reduce-overhead+pdl+combo"


def compile_step(step: Callable[[torch.Tensor], torch.Tensor], mode: str) -> Callable[[torch.Tensor], torch.Tensor]:
    import torch._inductor

    name, *extra = mode.split("+")
    options = {**torch._inductor.list_mode_options(name), **dict.fromkeys(map(EXTRA.get, extra), True)}
    return torch.compile(step, options=options, fullgraph=True)


def decode_loop(
    model: PreTrainedModel, cache: StaticCache | DynamicCache, batch: int, mode: str | None
) -> Callable[[int], None]:
    """Takes so many greedy decode steps, argmax included, and waits for the last one. Without a mode nothing is compiled."""
    device = next(model.parameters()).device
    token = torch.zeros(batch, 1, dtype=torch.long, device=device)

    def step(token: torch.Tensor) -> torch.Tensor:
        return model(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)

    run = step if mode is None else compile_step(step, mode)

    @torch.no_grad()
    def steps(count: int) -> None:
        nonlocal token
        for _ in range(count):
            if mode is not None:
                torch.compiler.cudagraph_mark_step_begin()
            token = run(token).clone()
        _synchronize(device)

    return steps


def step_milliseconds(loop: Callable[[int], None], steps: int) -> float:
    """Wall time of one of `steps` steps of a `decode_loop` that has compiled."""
    begin = time.perf_counter()
    loop(steps)
    return (time.perf_counter() - begin) * 1000 / steps


@torch.no_grad()
def prefill_milliseconds(model: PreTrainedModel, batch: int, tokens: int, repeats: int = 3) -> float:
    """Wall time of a forward pass over a prompt into an empty dynamic cache, logits of the last token only."""
    device, times = next(model.parameters()).device, []
    ids = torch.randint(1, model.config.vocab_size, (batch, tokens), device=device)
    for _ in range(1 + repeats):
        _synchronize(device)
        begin = time.perf_counter()
        model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)
        _synchronize(device)
        times.append((time.perf_counter() - begin) * 1000)
    return sorted(times[1:])[repeats // 2]


class Clock(StoppingCriteria):
    """Never stops; notes when `generate` has made its first `skip` tokens."""

    def __init__(self, device: torch.device, skip: int) -> None:
        self.device, self.skip, self.begin = device, skip, 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.skip -= 1
        if self.skip == 0:
            _synchronize(self.device)
            self.begin = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generate_milliseconds(model: PreTrainedModel, batch: int, prompt: int, steps: int, **options: object) -> float:
    """Wall time per token of `model.generate` after the prompt and its first tokens, compiling included."""
    device = next(model.parameters()).device
    ids = torch.randint(1, model.config.vocab_size, (batch, prompt), device=device)
    new, clock = WARM_STEPS + steps, Clock(device, WARM_STEPS)
    model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, stopping_criteria=[clock], **options)
    _synchronize(device)
    return (time.perf_counter() - clock.begin) * 1000 / steps


def model_results(
    names: list[str], shape: ModelShape, device: torch.device, dtype: torch.dtype, copy: float, steps: int, kind: str,
    compiled: bool, largest: bool,
) -> Iterator[Result]:  # fmt: skip
    """Measure every named model in turn, ours with its projections fused; only one is in memory at a time."""
    for name in names:
        model = build(name, shape, device, dtype)
        heads = heads_of(name, shape)
        result = Result(
            "model", f"{name} {kind}{' compiled' if compiled else ''}", shape.batch, shape.context, shape.query_heads,
            *heads, shape.hidden // shape.query_heads, str(dtype).removeprefix("torch."), device.type,
        )  # fmt: skip
        try:
            mode = (step_mode(name) if device.type == "cuda" else "reduce-overhead") if compiled else None
            _fill(result, model, shape, steps, kind, mode, copy)
            if largest and device.type == "cuda":
                result.largest_batch = largest_batch(model, shape, heads)
        except RuntimeError as error:
            result.note = str(error).splitlines()[0][:120]
        yield result
        del model
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def generate_results(
    names: list[str], shape: ModelShape, device: torch.device, dtype: torch.dtype, steps: int, kind: str,
    ready: Callable[[], None] = lambda: None,
) -> Iterator[Result]:  # fmt: skip
    """`model.generate` beside the plain loop with the same cache type; `ready` is called when both have compiled.

    Dynamic is what `generate` takes by default, and nothing is compiled. With "static" `generate` compiles by itself on
    CUDA, so the loop is compiled too, in the same mode.
    """
    for name in names:
        yield from _generate_results(name, shape, device, dtype, steps, kind, ready)


def _generate_results(
    name: str, shape: ModelShape, device: torch.device, dtype: torch.dtype, steps: int, kind: str,
    ready: Callable[[], None],
) -> Iterator[Result]:  # fmt: skip
    model = build(name, shape, device, dtype)
    cache = filled_cache(model, shape, shape.batch, kind, WARM_STEPS + 3 * steps)
    loop = decode_loop(
        model, cache, shape.batch, "reduce-overhead" if kind == "static" and device.type == "cuda" else None
    )
    options = {"cache_implementation": "static"} if kind == "static" else {}
    ways = {
        "generate": lambda: generate_milliseconds(model, shape.batch, shape.context, steps, **options),
        "loop": lambda: step_milliseconds(loop, steps),
    }
    loop(WARM_STEPS)
    ways["generate"]()
    ready()
    # In turns and without a collection of what compiling has left behind, which takes as long as many steps.
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(3):
        for way, measure in ways.items():
            gc.collect()
            times[way].append(measure())
    for way, found in times.items():
        ms = statistics.median(found)
        yield Result(
            "generate", f"{name} {way} {kind}", shape.batch, shape.context, shape.query_heads, shape.key_heads,
            shape.value_heads, shape.hidden // shape.query_heads, str(dtype).removeprefix("torch."), device.type,
            ms=ms, tokens_s=shape.batch / ms * 1000,
        )  # fmt: skip


def _fill(
    result: Result, model: PreTrainedModel, shape: ModelShape, steps: int, kind: str, mode: str | None, copy: float
) -> None:
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    cache = filled_cache(model, shape, shape.batch, kind, WARM_STEPS + steps)
    read = step_bytes(model, shape, (result.key_heads, result.value_heads))
    if hasattr(model, "fuse_projections"):
        model.fuse_projections()
    loop = decode_loop(model, cache, shape.batch, mode)
    loop(WARM_STEPS)
    result.ms = step_milliseconds(loop, steps)
    result.gb_s = read / result.ms / 1e6
    result.share_of_copy, result.tokens_s = result.gb_s / copy, shape.batch / result.ms * 1000
    if device.type == "cuda":
        result.peak_gib = torch.cuda.max_memory_allocated() / 2**30


def step_bytes(model: PreTrainedModel, shape: ModelShape, heads: tuple[int, int]) -> int:
    """What a decode step has to read: every weight but the embedding table, and `heads` key and value heads a layer."""
    embedding = model.get_input_embeddings().weight
    read = sum(p.numel() * p.element_size() for p in model.parameters()) - embedding.numel() * embedding.element_size()
    per_token = sum(heads) * shape.hidden // shape.query_heads * embedding.element_size() * shape.layers
    return read + per_token * shape.batch * shape.context


def heads_of(name: str, shape: ModelShape) -> tuple[int, int]:
    """Key and value heads of the model that `build` makes."""
    if name in ("dha", "pairs"):
        return shape.key_heads, shape.value_heads
    return ((shape.query_heads if name == "mha" else (shape.key_heads + shape.value_heads) // 2),) * 2


@torch.no_grad()
def largest_batch(model: PreTrainedModel, shape: ModelShape, heads: tuple[int, int]) -> int:
    """Largest batch whose static cache of `context` tokens is really allocated and takes a decode step.

    `heads`: key heads and value heads of a layer, for a first guess."""
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    per_token = sum(heads) * (shape.hidden // shape.query_heads) * 2 * shape.layers
    batch = int(torch.cuda.mem_get_info()[0] // (per_token * shape.context))
    while batch > 0 and not _fits(model, shape, batch):
        batch = min(batch - 1, int(batch * 0.99))
    return batch


def _fits(model: PreTrainedModel, shape: ModelShape, batch: int) -> bool:
    device = next(model.parameters()).device
    try:
        cache = StaticCache(config=model.config, max_cache_len=shape.context)
        model(torch.zeros(batch, 1, dtype=torch.long, device=device), past_key_values=cache, use_cache=True)
        torch.cuda.synchronize()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        cache = None
        torch.cuda.empty_cache()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
