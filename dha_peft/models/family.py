"""One model family as data: where its attention lives and how it is laid out.

This file ships with every merged checkpoint, so it imports nothing but the standard library and transformers.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# Auto class -> ending of the class name in transformers' modelling file.
TASKS: dict[str, str] = {
    "AutoModel": "Model",
    "AutoModelForCausalLM": "ForCausalLM",
    "AutoModelForMaskedLM": "ForMaskedLM",
    "AutoModelForSequenceClassification": "ForSequenceClassification",
    "AutoModelForTokenClassification": "ForTokenClassification",
    "AutoModelForQuestionAnswering": "ForQuestionAnswering",
    "AutoModelForImageClassification": "ForImageClassification",
}
SEQ2SEQ = "ForConditionalGeneration"

Packing = Literal["separate", "heads", "blocks", "codegen"]
KeyNorm = Literal["", "head_rms", "head_layer", "all_rms"]
Role = Literal["self", "cross", "encoder"]


@dataclass(frozen=True)
class Stack:
    """A list of layers with the attention blocks in each, for models with several such lists or blocks.

    Attributes:
        layers: attribute path from the trunk to the list of layers.
        attention: path from a layer to each of its attention blocks, in the order in which they run, and its role: "self"
            (cached per token), "cross" (cached once per source token) or "encoder" (not cached).
        count: config field with the number of layers.
        heads: config field with the number of query heads.
    """

    layers: str
    attention: Mapping[str, Role]
    count: str = "num_hidden_layers"
    heads: str = "num_attention_heads"


@dataclass(frozen=True)
class Block:
    """One attention block of a live model; `name` is its path from the trunk."""

    name: str
    role: Role
    module: Any


@dataclass(frozen=True)
class Family:
    """One row of the table in `families.py`.

    Attributes:
        model_type: transformers' `config.model_type`.
        prefix: start of the family's class names ("Llama" in `LlamaForCausalLM`).
        layers: attribute path from the trunk to the list of decoder layers.
        attention: attribute path from a decoder layer to its attention module.
        stacks: instead of `layers` and `attention`, where there are several kinds of attention blocks (encoder-decoders).
        seq2seq: Auto class of the conditional generation model of an encoder-decoder; empty for others.
        source_mask: whether an encoder-decoder's `attention_mask` masks what its encoder's attention reads.
        q, k, v, o: paths of the projections inside the attention module; equal ones for a fused projection.
        packing: how a fused projection lies. "separate": three projections, heads one after the other. "heads": per
            KV head its queries, its key and its value. "blocks": all queries, all keys, all values. "codegen": four
            blocks of queries, values and keys.
        position: "half" (RoPE pairs f and f + r/2 of the first r dimensions), "interleaved" (2f and 2f + 1) or "none"
            (nothing position dependent touches the keys: ALiBi and learned positions).
        rope_flag: attribute of an attention module that is empty or false where a layer has no positions at all.
        reorder: whether query heads may be permuted (false if a head carries something of its own, such as a slope).
        gather: the family's forward wants one key and one value head per query head, so the distinct heads are
            repeated for it and cut out again in front of the cache.
        dispatch: the forward calls transformers' attention interface, so attention works on un-expanded heads.
        core: where it does not, the method that computes attention, if there is one: `core(query, key, value, mask)`,
            scores divided by the module's `scale_attn` if it has that, comparisons in float32 (see `core.py`).
        key_norm: "" (none), "head_rms" / "head_layer" (RMSNorm / LayerNorm of each key head) or "all_rms" (one RMSNorm
            over all key heads). The norm may be absent by config; then nothing is done about it.
        norm: name of the key norm inside the attention module.
        norm_axis: axis of the heads in what a norm of each head gets.
        folder: folder under `transformers.models`, if it is not the model type.
        names: class names that are not prefix + ending.
        classes: classes themselves by ending ("Config", "Model", "ForCausalLM"), for models outside of transformers.
    """

    model_type: str
    prefix: str
    layers: str = "layers"
    attention: str = "self_attn"
    stacks: tuple[Stack, ...] = ()
    seq2seq: str = ""
    source_mask: bool = True
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    packing: Packing = "separate"
    position: Literal["half", "interleaved", "none"] = "half"
    rope_flag: str = "use_rope"
    reorder: bool = True
    gather: bool = False
    dispatch: bool = True
    core: str = ""
    key_norm: KeyNorm = ""
    norm: str = "k_norm"
    norm_axis: int = 2
    folder: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    classes: Mapping[str, type] = field(default_factory=dict)

    @property
    def merged_type(self) -> str:
        """Model type of the merged model."""
        return f"dha_{self.model_type}"

    @property
    def ships(self) -> bool:
        """Whether merged checkpoints load as remote code: families registered by a user are in no shipped table."""
        return not self.classes

    def base_class(self, ending: str) -> Any:
        """The family's class with this ending ("Config", "ForCausalLM", ...); None if it has none."""
        if self.classes:
            return self.classes.get(ending)
        folder = self.folder or self.model_type
        kind = "configuration" if ending == "Config" else "modeling"
        module = importlib.import_module(f"transformers.models.{folder}.{kind}_{folder}")
        return getattr(module, self.names.get(ending, f"{self.prefix}{ending}"), None)

    def available(self) -> bool:
        """Whether the installed transformers has this family: one that is gone must not break the others."""
        try:
            return self.base_class("Config") is not None and self.base_class("Model") is not None
        except ImportError:
            return False

    def tasks(self) -> dict[str, str]:
        """Auto class -> ending, where the family has a class. Encoders, and decoders taken out of an encoder-decoder, are no
        causal models."""
        tasks = {auto: ending for auto, ending in TASKS.items() if ending != "ForCausalLM" or not self.stacks}
        if self.seq2seq:
            tasks[self.seq2seq] = SEQ2SEQ
        return {auto: ending for auto, ending in tasks.items() if self.base_class(ending) is not None}

    def parts(self) -> tuple[Stack, ...]:
        """Where all attention blocks are."""
        return self.stacks or (Stack(self.layers, {self.attention: "self"}),)

    def blocks(self, trunk: Any) -> list[Block]:
        """Attention blocks of a trunk (`model.base_model`), in the order in which they run."""
        return [
            Block(f"{stack.layers}.{index}.{path}", role, get_path(layer, path))
            for stack in self.parts()
            for index, layer in enumerate(get_path(trunk, stack.layers))
            for path, role in stack.attention.items()
        ]

    def attentions(self, trunk: Any) -> list[Any]:
        """The modules of `blocks`."""
        return [block.module for block in self.blocks(trunk)]

    def query_heads(self, config: Any) -> list[int]:
        """Query heads of every attention block, by the config."""
        return [
            heads
            for stack in self.parts()
            for heads in [getattr(config, stack.heads)] * (getattr(config, stack.count) * len(stack.attention))
        ]

    def has_norm(self, attention: Any, kind: KeyNorm) -> bool:
        """Whether this attention module normalises its keys in this way."""
        return self.key_norm == kind and hasattr(attention, self.norm)

    def has_turn(self, attention: Any) -> bool:
        """Whether the read-out of shared keys stays a step of its own, because a norm lies between it and the queries."""
        return self.has_norm(attention, "head_rms") or self.has_norm(attention, "all_rms")


