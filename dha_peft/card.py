"""The model card: front matter that shows the lineage on a hub, then what was done, at what cost, and how to load it."""

from __future__ import annotations

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


def write_card(folder: str | Path, facts: dict[str, Any], run_yaml: str | None = None) -> Path:
    """Write README.md into a folder with a merged model; see `model_card`."""
    path = Path(folder) / "README.md"
    path.write_text(model_card(facts, run_yaml), encoding="utf-8")
    return path


def model_card(facts: dict[str, Any], run_yaml: str | None = None) -> str:
    """The card as Markdown.

    Args:
        facts: `base` (folder or hub id), `plan` (`DHAPlan.to_dict()`), and whatever is known of `losses` (name to nats per
            token), `scores`, `kv_bytes`, `kv_bytes_measured`, `calibration_tokens`, `training_tokens`, `speed`, `method`.
        run_yaml: the exact run, shown as it is.
    """
    plan = DHAPlan.from_dict(facts["plan"])
    parts = [_front_matter(facts), _summary(facts, plan), _loading(), "## Plan\n\n```\n" + plan.table() + "\n```"]
    parts += [part for part in (_losses(facts), _scores(facts), _speed(facts)) if part]
    if run_yaml:
        parts.append(f"## Run\n\n```yaml\n{run_yaml.strip()}\n```")
    parts.append("## Citation\n\nThe method is that of the paper; the aligned fusion is dha_peft's own.\n\n" + CITATION)
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: dict[str, Any]) -> str:
    data = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
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


def _loading() -> str:
    return """## How to load

With the package (`pip install dha_peft`), which also brings the fast decode path:

```python
import dha_peft  # registers the model type
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS_MODEL")
```

Without it, from the code saved beside the weights:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS_MODEL", trust_remote_code=True)
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
