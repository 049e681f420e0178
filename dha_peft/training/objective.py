"""The healing objective: how far a converted model is from its base, in next-token distributions and in hidden states (ours).

    loss = (1 - next_token) * KL(base || student) + next_token * cross-entropy + hidden * mean over layers of the relative squared error

The KL says what matters, the hidden states say it in every layer at once, which tells more per token. `DHATrainer` lets `hidden` fall to 0
over the run, as in the end only the distribution counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from .losses import HeadLoss, RelativeError, divergence
from .teacher_cache import topk_kl


@dataclass(frozen=True)
class Objective:
    """`next_token`: share of the ordinary next-token loss, in [0, 1]. `hidden`: weight of the hidden states. `chunk`: tokens whose
    logits exist at a time."""

    next_token: float = 0.0
    hidden: float = 10.0
    chunk: int = 2048

    def __post_init__(self) -> None:
        if not 0 <= self.next_token <= 1:
            raise ValueError(f"`next_token` is {self.next_token}, but it is a share of the loss; choose one in [0, 1].")
        if self.hidden < 0 or self.chunk < 1:
            raise ValueError(
                f"`hidden` is {self.hidden} and `chunk` {self.chunk}; choose a weight of at least 0 and at least 1 token."
            )


def healing_loss(
    student: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    teacher: nn.Module | None = None,
    objective: Objective | None = None,
) -> Tensor:
    """The objective, a mean over tokens; padding does not count. `input_ids`, `attention_mask`: `[B, T]`.

    Args:
        student: a causal language model, a `PeftModel` of one, or one of these wrapped for data-parallel training.
        teacher: the base model; None for a `PeftModel`, whose own base is the teacher, without a second copy.
        objective: weights of its parts.
    """
    objective = objective or Objective()
    inputs = {"input_ids": input_ids} | ({} if attention_mask is None else {"attention_mask": attention_mask})
    inner = _unwrapped(student)
    base = inner if teacher is None else teacher
    with torch.no_grad(), _as_teacher(inner) if teacher is None else nullcontext():
        targets = _states(base, base, inputs, objective.hidden > 0)
    states, keep = _states(student, inner, inputs, objective.hidden > 0), _kept(attention_mask)
    head, target_head = (plain_model(model).get_output_embeddings() for model in (inner, base))
    target_head = _without_adapters(target_head) if teacher is None else target_head
    loss_of = partial(_against_states, target_head=target_head, next_token=objective.next_token)
    loss = _mean(
        head, loss_of, (states[-1], targets[-1], _next_tokens(input_ids, attention_mask)), keep, objective.chunk
    )
    if objective.hidden:
        errors = [RelativeError.apply(ours, theirs, keep) for ours, theirs in zip(states[1:], targets[1:], strict=True)]
        loss = loss + objective.hidden * torch.stack(errors).mean()
    return loss


def cached_loss(student: nn.Module, batch: dict[str, Tensor], objective: Objective) -> Tensor:
    """The same against the answers of a teacher that are on disk: rows of `CachedRows`, stacked. They hold no hidden states."""
    inner, ids, mask = _unwrapped(student), batch["input_ids"], batch["attention_mask"]
    states = _states(student, inner, {"input_ids": ids, "attention_mask": mask}, every=False)
    head = plain_model(inner).get_output_embeddings()
    columns = (states[-1], _next_tokens(ids, mask), batch["indices"], batch["log_probs"], batch["rest"])
    return _mean(head, partial(_against_cache, next_token=objective.next_token), columns, _kept(mask), objective.chunk)


def _mean(
    head: nn.Module,
    loss_of: Callable[..., tuple[Tensor, Tensor]],
    columns: tuple[Tensor, ...],
    keep: Tensor | None,
    chunk: int,
) -> Tensor:
    """Mean of a `HeadLoss` over the tokens that count. Columns `[B, T, ...]`, of which the first are the student's states."""
    rows, *others = (_rows(tensor, keep) for tensor in columns)
    parameters = [p for p in head.parameters() if p.requires_grad and torch.is_grad_enabled()]
    return HeadLoss.apply(head, loss_of, chunk, tuple(others), rows, *parameters) / len(rows)