def head_size(attention: Any, config: Any) -> int:
    """Size of one head of an attention module."""
    names = ("head_dim", "head_size", "key_value_proj_dim")
    size = next((getattr(attention, name) for name in names if getattr(attention, name, None)), None)
    return int(size or config.hidden_size // config.num_attention_heads)


def kv_heads(family: Family, attention: Any, config: Any) -> int:
    """KV heads of a base attention module, counted in its weights."""
    projection, dim = get_path(attention, family.k), head_size(attention, config)
    # transformers' Conv1D keeps `[inputs, outputs]`.
    rows = projection.nf if hasattr(projection, "nf") else projection.weight.shape[0]
    heads = int(rows) // dim
    return heads if family.packing == "separate" else (heads - config.num_attention_heads) // 2


def rotary_size(family: Family, attention: Any, config: Any) -> int:
    """How many dimensions of a head carry rotary positions; 0 if positions do not touch the keys of this layer."""
    if family.position == "none" or getattr(config, "alibi", False) or not getattr(attention, family.rope_flag, True):
        return 0
    size = getattr(attention, "rotary_ndims", None) or getattr(attention, "rotary_dim", None)
    if size is None:
        rope = getattr(config, "rope_parameters", None) or {}
        factor = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
        size = int(head_size(attention, config) * (1.0 if factor is None else factor))
    return int(size) + int(size) % 2  # an odd share of a head is rounded up, because frequencies come in pairs


def rotary_pairs(family: Family, size: int) -> list[tuple[int, int]]:
    """Dimensions that rotate together, for `size` rotary dimensions."""
    if family.position == "interleaved":
        return [(2 * f, 2 * f + 1) for f in range(size // 2)]
    return [(f, f + size // 2) for f in range(size // 2)]


def get_path(root: Any, path: str, *default: Any) -> Any:
    """`root.a.b` for the path "a.b"; like `getattr` where it ends early."""
    for name in path.split("."):
        root = getattr(root, name, *default)
    return root


def set_path(root: Any, path: str, value: Any) -> None:
    """`root.a.b = value` for the path "a.b"."""
    parent, _, name = path.rpartition(".")
    setattr(get_path(root, parent) if parent else root, name, value)
