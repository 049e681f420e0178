"""Tasks of lm-eval on a base model, an adapted model or a merged one.

Importing this package registers the merged types, so a saved merged model needs no trust flag here. Under lm-eval's own command it
does: `lm-eval run --model hf --model_args pretrained=FOLDER,trust_remote_code=True --tasks ...`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel


def evaluate_tasks(
    model: PreTrainedModel | str | Path,
    tasks: Sequence[str],
    tokenizer: Any = None,
    include_path: str | Path | None = None,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 8,
    device: str | None = None,
    bootstrap_iters: int = 1000,
    **model_args: Any,
) -> dict[str, dict[str, float]]:
    """Metrics of every task, `{"task": {"acc": 0.41, "acc_stderr": 0.02, ...}}`; a task with several filters has `"metric,filter"`.

    Args:
        model: a model, or a folder or hub id of one. A folder of an adapter goes as `peft=FOLDER` beside its base.
        tasks: names of lm-eval tasks, of groups, or of the task files under `include_path`.
        tokenizer: needed for a model that was not loaded from a folder with its tokenizer.
        include_path: folder with task files (yaml). lm-eval's own tasks, which it reads from the hub, stay known.
        limit: documents per task, or their share if below 1; None takes all.
        device: "cuda", "cpu", ...; None takes the model's own, or CUDA where there is one.
        bootstrap_iters: resamplings behind the errors of metrics that have no formula for them, such as perplexity.
        model_args: anything else that lm-eval's `HFLM` takes, such as `dtype="bfloat16"` or `max_length=1024`.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: no task, an unknown task, or a model without a tokenizer.
    """
    lm_eval, manager = _manager(include_path, tasks)
    language_model = _language_model(model, tokenizer, batch_size, device, model_args)
    results = lm_eval.simple_evaluate(
        language_model, tasks=list(tasks), task_manager=manager, limit=limit, num_fewshot=num_fewshot,
        bootstrap_iters=bootstrap_iters, log_samples=False,
    )  # fmt: skip
    return {task: _numbers(metrics) for task, metrics in results["results"].items()}


def check_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> None:
    """Raise what `evaluate_tasks` would raise about its tasks, before any model is loaded."""
    _manager(include_path, tasks)


def _manager(include_path: str | Path | None, tasks: Sequence[str]) -> tuple[Any, Any]:
    """lm-eval and its list of tasks; its own thousands are only searched for tasks that `include_path` lacks."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            "tasks are run by lm-eval, which is not installed; `pip install 'dha_peft[eval]'`."
        ) from error
    if not tasks:
        raise ValueError("`tasks` is empty; name at least one task, such as `lambada_openai`.")
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(
            f"`include_path` is `{include_path}`, which is not a folder; give the folder of the task files."
        )
    path = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=path, include_defaults=False) if path else TaskManager()
    if path and not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=path)
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        where = f" nor under `{path}`" if path else "; give `include_path` for task files of your own"
        raise ValueError(f"`tasks` names {unknown}, which lm-eval does not know{where}.")
    return lm_eval, manager


def _language_model(model: Any, tokenizer: Any, batch_size: int | str, device: str | None, model_args: dict) -> Any:
    from lm_eval.models.huggingface import HFLM

    if isinstance(model, (str, Path)):
        source = str(model)
    else:
        # lm-eval takes a model's device from the argument when it is given, and leaves the model where it is.
        source, device = model.eval(), device or str(next(model.parameters()).device)
        tokenizer = tokenizer or getattr(model.config, "_name_or_path", "") or None
        if tokenizer is None:
            raise ValueError("`tokenizer` is missing, and the model does not say where it was loaded from; pass one.")
    options = {"batch_size": batch_size, "tokenizer": tokenizer, **model_args}
    return HFLM(source, **options, **({"device": device} if device else {}))


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Numbers only, and metric names without their filter where it tells nothing."""
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
    return {name.removesuffix(",none"): value for name, value in numbers.items() if name != "sample_len"}
