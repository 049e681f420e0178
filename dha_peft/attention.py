"""Where the attention of a model lives, and its weights in the layout of `fusion`.

The table of families is `models/families.py`; this module walks a live model along it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .fusion.collapse import SharedHeads
from .fusion.heads import AttentionWeights, FrameLayout, HeadMaps
from .models import Family, family_of
from .models.family import Block, Role, get_path, head_size, kv_heads, rotary_pairs, rotary_size
from .models.packing import packed_rows
from .plan import DHAPlan, Groups, LayerPlan
from .rotary import context_turns, slow_pairs

KINDS = ("key", "value")


@dataclass
class AttentionSite:
    """One attention block of a base model: `name` is its path from the model, `block` its path from the trunk, `module` the
    block itself; `role` "cross" reads keys and values from an encoder, "encoder" has no cache (see `Stack`). `slow` `[rotary_dim / 2]` are
    the rotary pairs that hardly turn."""

    index: int
    name: str
    module: nn.Module
    family: Family
    num_query_heads: int
    num_heads: int
    head_dim: int
    rotary_dim: int
    slow: Tensor
    block: str = ""
    role: Role = "self"

    def projection(self, kind: str) -> nn.Module:
        """The plain projection of "query", "key", "value" or "output", also when an adapter wraps it. A fused one is the
        same for queries, keys and values, until an adapter takes it apart."""
        module = self.outer(kind)
        while hasattr(module, "base_layer"):
            module = module.base_layer
        return module

    def outer(self, kind: str) -> nn.Module:
        """The projection with whatever adapters are around it."""
        module = get_path(self.module, getattr(self.family, kind[0]))
        return getattr(module, f"{kind[0]}_heads", module)

    def projection_name(self, kind: str) -> str:
        """Path of the projection inside the attention module."""
        name = getattr(self.family, kind[0])
        return f"{name}.{kind[0]}_heads" if hasattr(get_path(self.module, name), f"{kind[0]}_heads") else name

    def rows(self, kind: str) -> Tensor | None:
        """Rows of a fused projection that belong to "query", "key" or "value"; None where it is a projection of its own."""
        packing = self.family.packing
        if packing == "separate" or kind == "output" or self.projection_name(kind) != getattr(self.family, kind[0]):
            return None
        return packed_rows(packing, self.num_query_heads, self.num_heads, self.head_dim)[kind[0]]

    def part(self, kind: str) -> tuple[Tensor, Tensor | None]:
        """Weight `[outputs, inputs]` and bias of one projection, cut out of a fused one."""
        module, rows = self.projection(kind), self.rows(kind)
        weight, bias = module.weight.detach(), getattr(module, "bias", None)
        weight = weight.T if _transposed(module) else weight
        bias = None if bias is None else bias.detach()
        if rows is None:
            return weight, bias
        rows = rows.to(weight.device)
        return weight[rows], None if bias is None else bias[rows]

    @property
    def input_size(self) -> int:
        weight = self.projection("key").weight
        return weight.shape[0] if _transposed(self.projection("key")) else weight.shape[1]

    def layout(self, kind: str) -> FrameLayout:
        """What a change of frame may mix: everything for values; for keys only rotary pairs where there are rotary
        positions that turn them far, and only what commutes with a norm of the keys."""
        if kind == "value":
            return FrameLayout.full(self.head_dim)
        pairs = torch.tensor(rotary_pairs(self.family, self.rotary_dim), dtype=torch.long).reshape(-1, 2)
        layout = FrameLayout(pairs, torch.arange(self.rotary_dim, self.head_dim))
        if self.family.has_norm(self.module, "head_layer") or self.family.has_norm(self.module, "head_rms"):
            turns = torch.full((len(pairs),), self.family.key_norm == "head_rms")
            return FrameLayout(layout.pairs, layout.rest, turns)
        return layout if self.family.has_turn(self.module) else layout.freed(self.slow)

    @property
    def has_bias(self) -> bool:
        return any(getattr(self.projection(kind), "bias", None) is not None for kind in ("query", "key", "value"))

    def gains(self, kind: str) -> Tensor | None:
        """Gains `[heads, d]` of an RMSNorm behind the projection, or None. Heads are compared and turned with their gains."""
        if kind == "value" or not self.family.has_turn(self.module):
            return None
        norm = getattr(self.module, self.family.norm.replace("k_", f"{kind[0]}_", 1))
        size = self.head_dim if self.family.key_norm == "head_rms" else norm.weight.numel()
        # All ones have a root mean square of 1, so the norm gives back its gains.
        gains = norm.forward(torch.ones(1, 1, 1, size, device=norm.weight.device)).detach().float()
        gains = gains.reshape(-1, self.head_dim).expand(self.num_query_heads if kind == "query" else self.num_heads, -1)
        floor = gains.abs().max() * 1e-6
        return torch.where(gains.abs() < floor, floor, gains)

    def head_gradient(self, kind: str, gradient: Tensor) -> Tensor:
        """Gradient at the heads of `weights`, `[..., heads * d]`, from the gradient at the projection's output."""
        rows, gains = self.rows(kind), self.gains(kind)
        gradient = gradient if rows is None else gradient[..., rows.to(gradient.device)]
        return gradient if gains is None else gradient / gains.flatten().to(gradient.dtype)

    def weights(self, dtype: torch.dtype = torch.float32) -> AttentionWeights:
        """The block's weights `[heads, d, E]`; biases, if any projection has one, are the last column."""
        query, key, value = (self.heads(kind, dtype) for kind in ("query", "key", "value"))
        output = self.part("output")[0].to(dtype)
        output = output.reshape(output.shape[0], self.num_query_heads, self.head_dim).transpose(0, 1)
        return AttentionWeights(query, key, value, output)

    def heads(self, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Heads `[heads, d, E]` of "query", "key" or "value"; see `weights`."""
        weight, bias = self.part(kind)
        weight = weight.to(dtype)
        if self.has_bias:
            bias = weight.new_zeros(len(weight)) if bias is None else bias.to(dtype)
            weight = torch.cat([weight, bias[:, None]], dim=1)
        heads, gains = weight.reshape(-1, self.head_dim, weight.shape[1]), self.gains(kind)
        return heads if gains is None else heads * gains[..., None].to(dtype)

    def flat_weights(self, weights: AttentionWeights, keys: SharedHeads) -> dict[str, Tensor]:
        """Back to `nn.Linear` layout, as `models.build_merged` wants it: q, k, v, o, their biases, and what a key norm needs."""
        flat = {"o": weights.output.transpose(0, 1).flatten(1)}
        query = weights.query
        if self.family.has_turn(self.module):
            query = self.heads("query", query.dtype)  # with the gains; the turn comes after the norm
            query = query if self.gains("query") is None else query / self.gains("query")[..., None]
            flat |= key_norm_weights(self, keys)
        key = weights.key
        if self.family.has_norm(self.module, "head_rms"):
            key = key / self.gains("key")[0, :, None]  # the merged model keeps this norm
        for name, kind, heads in (("q", "query", query), ("k", "key", key), ("v", "value", weights.value)):
            rows = heads.flatten(0, 1)
            flat[name] = rows[:, : self.input_size]
            if getattr(self.projection(kind), "bias", None) is not None:
                flat[f"{name}_bias"] = rows[:, -1]
        if getattr(self.projection("output"), "bias", None) is not None:
            flat["o_bias"] = self.projection("output").bias.detach()
        return flat


def key_norm_weights(site: AttentionSite, keys: SharedHeads) -> dict[str, Tensor]:
    """What the collapse adds where keys are normalised: `turn` `[Hq, P, 2]`, the read-outs as factors on the queries, and
    for one norm over all heads `root` `[Hk, P, 3]` (see `models.norms`)."""
    out = keys.out or HeadMaps.identity(site.num_heads, keys.layout, device=keys.shared.device)
    readers = torch.arange(site.num_query_heads) * site.num_heads // site.num_query_heads
    flat = {"turn": out.transpose().select(readers.to(out.pair.device)).pair}
    if site.family.has_norm(site.module, "all_rms"):
        gains = site.gains("key")
        flat["root"] = _norm_roots(out.pair, gains[:, keys.layout.pairs], keys.groups)
    return flat


def _norm_roots(out: Tensor, gains: Tensor, groups: Groups) -> Tensor:
    """Triangular roots of `sum_i B_i^T gain_i^-2 B_i` per group and pair, over the base's key dimensions."""
    (real, imag), (first, second) = out.unbind(-1), gains.to(out.device).pow(-2).unbind(-1)
    power = torch.stack(
        [first * real**2 + second * imag**2, (second - first) * real * imag, first * imag**2 + second * real**2], -1
    )
    power = torch.stack([power[list(group)].sum(0) for group in groups]) / (2 * gains[..., 0].numel())
    aa, ab, bb = power.unbind(-1)
    root = aa.clamp_min(torch.finfo(aa.dtype).tiny).sqrt()
    return torch.stack([root, ab / root, (bb - (ab / root) ** 2).clamp_min(0).sqrt()], -1)


def _transposed(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, which keeps `[inputs, outputs]`."""
    return hasattr(module, "nf")


def find_attention(model: nn.Module) -> list[AttentionSite]:
    """Every attention block of a supported model, in layer order.

    Raises:
        ValueError: the model has no `config.model_type`, its type is not supported or is already converted, it is quantized, a block lacks
            a key or value projection (as in multi-head latent attention), has one KV head, or heads of another size.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        raise ValueError(
            f"`{type(model).__name__}` has no `config.model_type`, so its attention cannot be found; pass a transformers model."
        )
    family = family_of(config)
    if getattr(model, "is_quantized", False) or getattr(config, "quantization_config", None):
        raise ValueError(
            "the base model is quantized, and heads are fused in full precision; call `dequantize()` first."
        )
    try:
        blocks = family.blocks(model.base_model)
    except AttributeError as error:
        places = ", ".join(f"`{stack.layers}.*.{path}`" for stack in family.parts() for path in stack.attention)
        raise ValueError(
            f"family `{family.model_type}` has its attention at {places} of the trunk, but "
            f"{error}; correct `layers` and `attention` of its row, or pass the whole model without a wrapper."
        ) from error
    names = {module: name for name, module in model.named_modules()}
    turns = context_turns(model)
    sites = [_site(index, names[block.module], block, family, config, turns) for index, block in enumerate(blocks)]
    odd = next((site for site in sites if site.head_dim != sites[0].head_dim), sites[0])
    if odd is not sites[0]:
        raise ValueError(
            f"heads of `{odd.name}` have {odd.head_dim} dimensions and those of `{sites[0].name}` {sites[0].head_dim}, but a "
            "budget counts equal heads; only models with one head size can be converted."
        )
    return sites


def labelled_plan(sites: list[AttentionSite], groups: Iterable[tuple[Groups, Groups]]) -> DHAPlan:
    """The plan of these key and value groups, one pair per attention block."""
    rows = zip(sites, groups, strict=True)
    layers = tuple(LayerPlan(keys, values, site.block, site.role) for site, (keys, values) in rows)
    return DHAPlan(layers, sites[0].head_dim)


def _site(index: int, name: str, block: Block, family: Family, config: Any, turns: list[Tensor]) -> AttentionSite:
    module = block.module
    for projection in (family.q, family.k, family.v, family.o):
        if not isinstance(get_path(module, projection, None), nn.Module):
            raise ValueError(
                f"`{name}` has no `{projection}`, so it has no query, key, value and output heads to fuse "
                "(multi-head latent attention has none); choose a model with multi-head or grouped-query attention."
            )
    if getattr(config, "add_cross_attention", False):
        raise ValueError(
            f"`{name}` belongs to a decoder with cross-attention, whose cache holds two kinds of heads; "
            "only decoders without cross-attention can be converted."
        )
    dim = head_size(module, config)
    heads, rotary = family.query_heads(config)[index], rotary_size(family, module, config)
    slow = slow_pairs(turns, rotary // 2)
    site = AttentionSite(index, name, module, family, heads, 0, dim, rotary, slow, block.name, block.role)
    fused = family.packing != "separate" and site.projection_name("key") == family.k
    site.num_heads = kv_heads(family, module, config) if fused else site.projection("key").weight.shape[0] // dim
    if site.num_heads < 2:
        raise ValueError(
            f"`{name}` has one key head and one value head already (multi-query attention); each layer needs one of each, so no "
            "budget can shrink its keys and values further; choose a base with more KV heads."
        )
    return site
