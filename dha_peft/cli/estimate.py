"""What a model and a conversion will take: memory by arithmetic, time from a probe of this machine's speed (rough)."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from ..attention import AttentionSite, labelled_plan
from ..fusion.grouping import GroupCurve
from ..plan import DHAPlan, contiguous_groups
from ..search.analysis import SearchOptions, plan_counts

RESERVE = 0.1
"""Share of a GPU's memory left for activations and the allocator."""
GRADIENT_TOKENS = 16_384


def uniform_plan(sites: list[AttentionSite], options: SearchOptions) -> DHAPlan:
    """The plan that a budget gives without weights: equal counts in every layer, neighbours together.

    Raises:
        ValueError: a budget below one head per layer and kind.
    """
    curves = []
    for site in sites:
        groups = [contiguous_groups(site.num_heads, count) for count in range(1, site.num_heads + 1)]
        curves.append(dict.fromkeys(("key", "value"), GroupCurve(groups, [0.0] * site.num_heads)))
    counts = plan_counts(curves, SearchOptions(**{**vars(options), "allocation": "uniform"}))
    groups = [
        tuple(curve[kind].groups[count[kind] - 1] for kind in ("key", "value"))
        for curve, count in zip(curves, counts, strict=True)
    ]
    return labelled_plan(sites, groups)


@dataclass(frozen=True)
class Serving:
    """Weights and KV cache of one model in bytes."""

    weights: int
    per_token: int

    def longest_context(self, memory: int) -> int:
        """Tokens of cache for one sequence in `memory` bytes; 0 if the weights do not fit."""
        return max(int(memory * (1 - RESERVE)) - self.weights, 0) // self.per_token

    def largest_batch(self, memory: int, context: int) -> int:
        return self.longest_context(memory) // context


def serving(model: nn.Module, sites: list[AttentionSite], plan: DHAPlan, width: int) -> tuple[Serving, Serving]:
    """Base and result at `width` bytes per number. The result lacks the rows of the heads that are gone."""
    weights = sum(p.numel() for p in model.parameters()) * width
    before, after = plan.kv_bytes_per_token(width)
    saved = 0
    for site, layer in zip(sites, plan.layers, strict=True):
        gone = 2 * layer.num_heads - layer.num_key_heads - layer.num_value_heads
        saved += gone * site.head_dim * hidden_size(site) * width
    return Serving(weights, before), Serving(weights - saved, after)


def conversion_memory(model: nn.Module, sites: list[AttentionSite], width: int) -> int:
    """Bytes at the peak of a conversion: base and result, the moments of all layers, one layer's Gram matrices."""
    weights = sum(p.numel() for p in model.parameters()) * width
    moments = sum(hidden_size(site) ** 2 * 4 for site in sites)
    widest = max(site.num_heads * site.head_dim for site in sites)
    return 2 * weights + moments + 4 * widest**2 * 8


def conversion_seconds(model: nn.Module, sites: list[AttentionSite], tokens: int, device: str) -> float:
    """Calibration by FLOPs at the measured speed of a matrix product, search by the measured time of one merge."""
    parameters = sum(p.numel() for p in model.parameters())
    flops = 2.0 * parameters * tokens + 4.0 * parameters * min(tokens, GRADIENT_TOKENS)
    flops += sum(2.0 * hidden_size(site) ** 2 * tokens for site in sites)
    # A layer tries every pair of its H heads once and then H more per merge: about H squared eigenproblems.
    merges = sum(site.num_heads**2 for site in sites)
    return flops / _flops_per_second(device) + merges * _merge_seconds(max(site.head_dim for site in sites))


def hidden_size(site: AttentionSite) -> int:
    """Width of what enters the attention block."""
    config = site.module.config
    return getattr(config, "hidden_size", None) or config.n_embd


def _flops_per_second(device: str, size: int = 1024) -> float:
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    return 2.0 * size**3 / _seconds(lambda: float((matrix @ matrix)[0, 0]))


def _merge_seconds(head_dim: int) -> float:
    matrix = torch.randn(2 * head_dim, 2 * head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = matrix @ matrix.T
    return _seconds(lambda: torch.linalg.eigvalsh(matrix))


def _seconds(work) -> float:
    work()
    begin = time.perf_counter()
    for _ in range(3):
        work()
    return (time.perf_counter() - begin) / 3
