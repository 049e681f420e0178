"""Healing: training with the base model itself as the teacher (ours), as a Trainer and as one function.

In the adapter stage the teacher is the same weights with the adapter switched off, so there is no second copy. For a merged model the
base is given as `teacher`.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..adapter.layer import DHALayer
from ..models.families import family_of
from .callback import DHACallback, TiedGroups
from .objective import Objective, cached_loss, check_head, healing_loss, plain_model
from .teacher_cache import CachedRows, TeacherCache


@dataclass(frozen=True)
class Rates:
    """Learning rates of a merged model's parts, as shares of `TrainingArguments.learning_rate`; 0 freezes a part. Only the attention was
    changed by the conversion; the noise of a few hundred updates would harm what was right. Adapters, and modules that peft trains beside
    them, always take the full rate."""

    attention: float = 1.0
    rest: float = 0.3
    embeddings: float = 0.0


@dataclass(frozen=True)
class HealingOptions:
    """What `DHATrainer` does beyond a Trainer. The weight `objective.hidden` falls linearly to 0 over the run."""

    objective: Objective = field(default_factory=Objective)
    rates: Rates = field(default_factory=Rates)


class DHATrainer(Trainer):
    """A Trainer whose loss is the distance from the base model.

    Args:
        teacher: the base model, for a merged student, or a `TeacherCache` of its answers, whose rows are then the training data and
            which has no hidden states to compare with. None: the student is a `PeftModel`, and its base is the teacher.
        healing: the objective and the rates of the parts.

    Raises:
        ValueError: no teacher for a model without adapters, or a model whose logits are not its head's output.
    """

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | TeacherCache | None = None,
        healing: HealingOptions | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(teacher, TeacherCache) and kwargs.get("train_dataset") is None:
            kwargs["train_dataset"] = CachedRows(teacher)
        super().__init__(*args, **kwargs)
        _check_processes(self.args)
        if isinstance(teacher, TeacherCache):
            self.args.remove_unused_columns = False  # the cached answers are read here, not by the model's forward
        if teacher is None and not isinstance(self.model, PeftModel):
            raise ValueError("`teacher` is missing: a merged model needs its base model as the teacher; pass it.")
        self.teacher, self.healing = teacher, healing or HealingOptions()
        self._head_checked = False
        # The loss below is a mean over each micro-batch, so the Trainer has to divide by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        if teacher is not None:
            freeze_parts(self.model, self.healing.rates)
        if isinstance(teacher, nn.Module):
            _check_shared(teacher, self.model)
            teacher.requires_grad_(False).eval().to(self.args.device)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        # The Trainer sets autocast inside of the model's own forward, but teacher and heads are called from here.
        with self.accelerator.autocast():
            loss = self._loss(model, inputs)
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def _loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        ids, objective = inputs["input_ids"], self.healing.objective
        if not self._head_checked:
            check_head(self.accelerator.unwrap_model(model), ids[:1, :8])
            self._head_checked = True
        if isinstance(self.teacher, TeacherCache):
            return cached_loss(model, inputs, objective)
        progress = self.state.global_step / max(self.state.max_steps, 1)
        objective = replace(objective, hidden=objective.hidden * (1 - progress))
        return healing_loss(model, ids, inputs.get("attention_mask"), self.teacher, objective)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW as the arguments say, with the rates of the parts, unless an optimizer was given."""
        if self.teacher is not None and self.optimizer is None:  # type: ignore[has-type]
            groups = rate_groups(self.model, self.healing.rates, self.args.learning_rate)
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer(groups, **{**options, "weight_decay": self.args.weight_decay})
        return super().create_optimizer(model)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """Evaluation reports the ordinary next-token loss, which compares with other models."""
        inputs = self._prepare_inputs(inputs)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        labels = inputs.get("labels", ids if mask is None else ids.masked_fill(mask == 0, -100))
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(input_ids=ids, attention_mask=mask, labels=labels)
        return output.loss.detach(), None, None


def part_of(model: nn.Module) -> dict[nn.Parameter, str]:
    """Which of `Rates` each parameter of a model belongs to."""
    causal = plain_model(model)
    parts = dict.fromkeys(causal.parameters(), "rest")
    for embedding in (causal.get_input_embeddings(), causal.get_output_embeddings()):
        parts.update(dict.fromkeys(embedding.parameters() if embedding is not None else (), "embeddings"))
    family = getattr(causal, "dha_family", None) or family_of(causal.config)
    for block in family.blocks(causal.base_model):
        parts.update(dict.fromkeys(block.module.parameters(), "attention"))
    for module in causal.modules():
        if isinstance(module, BaseTunerLayer):
            adapter = [p for name, p in module.named_parameters() if not name.startswith("base_layer.")]
            parts.update(dict.fromkeys(adapter, "attention"))
        if isinstance(module, ModulesToSaveWrapper):
            parts.update(dict.fromkeys(module.modules_to_save.parameters(), "attention"))
    return parts


def freeze_parts(model: nn.Module, rates: Rates) -> None:
    """Freeze the parts whose rate is 0, which also saves their gradients."""
    for parameter, part in part_of(model).items():
        if not getattr(rates, part):
            parameter.requires_grad_(False)


