"""Losses that make their gradient in the forward pass, so that the backward pass keeps little and starts few kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels import HAS_TRITON


def relative_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """Squared error of hidden states `[N, D]` over the variance of the teacher's, a scalar. The reference of `RelativeError`."""
    ours, theirs = _wide(ours), _wide(theirs)
    return (ours - theirs).square().mean() / (theirs - theirs.mean(0)).square().mean().clamp_min(1e-12)


class RelativeError(torch.autograd.Function):
    """`relative_error` of one layer's states `[B, T, D]`. Its gradient is the difference but for a factor, so nothing else is kept.

    `keep`: places of the tokens that count, in the flattened batch; None for all.
    """

    @staticmethod
    def forward(ctx: Any, ours: Tensor, theirs: Tensor, keep: Tensor | None) -> Tensor:
        ctx.dtype = ours.dtype
        difference, rows = _wide(ours) - _wide(theirs), _wide(theirs.flatten(0, 1))
        if keep is not None:
            difference, rows = _only(difference, keep), rows.index_select(0, keep)
        energy = rows.var(0, correction=0).mean().clamp_min(1e-12) * rows.numel()
        # Differences of large activations do not fit into float16.
        ctx.save_for_backward(difference if ours.dtype == torch.float16 else difference.to(ours.dtype), energy)
        return torch.linalg.vector_norm(difference).square() / energy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        difference, energy = ctx.saved_tensors
        return (difference * (2 * scale / energy)).to(ctx.dtype), None, None


def divergence(logits: Tensor, wanted: Tensor, labels: Tensor, next_token: float) -> tuple[Tensor, Tensor]:
    """Summed `(1 - next_token) * KL + next_token * NLL` of logits `[N, V]`, and its gradient in their precision: a difference of two
    distributions. `labels` `[N]`, negative where there is none. One kernel where Triton runs."""
    if HAS_TRITON and logits.is_cuda and logits.dtype != torch.float64:
        from .triton_divergence import divergence_kernel

        return divergence_kernel(logits, wanted, labels, next_token)
    return naive_divergence(logits, wanted, labels, next_token)


def naive_divergence(logits: Tensor, wanted: Tensor, labels: Tensor, next_token: float) -> tuple[Tensor, Tensor]:
    """The reference of the kernel."""
    ours, gap = _wide_log_softmax(logits), _wide_log_softmax(wanted)
    target, at = gap.exp(), labels.clamp_min(0)[:, None]
    labelled = (labels >= 0)[:, None] * next_token
    nll = -(ours.gather(1, at) * labelled).sum()
    loss = (1 - next_token) * gap.sub_(ours).mul_(target).sum() + nll
    gradient = ours.exp_().mul_(1 - next_token + labelled).sub_(target.mul_(1 - next_token))
    gradient.scatter_add_(1, at, -labelled.to(gradient.dtype))
    return loss, gradient.to(logits.dtype)


class HeadLoss(torch.autograd.Function):
    """Sum over rows `[N, D]` of a loss of `head(rows)`. `loss_of(logits, *columns)` gives it and its gradient by the logits for `chunk` rows
    at a time, and the head's backward pass follows at once, so that logits of one chunk exist at a time and are made only once.

    `columns`: what else belongs to the rows. `parameters`: the head's trainable ones.
    """

    @staticmethod
    def forward(
        ctx: Any,
        head: nn.Module,
        loss_of: Callable[..., tuple[Tensor, Tensor]],
        chunk: int,
        columns: tuple[Tensor, ...],
        rows: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        losses, pieces, differentiable = [], [], any(ctx.needs_input_grad)
        totals: list[Tensor] = []
        for part, *others in zip(*(tensor.split(chunk) for tensor in (rows, *columns)), strict=True):
            with torch.set_grad_enabled(differentiable):
                part = part.detach().requires_grad_(differentiable)
                logits = head(part)
            loss, gradient = loss_of(logits.detach(), *others)
            losses.append(loss)
            if differentiable:
                piece, *found = torch.autograd.grad(logits, (part, *parameters), gradient, materialize_grads=True)
                pieces.append(piece)
                totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else found
        if differentiable:
            ctx.save_for_backward(torch.cat(pieces), *totals)
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *(gradient * scale.to(gradient.dtype) for gradient in ctx.saved_tensors)


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _wide_log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _only(states: Tensor, keep: Tensor) -> Tensor:
    """States `[B, T, D]`, 0 at the tokens that do not count, in place."""
    outside = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    outside.view(-1).index_fill_(0, keep, False)
    return states.masked_fill_(outside[..., None], 0)
