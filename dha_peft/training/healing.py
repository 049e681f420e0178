"""Healing: training with the base model itself as the teacher (ours; better than next-token training at every length measured).

In the adapter stage the teacher is the same weights with the adapter switched off, so there is no second copy. For a merged model the
base is given as `teacher`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer


class DHATrainer(Trainer):
    """A Trainer whose loss is the KL divergence from the base model's next-token distribution.

    Args:
        teacher: the base model, for a merged student. None: the student is a `PeftModel`, and its base is the teacher.
        next_token: share of the ordinary next-token loss in the objective, in [0, 1].
        chunk: tokens whose logits exist at a time.

    Raises:
        ValueError: no teacher for a model without adapters.
    """

    def __init__(
        self, *args: Any, teacher: nn.Module | None = None, next_token: float = 0.0, chunk: int = 2048, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if teacher is None and not isinstance(self.model, PeftModel):
            raise ValueError("`teacher` is missing: a merged model needs its base model as the teacher; pass it.")
        self.teacher, self.next_token, self.chunk = teacher, next_token, chunk
        # The loss below is a mean over each micro-batch, so the Trainer has to divide by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        if teacher is not None:
            teacher.requires_grad_(False).eval().to(self.args.device)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        inner = self.accelerator.unwrap_model(model)
        loss = healing_loss(
            inner, inputs["input_ids"], inputs.get("attention_mask"), self.teacher, self.next_token, self.chunk
        )
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """Evaluation reports the ordinary next-token loss, which compares with other models."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**{**inputs, "labels": inputs.get("labels", inputs["input_ids"])})
        return output.loss.detach(), None, None


def healing_loss(
    student: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    teacher: nn.Module | None = None,
    next_token: float = 0.0,
    chunk: int = 2048,
) -> Tensor:
    """Mean over tokens of `KL(teacher || student)`, mixed with `next_token` parts of the next-token loss. Logits `[chunk, V]` exist for
    one chunk at a time, also in the backward pass. `input_ids`, `attention_mask`: `[B, T]`."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    hidden, head = _hidden(student, inputs)
    with torch.no_grad(), _as_teacher(student, teacher):
        target, target_head = _hidden(student if teacher is None else teacher, inputs)
    keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    labels = F.pad(input_ids[:, 1:].masked_fill(~keep[:, 1:], -100), (0, 1), value=-100)
    rows = [tensor[keep] for tensor in (hidden, target, labels)]
    total = hidden.new_zeros((), dtype=torch.float32)
    for part in zip(*(tensor.split(chunk) for tensor in rows), strict=True):
        total = total + checkpoint(_chunk_loss, *part, head, target_head, next_token, use_reentrant=False)
    return total / keep.sum()


def _chunk_loss(hidden: Tensor, target: Tensor, labels: Tensor, head, target_head, next_token: float) -> Tensor:
    logits = F.log_softmax(head(hidden).float(), dim=-1)
    with torch.no_grad():
        wanted = F.log_softmax(target_head(target).float(), dim=-1)
    loss = (1 - next_token) * F.kl_div(logits, wanted, reduction="sum", log_target=True)
    if next_token:
        loss = loss + next_token * F.nll_loss(logits, labels, ignore_index=-100, reduction="sum")
    return loss


def _hidden(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, nn.Module]:
    """Last hidden states `[B, T, D]` and the module that turns them into logits."""
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    _refuse_processed_logits(causal)
    return causal.base_model(**inputs, use_cache=False)[0], causal.get_output_embeddings()


def _refuse_processed_logits(model: nn.Module) -> None:
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise ValueError(
                f"`config.{name}` changes this model's logits after its head, which the chunked KL does not do yet; "
                "use the plain Trainer with DHACallback."
            )


def _as_teacher(student: nn.Module, teacher: nn.Module | None):
    return student.disable_adapter() if teacher is None else nullcontext()