def rate_groups(model: nn.Module, rates: Rates, learning_rate: float) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters, one per part."""
    parts = part_of(model)
    groups = []
    for part in ("attention", "rest", "embeddings"):
        parameters = [p for p, name in parts.items() if name == part and p.requires_grad]
        if parameters:
            groups.append({"params": parameters, "lr": learning_rate * getattr(rates, part)})
    return groups


def heal(
    student: nn.Module,
    data: Tensor | Any,
    teacher: nn.Module | None = None,
    healing: HealingOptions | None = None,
    batch_tokens: int | None = None,
    progressive: bool = False,
    callbacks: list[TrainerCallback] | None = None,
    **arguments: Any,
) -> DHATrainer:
    """Train a converted model in place against its base, every row once, and return the trainer that did it.

    Args:
        student: a merged model in float32, whose parts are trained at their `Rates`, or a `PeftModel`, whose adapters are.
        data: rows of token ids `[N, T]`, or a dataset of rows with `input_ids`.
        teacher: the base model, which is frozen and moved to the student's device; needed for a merged student.
        batch_tokens: tokens of one update on one device, at least a row; 4096 for weights, 8192 for adapters.
        progressive: fuse the groups of a DHA adapter step by step by `DHACallback`. Otherwise they are tied first, so that all tokens
            train the heads that will be kept.
        arguments: any `TrainingArguments`. Defaults: one epoch of AdamW, a tenth of it warming up, cosine to 2 %, learning rate
            0.5 / hidden size for weights (chosen at 512) and 3e-3 for adapters, bfloat16 where the GPU has it, nothing saved or reported.
            With an `output_dir` that holds a checkpoint the run goes on from there.

    Raises:
        ValueError: see `DHATrainer`; also data without a row.
    """
    rows = [{"input_ids": row} for row in data.cpu()] if isinstance(data, Tensor) else data
    if not len(rows):
        raise ValueError("`data` has no row; give at least one row of token ids.")
    _warn_of_half_precision(student)
    adapter = isinstance(student, PeftModel)
    batch = max((batch_tokens or (8192 if adapter else 4096)) // len(rows[0]["input_ids"]), 1)
    callbacks, fuses = list(callbacks or []), _tie(student, progressive)
    if fuses and not any(isinstance(callback, DHACallback) for callback in callbacks):
        callbacks.append(DHACallback() if progressive else TiedGroups())
    trainable = [p.requires_grad for p in student.parameters()]
    if not adapter:
        student.requires_grad_(True)  # also after a frozen base; the parts whose rate is 0 are frozen again
    with tempfile.TemporaryDirectory() as folder:
        fields = {"output_dir": folder, **default_arguments(student), "per_device_train_batch_size": batch, **arguments}
        args = TrainingArguments(**fields)
        args._n_gpu = min(args.n_gpu, 1)  # one process drives one GPU; see `_check_processes`
        trainer = DHATrainer(student, args, train_dataset=rows, callbacks=callbacks, teacher=teacher, healing=healing)
        try:
            trainer.train(resume_from_checkpoint=_has_checkpoint(args.output_dir))
        finally:
            for parameter, flag in zip(student.parameters(), trainable, strict=True):
                parameter.requires_grad_(flag)
            student.eval()
    return trainer


def _tie(student: nn.Module, progressive: bool) -> bool:
    """Tie the groups of a DHA adapter unless they are to be fused step by step; whether there is one."""
    fuses = any(isinstance(module, DHALayer) and module.active_fusion() is not None for module in student.modules())
    if fuses and not progressive:
        student.base_model.tie_groups(student.active_adapter)
    return fuses


def _warn_of_half_precision(student: nn.Module) -> None:
    if student.dtype in (torch.float16, torch.bfloat16) and not isinstance(student, PeftModel):
        warnings.warn(
            f"`student` holds {student.dtype} weights, in which small updates are lost to rounding; heal it in float32 "
            "(`student.float()`) and convert it back afterwards.",
            stacklevel=3,
        )


def _check_processes(args: TrainingArguments) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"this process sees {args.n_gpu} GPUs, which the Trainer would share by `nn.DataParallel`, whose replicas give no hidden "
            "states back; start one process per GPU with `torchrun`, or set CUDA_VISIBLE_DEVICES."
        )


def _check_shared(teacher: nn.Module, student: nn.Module) -> None:
    """A merged model that came from an adapter shares its other weights with the base."""
    trained = {p.data_ptr() for p in student.parameters() if p.requires_grad and p.numel()}
    if trained & {p.data_ptr() for p in teacher.parameters() if p.numel()}:
        raise ValueError(
            "`teacher` shares weights with the model that is trained, so it would be trained along; load the base anew, or pass a "
            "deep copy of it."
        )


def default_arguments(student: nn.Module) -> dict[str, Any]:
    """`TrainingArguments` of `heal`."""
    adapter, device = isinstance(student, PeftModel), next(student.parameters()).device
    return {
        "num_train_epochs": 1,
        "learning_rate": 3e-3 if adapter else 0.5 / student.config.get_text_config().hidden_size,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.02},
        "warmup_steps": 0.1,
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "bf16": device.type == "cuda" and torch.cuda.is_bf16_supported(),
        "use_cpu": device.type == "cpu",
        "logging_steps": 0.05,
        "logging_nan_inf_filter": False,  # it makes the host wait for the device at every step
        "save_strategy": "no",
        "report_to": [],
        "remove_unused_columns": False,
        "dataloader_pin_memory": device.type == "cuda",
    }


def _has_checkpoint(folder: str) -> bool:
    return any(Path(folder).glob("checkpoint-*"))
