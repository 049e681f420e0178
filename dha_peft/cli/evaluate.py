"""`dha eval`: base and result side by side, by lm-eval and by loss on held-out text."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..evaluation import check_tasks, evaluate_tasks
from ..texts import evaluate_loss
from . import options as o
from .console import banner, lines, note
from .loading import check_files, held_out, load_config, load_model, load_tokenizer, validation_tokens
from .result import read_facts, write_facts
from .settings import Run, load_run

Tasks = Annotated[str | None, typer.Option("--tasks", help="lm-eval tasks, separated by commas.")]
Include = Annotated[str | None, typer.Option("--include-path", help="Folder with your own lm-eval task files.")]
Base = Annotated[str | None, typer.Option("--base", help="The base model, if it has moved.")]


def evaluate(
    result: o.Result,
    tasks: Tasks = None,
    include_path: Include = None,
    validation: o.Held = None,
    base: Base = None,
    config: o.Config = None,
    set_: o.Set = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    limit: o.Limit = None,
    dry_run: o.DryRun = False,
) -> None:
    """Evaluate base and result side by side; the figures go into the result's card and report.

    No trust flag is needed for the merged model, as this command imports the package first.
    """
    facts, own = read_facts(result), result / "run.yaml"
    run = o.make_run(
        config or (own if own.is_file() else None), set_, validation=validation, model=base, device=device, dtype=dtype,
        eval__tasks=[t.strip() for t in tasks.split(",")] if tasks else None, eval__include_path=include_path,
    )  # fmt: skip
    run.limit, run.report = limit, load_run(own if own.is_file() else None).report
    check_files(run)
    load_config(run.model)
    if not run.eval.tasks and not run.validation.files:
        raise ValueError("there is nothing to evaluate; pass `--tasks NAME,...` for lm-eval or `--validation FILE`.")
    if run.eval.tasks:
        check_tasks(run.eval.tasks, run.eval.include_path)
    banner("eval", {"base": run.model, "result": result, "tasks": ", ".join(run.eval.tasks), "limit": limit})
    if dry_run:
        return
    models = {"base": load_model(run.model, run), "result": load_model(str(result), run)}
    if run.validation.files:
        found = _losses(run, models)
        _keep(facts, found, held_out(run))
        lines({f"loss, {name}": f"{loss:.4f} nats/token" for name, loss in found.items()})
    if run.eval.tasks:
        facts["scores"], facts["scores_limit"] = score_table(run, models), limit
        for row in facts["scores"]:
            pair = " -> ".join(_shown(row[side]) for side in ("base", "result"))
            note(f"  {row['task']:28s} {row['metric']:12s} {pair}")
    write_facts(result, facts, run.report)
    note(f"Wrote the figures into {result}")


def _keep(facts: dict[str, Any], found: dict[str, float], text: dict[str, Any]) -> None:
    """Losses into the facts. Those of other models stay where they are of the same text, and a result is named once."""
    kept = facts.get("losses", {}) if facts.get("held_out") == text else {}
    again = list(kept.values())[-1:] == [found["result"]]
    facts["losses"] = kept | {name: loss for name, loss in found.items() if not (again and name == "result")}
    facts["held_out"] = text


def _losses(run: Run, models: dict[str, Any]) -> dict[str, float]:
    ids = validation_tokens(run, load_tokenizer(run.model))
    return {name: evaluate_loss(model, ids, run.validation.length) for name, model in models.items()}


def score_table(run: Run, models: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows `{task, metric, base: [value, stderr], result: [value, stderr]}`.

    Raises:
        ImportError: lm-eval is not installed.
    """
    scores = {name: _lm_eval(run, model) for name, model in models.items()}
    rows = []
    for task, metrics in scores["base"].items():
        for metric in metrics:
            rows.append(
                {"task": task, "metric": metric, **{name: found[task][metric] for name, found in scores.items()}}
            )
    return rows


def _lm_eval(run: Run, model: Any) -> dict[str, dict[str, list[float | None]]]:
    options = run.eval
    found = evaluate_tasks(
        model, options.tasks, load_tokenizer(run.model), options.include_path, run.limit, options.num_fewshot, options.batch_size
    )  # fmt: skip
    return {task: _with_errors(numbers) for task, numbers in found.items()}


def _with_errors(numbers: dict[str, float]) -> dict[str, list[float | None]]:
    """Every metric as `[value, standard error]`; with several filters the names are `metric,filter` and `metric_stderr,filter`."""
    found = {}
    for name, value in numbers.items():
        metric, comma, rest = name.partition(",")
        if not metric.endswith("_stderr"):
            found[name] = [value, numbers.get(f"{metric}_stderr{comma}{rest}")]
    return found


def _shown(pair: list[float | None]) -> str:
    return f"{pair[0]:.4f}" + (f" ± {pair[1]:.4f}" if pair[1] is not None else "")
