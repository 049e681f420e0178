"""One job: from a base to a smaller model, trained on its tokens and measured."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from dha_peft import Analysis, DHAConfig, convert, get_dha_model
from dha_peft.attention import find_attention
from dha_peft.evaluation import evaluate_tasks
from dha_peft.texts import evaluate_loss

from .members import keep_members
from .methods import METHODS, Job, Method
from .training import FEWEST_ROWS, Settings, continue_pretraining, fuse, heal

KEYS = ("method", "budget", "fraction", "share", "seed")
FIELDS = (*KEYS, "tokens", "kept_heads", "before_collapse", "loss", "seconds", "device")
SCORE_FIELDS = (*KEYS, "task", "metric", "value", "stderr")


@dataclass(frozen=True)
class Tasks:
    """Which models lm-eval scores, and on what."""

    names: tuple[str, ...] = ()
    include_path: str | None = None
    methods: tuple[str, ...] = ("base", "gqa", "linear", "aligned")
    budgets: tuple[float, ...] = (1.0, 0.5, 0.25)
    fractions: tuple[float, ...] = (0.0, 0.0025, 0.05)
    seeds: tuple[int, ...] = (0,)
    limit: int | None = None

    def wants(self, job: Job) -> bool:
        return (
            bool(self.names)
            and job.share == METHODS[job.method].share
            and all(
                getattr(job, name) in getattr(self, f"{name}s") for name in ("method", "budget", "fraction", "seed")
            )
        )


@dataclass
class Study:
    """What all jobs share: the base, what was learned of it under each grouping, and the tokens.

    `rows` `[N, T]` are training rows, `validation` `[M]` one stream of tokens.
    """

    base: nn.Module
    tokenizer: Any
    analyses: dict[str, Analysis]
    rows: Tensor
    validation: Tensor
    pretraining_tokens: float
    settings: Settings = field(default_factory=Settings)
    tasks: Tasks = field(default_factory=Tasks)

    @property
    def length(self) -> int:
        return self.rows.shape[1]

    def order(self, job: Job) -> Tensor:
        """The job's rows: every epoch in an order of its own, drawn from the seed."""
        generator = torch.Generator().manual_seed(job.seed)
        count = max(round(job.fraction * self.pretraining_tokens / self.length), 1) if job.fraction else 0
        epochs = [torch.randperm(len(self.rows), generator=generator) for _ in range(-(-count // len(self.rows)))]
        order = torch.cat(epochs)[:count] if epochs else torch.empty(0, dtype=torch.long)
        return self.rows[order.to(self.rows.device)]


def run(study: Study, job: Job) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The job's row of losses (nats per token), and its rows of scores."""
    set_seed(job.seed)
    start, rows, before = time.perf_counter(), study.order(job), None
    model = study.base
    if job.method != "base":
        model, before = recover(study, job, rows)
    key = {name: getattr(job, name) for name in KEYS}
    values = {
        "tokens": rows.numel(),
        "kept_heads": kept_heads(model),
        "before_collapse": before if before is None else round(before, 4),
        "loss": round(evaluate_loss(model, study.validation, study.length), 4),
        "seconds": round(time.perf_counter() - start, 1),
        "device": torch.cuda.get_device_name() if rows.is_cuda else "CPU",
    }
    scores = scored(study, model) if study.tasks.wants(job) else []
    return key | values, [key | score for score in scores]


def recover(study: Study, job: Job, rows: Tensor) -> tuple[nn.Module, float | None]:
    """The trained model and, if it went through a fusion stage, its loss right before the collapse."""
    method, before = METHODS[job.method], None
    config = DHAConfig(head_budget=job.budget, task_type="CAUSAL_LM", **method.fields)
    if method.frozen:
        return adapter_alone(study, job, rows, config)
    fusion_rows = max(round(job.share * len(rows)), FEWEST_ROWS if method.trains_groups else 0)
    if fusion_rows:
        adapted = get_dha_model(copy.deepcopy(study.base), config, analysis=study.analyses.get(method.grouping))
        fuse(adapted, rows[:fusion_rows], method.distil, method.trains_groups, study.settings)
        before = evaluate_loss(adapted, study.validation, study.length)
        model = adapted.merge_and_unload()
    else:
        model = at_once(study, method, config)
    if len(rows) > fusion_rows and method.distil:
        heal(model, rows[fusion_rows:], study.base)
    elif len(rows) > fusion_rows:
        continue_pretraining(model, rows[fusion_rows:], study.settings)
    return model.eval(), before


def adapter_alone(study: Study, job: Job, rows: Tensor, config: DHAConfig) -> tuple[nn.Module, float]:
    """The base stays as it is; the closed form's maps are trained. Returns the collapsed model and the loss before the collapse."""
    adapted = get_dha_model(copy.deepcopy(study.base), config, analysis=study.analyses[METHODS[job.method].grouping])
    if len(rows):
        heal(adapted, rows, study.base)
    else:
        adapted.base_model.tie_groups()
    before = evaluate_loss(adapted, study.validation, study.length)
    return adapted.merge_and_unload().eval(), before


def at_once(study: Study, method: Method, config: DHAConfig) -> nn.Module:
    """The collapsed model without a fusion stage."""
    analysis = study.analyses[method.grouping]
    if method.one_member:
        return keep_members(study.base, analysis, analysis.plan(config.search_options()))
    return convert(study.base, config, analysis=analysis)


def kept_heads(model: nn.Module) -> int:
    """Key heads plus value heads of all layers."""
    plan = getattr(model.config, "dha_plan", None)
    if plan is None:
        return sum(2 * site.num_heads for site in find_attention(model))
    return sum(map(len, plan["key_groups"] + plan["value_groups"]))


def scored(study: Study, model: nn.Module) -> list[dict[str, Any]]:
    """lm-eval's metrics with their standard errors, one row each."""
    tasks = study.tasks
    results = evaluate_tasks(model, tasks.names, study.tokenizer, tasks.include_path, limit=tasks.limit, batch_size=64)
    return [
        {"task": task, "metric": metric, "value": value, "stderr": metrics.get(f"{metric}_stderr")}
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if not metric.endswith("_stderr")
    ]
