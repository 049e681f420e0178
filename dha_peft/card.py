"""The model card: front matter that shows the lineage on a hub, then what was done, at what cost, and how to load it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml

from .plan import DHAPlan

CITATION = """```bibtex
@inproceedings{dha2024,
  title     = {DHA: Learning Decoupled-Head Attention from Transformer Checkpoints via Adaptive Heads Fusion},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024},
  note      = {arXiv:2406.06567}
}
```"""
# Auto class -> the hub's name of its task.
PIPELINES = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
}
_TEMPLATE = "This model card has been automatically generated."  # what transformers writes at an upload
_MARK = "<!-- written by dha_peft, "


def write_card(folder: str | Path, facts: dict[str, Any], run_yaml: str | None = None) -> bool:
    """Write README.md into a folder with a merged model (see `model_card`); False if a person's own is there and stays."""
    path = Path(folder) / "README.md"
    if path.is_file() and not _untouched(path.read_text(encoding="utf-8")):
        return False
    path.write_text(model_card(facts, run_yaml), encoding="utf-8")
    return True


def save_card(model: Any, folder: str | Path) -> None:
    """Write the card of a merged model that is being saved or uploaded, from its config alone. An existing README stays,
    unless it is the empty one that transformers puts there at an upload."""
    path, config = Path(folder) / "README.md", model.config
    if not config.dha_plan or getattr(model, "_hf_peft_config_loaded", False):
        return
    if path.is_file() and _TEMPLATE not in path.read_text(encoding="utf-8"):
        return
    source = Path(config._name_or_path).resolve()
    known = source.name == config.dha_base and source.exists()
    facts = {"base": str(source) if known else config.dha_base or config.model_type.removeprefix("dha_")}
    facts |= {"plan": config.dha_plan, "auto_class": _auto_class(model), "remote_code": model.dha_family.ships}
    path.write_text(model_card(facts), encoding="utf-8")


def model_card(facts: dict[str, Any], run_yaml: str | None = None) -> str:
    """The card as Markdown.

    Args:
        facts: `base` (folder or hub id), `plan` (`DHAPlan.to_dict()`), and whatever is known of `losses` (name to nats per
            token), `scores`, `kv_bytes`, `kv_bytes_measured`, `calibration_tokens`, `training_tokens`, `speed`, `method`,
            `auto_class` (the Auto class that loads it), `remote_code` (whether its code is saved with it).
        run_yaml: the exact run, shown as it is.
    """
    plan = DHAPlan.from_dict(facts["plan"])
    parts = [_summary(facts, plan), _loading(facts), "## Plan\n\n```\n" + plan.table() + "\n```"]
    parts += [part for part in (_losses(facts), _scores(facts), _speed(facts)) if part]
    if run_yaml:
        parts.append(f"## Run\n\n```yaml\n{run_yaml.strip()}\n```")
    parts.append("## Citation\n\nThe method is that of the paper; the aligned fusion is dha_peft's own.\n\n" + CITATION)
    body = "\n\n".join(parts)
    return f"{_front_matter(facts)}\n\n{body}\n\n{_MARK}{_digest(body)} -->\n"


def _untouched(card: str) -> bool:
    """Whether this is a card of ours that nobody has edited since; its front matter may have been."""
    text, found, mark = card.rstrip().rpartition(f"\n\n{_MARK}")
    body = text.split("\n---\n", 1)[-1].strip()
    return bool(found) and mark == f"{_digest(body)} -->"


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _auto_class(model: Any) -> str:
    family, names = model.dha_family, [cls.__name__ for cls in type(model).__mro__]
    found = (auto for auto, ending in family.tasks().items() if f"Dha{family.prefix}{ending}" in names)
    return next(found, "AutoModel")


