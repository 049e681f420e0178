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
    out, probs = grouped_attention(query, key, value, maps, scale, mask, softcap, sinks)
    return out.transpose(1, 2).contiguous(), probs if weights else None


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    maps: HeadMaps,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores per key group, softmax per query head, values per value group.

    Args:
        query: `[B, H, T, d]`, `key`: `[B, Hk, S, d]`, `value`: `[B, Hv, S, d]`.
        mask: bool (True = attend) or additive, broadcasts to `[B, H, T, S]`.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        sinks: `[H]`, a score per query head that takes its share of the probability and adds nothing (gpt-oss).

    Returns:
        Output `[B, H, T, d]` and probabilities `[B, H, T, S]`, in the value's dtype.
    """
    batch, _, length, _ = query.shape
    rows = query.index_select(1, maps.key_rows).reshape(batch, maps.num_key_heads, -1, query.shape[-1])
    scores = torch.matmul(rows, key.transpose(2, 3)).reshape(batch, -1, length, key.shape[2])
    scores = scores.index_select(1, maps.key_slots).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        low = torch.finfo(torch.float32).min
        scores = scores.masked_fill(~mask, low) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(batch, -1, length, 1)], dim=-1)
    probs = torch.softmax(scores, dim=-1)[..., : key.shape[2]].to(value.dtype)
    rows = probs.index_select(1, maps.value_rows).reshape(batch, maps.num_value_heads, -1, key.shape[2])
    out = torch.matmul(rows, value).reshape(batch, -1, length, value.shape[-1])
    return out.index_select(1, maps.value_slots), probs
