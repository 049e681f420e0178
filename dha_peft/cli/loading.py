"""Models, tokenizers and text for the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapter.model import check_plan
from ..attention import find_attention
from ..plan import DHAPlan
from ..texts import text_tokens, token_batches
from .settings import Run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device_of(run: Run) -> str:
    """The device to work on.

    Raises:
        ValueError: one that this machine or this torch lacks.
    """
    if run.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=run.device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise ValueError(
            f"`device` is {run.device!r}, which cannot be used here ({reason}); choose auto or cpu."
        ) from error
    return run.device


def dtype_of(run: Run) -> torch.dtype | None:
    """The dtype to load weights in; None: the checkpoint's own.

    Raises:
        ValueError: an unknown name.
    """
    if run.dtype == "auto":
        return None
    if run.dtype not in DTYPES:
        raise ValueError(f"`dtype` is {run.dtype!r}; choose one of auto, {', '.join(DTYPES)}.")
    return DTYPES[run.dtype]


def load_config(model: str) -> Any:
    """A model's config from a folder, a config.json or a hub id; no weights are touched.

    Raises:
        ValueError: no model is named, or the folder has no config.json.
    """
    from transformers import AutoConfig

    if not model:
        raise ValueError("no model is given; name a local folder or a hub id, or set `model` in the run file.")
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"the folder `{model}` has no config.json; give a folder that `save_pretrained` wrote.")
    if not path.exists() and (path.is_absolute() or model.startswith(".") or model.count("/") > 1):
        raise ValueError(f"the folder `{model}` does not exist; give a local folder or a hub id such as org/name.")
    try:
        return AutoConfig.from_pretrained(str(path.parent) if path.is_file() else model)
    except (OSError, ValueError) as error:
        where = "" if path.exists() else "there is no such folder, and on the hub: "
        reason = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")
        raise ValueError(f"`{model}` cannot be loaded; {where}{reason}.") from error


def check_causal(config: Any) -> None:
    """Raise ValueError for a family without a causal language model, such as an encoder-decoder."""
    from ..models import FAMILIES

    family = FAMILIES.get(config.model_type.removeprefix("dha_"))
    if family is not None and "AutoModelForCausalLM" not in family.tasks():
        raise ValueError(
            f"`{config.model_type}` has no causal language model, and the commands calibrate and measure only these; convert "
            "it from Python with `dha_peft.convert` (see docs/families.md)."
        )


def skeleton(config: Any) -> nn.Module:
    """The model of a config on the meta device: shapes without memory. Refuses what cannot be converted.

    Raises:
        ValueError: an unsupported or already converted model type, or one without a causal language model.
    """
    from transformers import AutoModelForCausalLM

    from ..models import family_of

    family_of(config)
    check_causal(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    find_attention(model)
    return model


def given_plan(run: Run, model: nn.Module) -> DHAPlan | None:
    """The plan that the run itself names; None where a search finds it.

    Raises:
        ValueError: a plan for another model.
    """
    config = run.config()
    if config.plan is None:
        return None
    plan = DHAPlan.from_dict(config.plan)
    check_plan(plan, find_attention(model))
    return plan


def load_model(name: str, run: Run) -> nn.Module:
    """A causal model in eval mode on the run's device. Merged models load without a trust flag, as the package is imported.

    Raises:
        ValueError: a family without a causal language model.
    """
    from transformers import AutoModelForCausalLM

    check_causal(load_config(name))
    dtype = dtype_of(run)
    options = {} if dtype is None else {"dtype": dtype}
    if dtype is None:
        options["dtype"] = "auto"
    return AutoModelForCausalLM.from_pretrained(name, **options).eval().to(device_of(run))


def load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def load_base(run: Run) -> tuple[Any, nn.Module]:
    """Tokenizer and model of a run; a model that is not there is refused by its config, in one sentence."""
    load_config(run.model)
    return load_tokenizer(run.model), load_model(run.model, run)


def calibration_batches(run: Run, tokenizer: Any) -> list[dict[str, Any]] | None:
    """Batches of the calibration text; None without files."""
    part = run.calibration
    if not part.files:
        return None
    tokens = part.tokens if run.limit is None else min(part.tokens, run.limit * part.batch_size * part.length)
    return token_batches(tokenizer, part.files, tokens, part.length, part.batch_size)


def training_rows(run: Run, tokenizer: Any) -> list[dict[str, Any]]:
    """Rows of `input_ids` and `labels` `[length]` for a Trainer.

    Raises:
        ValueError: neither training nor calibration files are given.
    """
    files = run.train.files or run.calibration.files
    if not files:
        raise ValueError("there is no text to train on; pass `--text FILE`, or set `train.files` in the run file.")
    batches = token_batches(tokenizer, files, run.train.tokens, run.train.length)
    return [{"input_ids": row, "labels": row} for batch in batches for row in batch["input_ids"]]


def validation_tokens(run: Run, tokenizer: Any) -> torch.Tensor | None:
    """Held-out tokens `[N]`; None without files.

    Raises:
        ValueError: less text than one window.
    """
    part = run.validation
    if not part.files:
        return None
    ids = text_tokens(tokenizer, part.files, held_out(run)["tokens"] + 1)
    if len(ids) <= part.length:
        raise ValueError(
            f"the validation text has {len(ids)} tokens, less than one window of {part.length}; give more."
        )
    return ids


def held_out(run: Run) -> dict[str, Any]:
    """Which text losses are measured on: two losses compare only where this is equal."""
    part = run.validation
    tokens = part.tokens if run.limit is None else min(part.tokens, run.limit * part.length)
    return {"files": [Path(file).name for file in part.files], "tokens": tokens, "length": part.length}


def check_files(run: Run) -> None:
    """Raise ValueError for a text file that is not there, before anything long starts."""
    for section in ("calibration", "validation", "train"):
        for file in getattr(run, section).files:
            if not Path(file).is_file():
                what = "is a folder" if Path(file).is_dir() else "does not exist"
                raise ValueError(f"`{section}.files` names `{file}`, which {what}; give a .txt or .jsonl file.")


def check_grouping(run: Run) -> None:
    """Raise ValueError for groups that only training finds, before the calibration starts."""
    if run.config().grouping == "learned":
        raise ValueError(
            "`dha.grouping` is 'learned', but only fusion steps find such groups; use `dha train` with `train.steps` above 0, or "
            "choose another grouping."
        )
