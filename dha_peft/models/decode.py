"""Attention of a few new tokens against un-expanded keys and values: the cache is read once and never copied."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .maps import HeadMaps

MAX_QUERIES = 4
"""Longest run of new tokens that takes the grouped path; longer ones (prefill) are better served by stock kernels."""

FLOAT32_BELOW = 2**18
"""Half-precision heads of at most so many numbers are multiplied in float32 on a CPU. oneDNN prepares a half-precision
product anew for every length of the cache, about 0.7 ms each, which is what converting so many numbers takes."""

_PATHS = ("auto", "grouped", "expand")
# Arguments of attention functions that change the result and that the grouped path does not know.
_UNKNOWN = ("cache", "cu_seq_lens_q", "cu_seq_lens_k")

_path = os.environ.get("DHA_ATTENTION", "auto")
_kernel: Callable[..., Tensor] | None = None


def set_attention_path(path: str) -> None:
    """Choose how short queries are attended, for tests and measurements; the variable DHA_ATTENTION sets it at import.

    Args:
        path: "auto" (the decode kernel if one is set and fits, else grouped torch), "grouped" (torch, never the
            kernel) or "expand" (always the stock attention function on expanded heads).
    """
    global _path
    if path not in _PATHS:
        raise ValueError(f"`path` is {path!r}; choose one of {', '.join(_PATHS)}.")
    _path = path


def set_decode_kernel(kernel: Callable[..., Tensor] | None) -> None:
    """Plug in a fast decode kernel, or None to go back to torch.

    It is called as `kernel(q, k, v, key_map, value_map, scale, mask=mask, step=step)` with `q [B, H, T, d]`,
    `k [B, Hk, S, d]`, `v [B, Hv, S, d]`, int64 maps `[H]` and a mask (bool, True = attend, or additive) that broadcasts
    to `[B, H, T, S]`; it returns `[B, H, T, d]`, or None where it does not support the inputs. `step` is None or a list
    that the layers of one forward pass share, where the kernel may keep what it has found out about the mask.
    """
    global _kernel
    _kernel = kernel


def takes_grouped_path(query: Tensor, key: Tensor, mask: Any, dropout: float, options: dict[str, Any]) -> bool:
    """Whether these inputs are a decode step that the grouped path computes exactly."""
    if _path == "expand" or torch.is_grad_enabled() or query.shape[2] > MAX_QUERIES or dropout:
        return False
    if any(options.get(name) is not None for name in _UNKNOWN):
        return False
    if mask is None:
        # Without a mask, several queries mean causal attention, and a window is left to the stock function.
        return query.shape[2] == 1 and options.get("sliding_window") is None
    return isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-1] == key.shape[2]


def biased_mask(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """A mask `[B, 1, T, S]` together with position biases of the scores `[1, H, T, S]` (T5)."""
    if mask is None or bias is None:
        return mask if bias is None else bias
    return bias.masked_fill(~mask, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else mask + bias


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    maps: HeadMaps,
    scale: float,
    mask: Tensor | None,
    weights: bool = False,
    step: list[Any] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attend with the kernel or in torch.

    Returns:
        Output `[B, T, H, d]` (transformers' layout) and, if `weights`, the probabilities `[B, H, T, S]`.
    """
    if _kernel is not None and _path == "auto" and not weights and softcap is None and sinks is None:
        out = _kernel(query, key, value, maps.key_map, maps.value_map, scale, mask=mask, step=step)
        if out is not None:
            return out.transpose(1, 2).contiguous(), None
    out, probs = grouped_attention(query, key, value, maps, scale, mask, softcap, sinks, weights)
    return out.transpose(1, 2).contiguous(), probs


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    maps: HeadMaps,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    weights: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Scores per key group, softmax per query head, values per value group.

    Args:
        query: `[B, H, T, d]`, `key`: `[B, Hk, S, d]`, `value`: `[B, Hv, S, d]`.
        mask: bool (True = attend) or additive, broadcasts to `[B, H, T, S]`.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        sinks: `[H]`, a score per query head that takes its share of the probability and adds nothing (gpt-oss).

    Returns:
        Output `[B, H, T, d]` and, if `weights`, probabilities `[B, H, T, S]`, in the value's dtype.
    """
    if not maps.queries_in_place:
        query = query.index_select(1, maps.key_rows)
    scores = _per_head(query, key.transpose(2, 3)).float() * scale
    # The softmax is over query heads, or right away over the rows that the values want if there are no more of those.
    if not maps.values_even:
        scores = scores.index_select(1, maps.key_slots)
    elif not maps.rows_in_place:
        scores = scores.index_select(1, maps.rows_between)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = _masked(scores, mask, maps)
    if sinks is not None:
        scores = torch.cat([scores, _sinks(sinks, maps).expand(len(scores), -1, scores.shape[2], 1)], dim=-1)
    probs = torch.softmax(scores, dim=-1)[..., : key.shape[2]].to(value.dtype)
    out = _per_head(probs if maps.values_even else probs.index_select(1, maps.value_rows), value)
    if not maps.outputs_in_place:
        out = out.index_select(1, maps.value_slots)
        if weights and maps.values_even:
            probs = probs.index_select(1, maps.value_slots)
    return out, probs if weights else None


def _per_head(rows: Tensor, heads: Tensor) -> Tensor:
    """`[B, G * n, T, x]` rows, n of them for each of the heads `[B, G, x, y]` -> `[B, G * n, T, y]`.

    `torch.matmul` would copy heads whose batch and head dimensions are not one stretch, such as a slice of a cache.
    """
    batch, groups, inner, outer = heads.shape
    length, dtype = rows.shape[2], heads.dtype
    if _faster_in_float32(heads):
        rows, heads = rows.float(), heads.float()
    rows = rows.reshape(batch * groups, -1, inner)
    if batch == 1 or heads.stride(0) == groups * heads.stride(1):
        found = torch.bmm(rows, heads.flatten(0, 1))
    else:
        found = torch.cat([torch.bmm(r, h) for r, h in zip(rows.split(groups), heads, strict=True)])
    return found.view(batch, -1, length, outer).to(dtype)


def _faster_in_float32(heads: Tensor) -> bool:
    if heads.device.type != "cpu" or heads.dtype not in (torch.bfloat16, torch.float16):
        return False
    return not torch.compiler.is_compiling() and heads.numel() <= FLOAT32_BELOW


def _masked(scores: Tensor, mask: Tensor, maps: HeadMaps) -> Tensor:
    if mask.shape[1] > 1 and maps.values_even:
        mask = mask.index_select(1, maps.value_rows)
    return scores.masked_fill(~mask, torch.finfo(torch.float32).min) if mask.dtype == torch.bool else scores + mask


def _sinks(sinks: Tensor, maps: HeadMaps) -> Tensor:
    """`[1, H, 1, 1]` in the order of the scores."""
    return (sinks.index_select(0, maps.value_rows) if maps.values_even else sinks).float()[None, :, None, None]
