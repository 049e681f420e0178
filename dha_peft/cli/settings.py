"""One run as data: a YAML file, flags over it, and errors that suggest the nearest key."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass
class Calibration:
    """Text that heads are compared on. Without files the weights alone decide. Paths are relative to the working folder."""

    files: list[str] = field(default_factory=list)
    tokens: int = 131_072
    length: int = 512
    batch_size: int = 8


@dataclass
class Validation:
    """Held-out text; with files, the loss of base and result is measured."""

    files: list[str] = field(default_factory=list)
    tokens: int = 20_480
    length: int = 512


@dataclass
class Training:
    """Fusion of the adapter, then healing of the merged model. `files` default to the calibration's.

    `objective` is "base" (distance from the base model) or "text" (next token). Without a `heal_learning_rate` it is that of
    `dha_peft.training.heal`. `arguments` takes any field of `transformers.TrainingArguments` that has no key of its own here;
    `heal_arguments` overrides them in the healing stage.
    """

    files: list[str] = field(default_factory=list)
    tokens: int = 1_000_000
    length: int = 512
    steps: int = 100
    learning_rate: float = 5e-3
    heal_steps: int = 0
    heal_learning_rate: float | None = None
    objective: str = "base"
    arguments: dict[str, Any] = field(default_factory=dict)
    heal_arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class Evaluation:
    """lm-eval: names of tasks, a folder of own task files, shots, documents per batch."""

    tasks: list[str] = field(default_factory=list)
    include_path: str | None = None
    num_fewshot: int | None = None
    batch_size: int = 8


@dataclass
class Sweep:
    """Shares of heads to try, all from one analysis, and whether mean-pooled GQA is measured beside them."""

    budgets: list[float] = field(default_factory=lambda: [0.75, 0.625, 0.5, 0.4375, 0.375, 0.3125, 0.25, 0.1875])
    reference: bool = True


@dataclass
class Run:
    """A whole run. `dha` takes any field of `DHAConfig`; `limit` cuts every stage short, for a quick try."""

    model: str = ""
    output: str = ""
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    limit: int | None = None
    report: bool = True
    dha: dict[str, Any] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=Calibration)
    validation: Validation = field(default_factory=Validation)
    train: Training = field(default_factory=Training)
    eval: Evaluation = field(default_factory=Evaluation)
    sweep: Sweep = field(default_factory=Sweep)

    def yaml(self) -> str:
        """The run as YAML that `load_run` reads back."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)

    def config(self) -> Any:
        """The `DHAConfig` of the run."""
        from ..adapter import DHAConfig

        return DHAConfig(**{"task_type": "CAUSAL_LM", **self.dha})


def load_run(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Run:
    """The run in a YAML file with `overrides` (dotted keys, None means not given) on top.

    Raises:
        ValueError: no such file, an unknown key (the nearest one is suggested), or a value of the wrong type.
    """
    data = _read(path) if path else {}
    for key, value in (overrides or {}).items():
        if value is not None:
            _assign(data, key, value)
    run = _build(Run, data, "")
    _check_sizes(run)
    return run


def _check_sizes(run: Run) -> None:
    """Raise ValueError for counts below one."""
    sizes = {
        "limit": run.limit,
        "eval.batch_size": run.eval.batch_size,
        "calibration.batch_size": run.calibration.batch_size,
    }
    for section in ("calibration", "validation", "train"):
        sizes |= {f"{section}.{name}": getattr(getattr(run, section), name) for name in ("tokens", "length")}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"`{name}` is {size}, but it counts something; give at least 1.")


def parse_assignment(text: str) -> tuple[str, Any]:
    """`dha.damping=0.5` to its dotted key and its YAML value."""
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise ValueError(f"`--set {text}` has no `=`; write KEY=VALUE, as in `--set dha.damping=0.5`.")
    return key.strip(), yaml.safe_load(value)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"the run file `{path}` does not exist; give a YAML file.")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"the run file `{path}` is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ValueError(f"the run file `{path}` holds a {type(data).__name__}; it needs `key: value` lines.")
    return data


def _assign(data: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for depth, name in enumerate(path):
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            raise ValueError(f"`{'.'.join(path[: depth + 1])}` is one value, so `{key}` cannot be set in it.")
    data[last] = value


def _build(cls: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"`{where}` is {data!r}, but it is a section; write `key: value` lines below it.")
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in data.items():
        key = f"{where}.{name}" if where else str(name)
        if name not in hints:
            raise ValueError(_unknown(str(name), list(hints), where))
        hint = hints[name]
        values[name] = _build(hint, value, key) if dataclasses.is_dataclass(hint) else _value(key, value, hint)
    return cls(**values)


def _value(key: str, value: Any, hint: Any) -> Any:
    foreign = {"dha": _dha_fields, "train.arguments": _training_fields, "train.heal_arguments": _training_fields}
    if key in foreign:
        if not isinstance(value, dict):
            raise ValueError(f"`{key}` is {value!r}, but it is a section; write `key: value` lines below it.")
        hints = foreign[key]()
        for name in value:
            if name not in hints:
                raise ValueError(_unknown(str(name), list(hints), key))
        return {name: cast(f"{key}.{name}", item, hints[name]) for name, item in value.items()}
    return cast(key, value, hint)


def cast(key: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` asks (`1e-4` is a string in YAML); hints other than plain ones pass any value.

    Raises:
        ValueError: the value cannot be one of the hinted type.
    """
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    plain = [o for o in options if o in (bool, int, float, str) or typing.get_origin(o) is list]
    if len(plain) != len([o for o in options if o is not type(None)]):
        return value
    for option in plain:
        found, result = _try(value, option)
        if found:
            return result
    names = " or ".join(str(o) if typing.get_args(o) else o.__name__ for o in plain)
    raise ValueError(f"`{key}` is {value!r}, but it needs a value of type {names}.")


def _try(value: Any, kind: Any) -> tuple[bool, Any]:
    if typing.get_origin(kind) is list:
        (inner,) = typing.get_args(kind)
        items = value if isinstance(value, (list, tuple)) else [value]
        tried = [_try(item, inner) for item in items]
        return all(found for found, _ in tried), [item for _, item in tried]
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool), value
    if kind is str:
        return isinstance(value, (str, Path)), str(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return False, value
    if kind is int:
        return number.is_integer(), int(number) if number.is_integer() else value
    return True, number


def _unknown(name: str, known: list[str], where: str) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    place = f" in `{where}`" if where else ""
    hint = f"did you mean `{near[0]}`?" if near else f"known keys are {', '.join(sorted(known)[:12])}."
    return f"`{name}` is not a known key{place}; {hint}"


def _dha_fields() -> dict[str, Any]:
    from ..adapter import DHAConfig

    internal = {
        "slow_pairs",
        "auto_mapping",
        "peft_type",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "peft_version",
    }
    return {name: hint for name, hint in typing.get_type_hints(DHAConfig).items() if name not in internal}


def _training_fields() -> dict[str, Any]:
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    return {f.name: hints[f.name] for f in dataclasses.fields(TrainingArguments) if f.init and f.name != "output_dir"}
