"""Where the attention of a model lives, and its weights in the layout of `fusion`.

The table of families is `models/families.py`; this module walks a live model along it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .fusion.heads import AttentionWeights, FrameLayout
from .models import Family, family_of

KINDS = ("key", "value")


@dataclass
class AttentionSite:
    """One attention block of a base model: `name` is its path from the model, `module` the block itself."""

    index: int
    name: str
    module: nn.Module
    family: Family
    num_query_heads: int
    num_heads: int
    head_dim: int
    rotary_dim: int | None

    def projection(self, kind: str) -> nn.Module:
        """The plain Linear of "query", "key", "value" or "output", also when an adapter wraps it."""
        module = getattr(self.module, self.projection_name(kind))
        while hasattr(module, "base_layer"):
            module = module.base_layer
        return module

    def projection_name(self, kind: str) -> str:
        return {"query": self.family.q, "key": self.family.k, "value": self.family.v, "output": self.family.o}[kind]

    def layout(self, kind: str) -> FrameLayout:
        """What a change of frame may mix: everything for values, only rotary pairs for keys with rotary positions."""
        if kind == "value" or self.family.position == "none":
            return FrameLayout.full(self.head_dim)
        return FrameLayout.rotary(self.head_dim, self.rotary_dim, self.family.position == "interleaved")

    @property
    def has_bias(self) -> bool:
        return any(self.projection(kind).bias is not None for kind in ("query", "key", "value"))

    def weights(self, dtype: torch.dtype = torch.float32) -> AttentionWeights:
        """The block's weights `[heads, d, E]`; biases, if any projection has one, are the last column."""
        query, key, value = (self._heads(kind, dtype) for kind in ("query", "key", "value"))
        output = self.projection("output").weight.detach().to(dtype)
        output = output.reshape(output.shape[0], self.num_query_heads, self.head_dim).transpose(0, 1)
        return AttentionWeights(query, key, value, output)

    def _heads(self, kind: str, dtype: torch.dtype) -> Tensor:
        projection = self.projection(kind)
        weight = projection.weight.detach().to(dtype)
        if self.has_bias:
            bias = weight.new_zeros(len(weight)) if projection.bias is None else projection.bias.detach().to(dtype)
            weight = torch.cat([weight, bias[:, None]], dim=1)
        return weight.reshape(-1, self.head_dim, weight.shape[1])

    def flat_weights(self, weights: AttentionWeights) -> dict[str, Tensor]:
        """Back to `nn.Linear` layout, as `models.build_merged` wants it: q, k, v, o and their biases."""
        flat = {"o": weights.output.transpose(0, 1).flatten(1)}
        for name, kind, heads in (
            ("q", "query", weights.query),
            ("k", "key", weights.key),
            ("v", "value", weights.value),
        ):
            rows = heads.flatten(0, 1)
            flat[name] = rows[:, :-1] if self.has_bias else rows
            if self.projection(kind).bias is not None:
                flat[f"{name}_bias"] = rows[:, -1]
        if self.projection("output").bias is not None:
            flat["o_bias"] = self.projection("output").bias.detach()
        return flat


def find_attention(model: nn.Module) -> list[AttentionSite]:
    """Every attention block of a supported model, in layer order.

    Raises:
        ValueError: the model has no `config.model_type`, its type is not supported or is already converted, or a block
            lacks a key or value projection (as in multi-head latent attention).
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        raise ValueError(
            f"`{type(model).__name__}` has no `config.model_type`, so its attention cannot be found; pass a transformers model."
        )
    family = family_of(config.model_type)
    modules = family.attentions(model.base_model)
    names = {module: name for name, module in model.named_modules()}
    return [_site(index, names[module], module, family, config) for index, module in enumerate(modules)]


def _site(index: int, name: str, module: nn.Module, family: Family, config: Any) -> AttentionSite:
    for projection in (family.q, family.k, family.v, family.o):
        if not isinstance(getattr(module, projection, None), nn.Module):
            raise ValueError(
                f"`{name}` has no `{projection}`, so it has no separate query, key, value and output heads to fuse "
                "(multi-head latent attention has none); choose a model with multi-head or grouped-query attention."
            )
    head_dim = getattr(module, "head_dim", None) or config.hidden_size // config.num_attention_heads
    site = AttentionSite(index, name, module, family, 0, 0, head_dim, _rotary_dim(family, config, head_dim))
    site.num_query_heads = site.projection("query").weight.shape[0] // head_dim
    site.num_heads = site.projection("key").weight.shape[0] // head_dim
    return site


def _rotary_dim(family: Family, config: Any, head_dim: int) -> int | None:
    if family.position != "partial":
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    return int(head_dim * rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0)))