def _against_states(
    logits: Tensor, target: Tensor, labels: Tensor, target_head: nn.Module, next_token: float
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return divergence(logits, target_head(target), labels, next_token)


def _against_cache(
    logits: Tensor, labels: Tensor, indices: Tensor, log_probs: Tensor, rest: Tensor, next_token: float
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        logits = logits.requires_grad_()
        loss = (1 - next_token) * topk_kl(logits, indices, log_probs, rest).sum()
        if next_token:
            loss = loss + next_token * F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def _next_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Labels `[B, T]`, -100 where there is none."""
    labels = input_ids[:, 1:]
    labels = labels if attention_mask is None else labels.masked_fill(attention_mask[:, 1:] == 0, -100)
    return F.pad(labels, (0, 1), value=-100)


def _kept(attention_mask: Tensor | None) -> Tensor | None:
    """Places of the tokens that count, in the flattened batch; None for all. Found once: it makes the host wait for the device."""
    return None if attention_mask is None else attention_mask.flatten().nonzero()[:, 0]


def _rows(tensor: Tensor, keep: Tensor | None) -> Tensor:
    """`[B, T, ...]` -> `[N, ...]`, the tokens that count."""
    flat = tensor.flatten(0, 1)
    return flat if keep is None else flat.index_select(0, keep)


@contextmanager
def _as_teacher(student: PeftModel) -> Iterator[None]:
    """The student's own base: adapters off, and no dropout."""
    in_training = [module for module in student.modules() if module.training]
    student.eval()
    try:
        with student.disable_adapter():
            yield
    finally:
        for module in in_training:
            module.training = True


def _without_adapters(head: nn.Module) -> nn.Module:
    """The base's own output head, where adapters or a trained copy are around it."""
    if isinstance(head, ModulesToSaveWrapper):
        return head.original_module
    return head.get_base_layer() if isinstance(head, BaseTunerLayer) else head


def _unwrapped(model: nn.Module) -> nn.Module:
    """Without wrappers for data-parallel training and of `torch.compile`."""
    for name in ("module", "_orig_mod", "module"):
        model = getattr(model, name, model)
    return model


def plain_model(model: nn.Module) -> nn.Module:
    """The transformers model inside of a `PeftModel`."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _states(model: nn.Module, inner: nn.Module, inputs: dict[str, Tensor], every: bool) -> tuple[Tensor, ...]:
    """Hidden states `[B, T, D]` of every layer, or the last alone; the last is what the head reads.

    `model` itself is called, so that a data-parallel wrapper sees its forward; its own logits are made for one token only.
    """
    causal, seen = plain_model(inner), []
    handle = causal.base_model.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    few = {"logits_to_keep": 1} if "logits_to_keep" in signature(causal.forward).parameters else {}
    try:
        model(**inputs, **few, use_cache=False, output_hidden_states=every)
    finally:
        handle.remove()
    output = seen[-1]
    return (*output.hidden_states[:-1], output[0]) if every else (output[0],)


@torch.no_grad()
def check_head(model: nn.Module, input_ids: Tensor) -> None:
    """Raise ValueError for a model whose logits are not its head's output alone (soft-capping, logit scales): the chunked KL would
    compare something else. `input_ids` `[1, T]`."""
    causal, training = plain_model(model), model.training
    model.eval()
    try:
        states = _states(model, model, {"input_ids": input_ids}, every=False)
        expected = model(input_ids=input_ids, use_cache=False).logits
    finally:
        model.train(training)
    found = causal.get_output_embeddings()(states[-1]).float()
    if (found - expected.float()).norm() > 0.03 * expected.float().norm():  # beyond half-precision rounding
        raise ValueError(
            f"`{type(causal).__name__}` changes its logits after its head, which the chunked KL does not follow; "
            "use the plain Trainer with next-token loss."
        )
