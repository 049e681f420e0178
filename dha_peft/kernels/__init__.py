"""Decode attention on separate key and value heads: one facade over the Triton kernel and plain torch."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from .masks import mask_bounds, visible_keys
from .naive import naive_decode
from .ops import decode

Bounds = tuple[Tensor, Tensor, Tensor]
HAS_TRITON = importlib.util.find_spec("triton") is not None
MAX_TOKENS = 8
_MASK_TYPES = (torch.bool, torch.float16, torch.bfloat16, torch.float32)
_BACKENDS = ("auto", "triton", "torch")


def dha_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_map: Tensor,
    value_map: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    start: Tensor | None = None,
    length: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Attention of the newest `Tq` tokens to caches of `Hk` key heads and `Hv` value heads.

    Args:
        q: `[B, Hq, Tq, d]`. k: `[B, Hk, S, d]`. v: `[B, Hv, S, d]`; S may be more than what is filled.
        key_map, value_map: `[Hq]` integers, the key head and the value head that each query head reads.
        scale: factor of the scores, `d ** -0.5` if None.
        mask: bool (True = attend) or additive, broadcasts to `[B, Hq, Tq, S]`. Without one, attention is causal
            among the new tokens.
        start, length: `[B]` integers on the device; only keys `start <= j < length` are seen (defaults 0 and `S`).
        backend: "auto" (Triton where it fits, else torch), "triton" or "torch" (the naive reference).

    Returns:
        `[B, Hq, Tq, d]` in q's dtype. A query that sees no key gives zeros.

    Raises:
        ValueError: unknown backend, or "triton" for inputs that the kernel does not take.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"`backend` is {backend!r}; choose one of {', '.join(_BACKENDS)}.")
    why_not = None if backend == "torch" else unsupported(q, k, v, mask)
    if backend == "triton" and why_not:
        raise ValueError(f"the Triton kernel does not take these inputs: {why_not}; use `backend='auto'`.")
    if backend == "torch" or why_not:
        return naive_decode(q, k, v, key_map, value_map, scale, mask, start, length)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if mask is not None and (start is not None or length is not None):
        mask, start, length = _masked_bounds(q, k, mask, start, length), None, None
    bounds = (start, length, None) if mask is None else _shared_bounds(mask, q.shape[0], [])
    return _attend(q, k, v, key_map, value_map, scale, mask, *bounds)


def decode_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_map: Tensor,
    value_map: Tensor,
    scale: float,
    mask: Tensor | None = None,
    step: list[tuple[Tensor, Bounds]] | None = None,
) -> Tensor | None:
    """`dha_decode` for `dha_peft.models.set_decode_kernel`: None where the kernel does not fit, and the model goes on in torch.

    `step` keeps the bounds of the masks that the layers of one forward pass share.
    """
    if unsupported(q, k, v, mask):
        return None
    bounds = (None, None, None) if mask is None else _shared_bounds(mask, q.shape[0], [] if step is None else step)
    return _attend(q, k, v, key_map, value_map, scale, mask, *bounds)


def _shared_bounds(mask: Tensor, batch: int, step: list[tuple[Tensor, Bounds]]) -> Bounds:
    for known, bounds in step:
        if known is mask:
            return bounds
    bounds = _launches().launch_bounds(mask, batch) if _runs_now(mask) else mask_bounds(mask, batch)
    step.append((mask, bounds))
    return bounds


def unsupported(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> str | None:
    """Why the Triton kernel cannot take these inputs, or None. Looks at shapes and types only, never at values."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if not (q.is_cuda and k.is_cuda and v.is_cuda):
        return "the tensors are not on a CUDA device"
    if q.dtype not in (torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, not all float16 or all bfloat16"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "a gradient is wanted, and the kernel has none"
    if q.shape[2] > MAX_TOKENS:
        return f"{q.shape[2]} new tokens are more than {MAX_TOKENS}"
    if not 16 <= q.shape[3] <= 256 or k.shape[2] == 0:
        return f"head size {q.shape[3]} is not within 16 and 256, or the cache is empty"
    if mask is not None and (mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[3] != k.shape[2]):
        return "the mask is not `[B, 1, Tq, S]`"
    if mask is not None and mask.dtype not in _MASK_TYPES:
        return f"the mask is {mask.dtype}"
    return None


def _attend(q: Tensor, *args: Tensor | float | None) -> Tensor:
    # Straight to the launch where that is possible: the operator's dispatch costs as much as the kernel on a short cache.
    return (_launches().launch_decode if _runs_now(q) else decode)(q, *args)


def _runs_now(x: Tensor) -> bool:
    """Whether kernels can be launched on this tensor, which is not so while a graph is traced."""
    return type(x) is Tensor and not torch.compiler.is_compiling()


@lru_cache(maxsize=1)
def _launches() -> ModuleType:
    from . import launch  # imports Triton, so not before the first call

    return launch


def _masked_bounds(q: Tensor, k: Tensor, mask: Tensor, start: Tensor | None, length: Tensor | None) -> Tensor:
    """A mask that says what start and length say, too."""
    inside = visible_keys(1, k.shape[2], None, start, length, q.device)
    return mask & inside if mask.dtype == torch.bool else mask.masked_fill(~inside, torch.finfo(mask.dtype).min)


__all__ = ["HAS_TRITON", "decode_kernel", "dha_decode", "naive_decode", "unsupported"]
