"""Model families as data: one row says where the attention of a family lives and how it is laid out.

This file ships with every merged checkpoint, so it imports nothing but the standard library and transformers.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any, Literal

# Auto class -> ending of the class name in transformers' modelling file.
TASKS: dict[str, str] = {
    "AutoModel": "Model",
    "AutoModelForCausalLM": "ForCausalLM",
    "AutoModelForSequenceClassification": "ForSequenceClassification",
    "AutoModelForTokenClassification": "ForTokenClassification",
    "AutoModelForQuestionAnswering": "ForQuestionAnswering",
}


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        model_type: transformers' `config.model_type`, and the name of its folder under `transformers.models`.
        prefix: start of the family's class names ("Llama" in `LlamaForCausalLM`).
        layers: attribute path from the trunk to the list of decoder layers.
        attention: attribute path from a decoder layer to its attention module.
        q, k, v, o: names of the projections inside the attention module.
        packing: how q, k and v lie in their Linears. "separate": three Linears, heads one after the other.
        position: "half" (RoPE pairs f and f + d/2), "interleaved" (2f and 2f + 1), "partial" (half-split over the
            first part of the head) or "none" (nothing position dependent touches the keys).
        reorder: whether query heads may be permuted (false if a head carries something of its own, such as a slope).
    """

    model_type: str
    prefix: str
    layers: str = "layers"
    attention: str = "self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    packing: Literal["separate"] = "separate"
    position: Literal["half", "interleaved", "partial", "none"] = "half"
    reorder: bool = True
    attention_class: str = field(default="")

    @property
    def merged_type(self) -> str:
        """Model type of the merged model."""
        return f"dha_{self.model_type}"

    def module(self, kind: Literal["modeling", "configuration"]) -> Any:
        """The family's file in transformers."""
        return importlib.import_module(f"transformers.models.{self.model_type}.{kind}_{self.model_type}")

    def base_class(self, ending: str) -> Any:
        """The family's class with this ending ("Config", "Attention", "ForCausalLM", ...); None if it has none."""
        if ending == "Attention" and self.attention_class:
            return getattr(self.module("modeling"), self.attention_class)
        kind = "configuration" if ending == "Config" else "modeling"
        return getattr(self.module(kind), f"{self.prefix}{ending}", None)

    def tasks(self) -> dict[str, str]:
        """The entries of `TASKS` for which the family has a class."""
        return {auto: ending for auto, ending in TASKS.items() if self.base_class(ending) is not None}

    def attentions(self, trunk: Any) -> list[Any]:
        """Attention modules of a trunk (`model.base_model`), in layer order."""
        return [get_path(layer, self.attention) for layer in get_path(trunk, self.layers)]


FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family("llama", "Llama"),
        Family("mistral", "Mistral"),
        Family("qwen2", "Qwen2"),
    )
}


def family_of(model_type: str) -> Family:
    """Row of a base model type.

    Raises:
        ValueError: the type is not in the table, or it is already a merged one.
    """
    if model_type.startswith("dha_"):
        raise ValueError(
            f"a model of type `{model_type}` is already a merged DHA model; give the base model it was made from."
        )
    if model_type not in FAMILIES:
        raise ValueError(
            f"`config.model_type` is `{model_type}`, which has no merged DHA model; "
            f"supported types are {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]


def get_path(root: Any, path: str) -> Any:
    """`root.a.b` for the path "a.b"."""
    for name in path.split("."):
        root = getattr(root, name)
    return root
