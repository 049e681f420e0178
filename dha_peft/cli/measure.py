"""What is measured on a real model: cache bytes from the cache's own tensors, head similarity, decode speed."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from ..attention import KINDS
from ..fusion.similarity import aligned_similarity, cosine_similarity
from ..search import Analysis
from ..search.analysis import layer_problem


@torch.no_grad()
def cache_bytes_per_token(model: nn.Module) -> int:
    """Bytes of the cache's own tensors after a forward pass, per token."""
    tokens, cache = torch.arange(16)[None].to(next(model.parameters()).device), DynamicCache()
    model(input_ids=tokens, past_key_values=cache, use_cache=True)
    return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)) // tokens.numel()


@torch.no_grad()
def head_similarity(analysis: Analysis, most: int = 2) -> list[dict[str, Any]]:
    """Raw cosine and aligned similarity `[H, H]` of the keys and the values of a few layers, as lists."""
    count = len(analysis.sites)
    chosen = sorted({round(i * (count - 1) / max(most - 1, 1)) for i in range(most)})
    found = []
    for index in chosen:
        weights = analysis.sites[index].weights()
        for kind in KINDS:
            raw = cosine_similarity(weights.key if kind == "key" else weights.value)
            aligned = aligned_similarity(layer_problem(analysis.sites[index], analysis.statistics, kind))
            found.append({"layer": index, "kind": kind, "raw": _rounded(raw), "aligned": _rounded(aligned)})
    return found


def _rounded(matrix: torch.Tensor) -> list[list[float]]:
    return [[round(value, 3) for value in row] for row in matrix.tolist()]


@torch.no_grad()
def decode_speed(model: nn.Module, batch: int, context: int, steps: int) -> dict[str, float]:
    """Milliseconds per greedy step after `context` tokens, tokens per second, bytes of cache, peak GPU memory."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ids = torch.randint(0, model.config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache()
    output = model(input_ids=ids.to(device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    token, times = output.logits[:, -1:].argmax(-1), []
    for _ in range(steps + 2):
        _wait(device)
        begin = time.perf_counter()
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
        _wait(device)
        times.append(time.perf_counter() - begin)
    milliseconds = sorted(times[2:])[steps // 2] * 1000
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    found = {"ms_per_step": milliseconds, "tokens_per_second": batch / milliseconds * 1000, "cache_bytes": held}
    if device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