def _front_matter(facts: dict[str, Any]) -> str:
    data = {
        "library_name": "transformers",
        "pipeline_tag": PIPELINES.get(facts.get("auto_class", "AutoModelForCausalLM"), "text-generation"),
        "base_model": _base_name(facts["base"]),
        "base_model_relation": "finetune",
        "tags": ["dha", "peft", "kv-cache"],
        **_licence(facts["base"]),
    }
    return "---\n" + yaml.safe_dump(data, sort_keys=False) + "---"


def _licence(base: str) -> dict[str, str]:
    """The base's own licence, where its folder says it; otherwise a pointer to the base."""
    card = Path(base) / "README.md"
    if card.is_file():
        parts = card.read_text(encoding="utf-8").split("---")
        found = yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0].strip() else None
        if isinstance(found, dict) and "license" in found:
            return {key: found[key] for key in ("license", "license_name", "license_link") if key in found}
    return {"license": "other", "license_name": "that-of-the-base-model"}


def _base_name(base: str) -> str:
    return Path(base).resolve().name if Path(base).exists() else base


def _summary(facts: dict[str, Any], plan: DHAPlan) -> str:
    name, (before, after) = _base_name(facts["base"]), plan.kv_bytes_per_token()
    text = f"# {name}, with {plan.kept:.1%} of its key and value heads\n\n"
    text += f"Made from `{name}` by Decoupled-Head Attention (`dha_peft`): similar key heads and similar value heads of a layer "
    text += f"are fused, each layer with its own counts. KV cache: {before:,} -> {after:,} bytes per token in 16 bit"
    measured = facts.get("kv_bytes_measured")
    if measured:
        text += f" (measured on this model's cache tensors: {measured['before']:,} -> {measured['after']:,})"
    tokens = [f"{facts[key]:,} {what}" for key, what in (("calibration_tokens", "calibration tokens"), ("training_tokens", "training tokens")) if facts.get(key)]  # fmt: skip
    return text + "." + (f" Made with {' and '.join(tokens)}." if tokens else "")


def _loading(facts: dict[str, Any]) -> str:
    auto = facts.get("auto_class", "AutoModelForCausalLM")
    text = f"""## How to load

With the package (`pip install dha_peft`), which also brings the fast decode path:

```python
import dha_peft  # registers the model type
from transformers import {auto}

model = {auto}.from_pretrained("THIS_MODEL")
```"""
    if not facts.get("remote_code", True):
        return text
    return f"""{text}

Without it, from the code saved beside the weights:

```python
from transformers import {auto}

model = {auto}.from_pretrained("THIS_MODEL", trust_remote_code=True)
```"""


def _losses(facts: dict[str, Any]) -> str:
    rows = [f"| {name} | {loss:.4f} |" for name, loss in facts.get("losses", {}).items()]
    return "\n".join(["## Loss on held-out text", "", "| model | nats per token |", "|---|---|", *rows]) if rows else ""


def _scores(facts: dict[str, Any]) -> str:
    rows = [
        f"| {row['task']} | {row['metric']} | {_with_error(row['base'])} | {_with_error(row['result'])} |"
        for row in facts.get("scores", [])
    ]
    if not rows:
        return ""
    limit = facts.get("scores_limit")
    note = f"\n\nOnly the first {limit} documents of each task were used." if limit else ""
    return "\n".join(["## lm-eval", "", "| task | metric | base | this model |", "|---|---|---|---|", *rows]) + note


def _with_error(pair: list[float | None]) -> str:
    value, error = pair
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _speed(facts: dict[str, Any]) -> str:
    speed = facts.get("speed")
    if not speed:
        return ""
    rows = [
        f"| {name} | {speed[name]['ms_per_step']:.2f} | {speed[name]['cache_bytes']:,} |" for name in ("base", "result")
    ]
    head = f"## Decoding, batch {speed['batch']}, {speed['context']} tokens of context, {speed['device']}"
    return "\n".join([head, "", "| model | ms per step | bytes of cache |", "|---|---|---|", *rows])
