"""From a base model, a plan and collapsed attention weights to the merged model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..plan import DHAPlan
from .configuration_dha import CONFIGS
from .families import family_of
from .family import Family, get_path, head_size, kv_heads
from .filling import LayerWeights, fill_attention
from .maps import HeadMaps, neighbour_order
from .modeling_dha import MODELS


def build_merged(
    base_model: PreTrainedModel, plan: DHAPlan, layer_weights: Iterable[LayerWeights], *, share: bool = True
) -> PreTrainedModel:
    """The merged model: the base with the attention of every layer replaced by its collapsed heads.

    Args:
        base_model: a causal model, a bare trunk or a task head of a supported family, without adapters.
        plan: groups of every layer, over the base's KV heads.
        layer_weights: per layer (an iterator's layers exist one at a time), in `nn.Linear` layout, `"q" [H*d, D]`, `"k" [Hk*d, D]`, `"v" [Hv*d, D]`,
            `"o" [D, H*d]`, and biases `"q_bias"`, `"k_bias"`, `"v_bias"`, `"o_bias"` where the family has them. A bias
            that the family has and the dict lacks becomes zero. They are cast to the base's dtype and device. Families
            with key norms also take `"turn" [H, P, 2]` (factors on the rotary pairs of the normalised queries; absent:
            none) and, with one norm over all heads, `"root" [Hk, P, 3]` (see `SharedNorm`).
        share: reuse the base's other tensors (no extra memory, but training one changes the other) or copy them.

    Returns:
        The `Dha...` class of the same task, in the base's mode (train or eval), all floating parameters trainable.
        Where it makes equal (key, value) pairs neighbours, the query heads of a layer are permuted (rows of q,
        columns of o): the function stays the same, and stock attention then works on the pairs.

    Raises:
        ValueError: unsupported, quantized or already merged base; plan or weights that do not fit it.
    """
    family = family_of(base_model.config)
    sources = family.attentions(base_model.base_model)
    given = len(layer_weights) if isinstance(layer_weights, Sized) else len(sources)
    _check_base(base_model, plan, given, [kv_heads(family, source, base_model.config) for source in sources])
    queries = family.query_heads(base_model.config)
    orders = [_query_order(layer, count, family) for layer, count in zip(plan.layers, queries, strict=True)]
    with torch.device("meta"):
        merged = _merged_class(base_model, family)(_merged_config(base_model.config, family, plan, orders))
    targets = family.attentions(merged.base_model)
    _take_tensors(merged, base_model, share, _skipped(targets, family))
    for index, (target, source, collapsed) in enumerate(zip(targets, sources, layer_weights, strict=True)):
        weights = _permuted(collapsed, orders[index], head_size(target, merged.config))
        fill_attention(target, source, family, weights, plan.layers[index].key_groups, index)
    return _finish(merged, base_model)


def _check_base(base: PreTrainedModel, plan: DHAPlan, given: int, heads: list[int]) -> None:
    config = base.config
    if getattr(base, "is_quantized", False) or getattr(config, "quantization_config", None):
        raise ValueError(
            "the base model is quantized, and heads are fused in full precision; call `dequantize()` first."
        )
    layers = len(heads)
    if len(plan.layers) != layers or given != layers:
        raise ValueError(
            f"the base has {layers} layers, the plan {len(plan.layers)} and `layer_weights` {given}; "
            "all three must agree."
        )
    for index, layer in enumerate(plan.layers):
        if layer.num_heads != heads[index]:
            raise ValueError(
                f"layer {index} of the plan groups {layer.num_heads} heads, but the base has "
                f"{heads[index]} KV heads; make the plan over the base's KV heads."
            )


def _query_order(layer: Any, num_query_heads: int, family: Family) -> list[int]:
    if not family.reorder:
        return list(range(num_query_heads))
    return neighbour_order(layer.key_map(num_query_heads), layer.value_map(num_query_heads))


def _merged_config(base_config: Any, family: Family, plan: DHAPlan, orders: list[list[int]]) -> Any:
    fields = copy.deepcopy(base_config.to_dict())
    for name in ("model_type", "architectures", "transformers_version", "auto_map"):
        fields.pop(name, None)
    pairs = list(zip(plan.layers, orders, strict=True))
    maps = {
        "key_head_map": [_reordered(layer.key_map(len(order)), order) for layer, order in pairs],
        "value_head_map": [_reordered(layer.value_map(len(order)), order) for layer, order in pairs],
    }
    name = base_config._name_or_path
    base = (
        Path(name).resolve().name if Path(name).exists() else name
    )  # a path of this machine is no one else's business
    config = CONFIGS[family.merged_type](**fields, **maps, dha_plan=plan.to_dict(), dha_base=base or None)
    config._attn_implementation = base_config._attn_implementation
    config._name_or_path = name
    return config


def _merged_class(base: PreTrainedModel, family: Family) -> type:
    by_base = {family.base_class(end): MODELS[family.merged_type][auto] for auto, end in family.tasks().items()}
    for cls in type(base).__mro__:
        if cls in by_base:
            return by_base[cls]
    names = ", ".join(cls.__name__ for cls in by_base)
    raise ValueError(f"`{type(base).__name__}` has no merged counterpart; pass one of {names}, without any wrapper.")


def _skipped(targets: list[nn.Module], family: Family) -> set[int]:
    """Modules whose tensors come from the collapse."""
    names = {family.q, family.k, family.v, family.o, "dha_turn"}
    modules = [get_path(target, name, None) for target in targets for name in names]
    if family.key_norm in ("all_rms", "head_layer"):
        modules += [getattr(target, family.norm) for target in targets if hasattr(target, family.norm)]
    return {id(part) for module in modules if module is not None for part in module.modules()}


def _take_tensors(merged: PreTrainedModel, base: PreTrainedModel, share: bool, skipped: set[int]) -> None:
    """Fill the merged model's meta tensors from the base's of the same name; tied parameters stay tied."""
    taken: dict[int, Tensor] = {}
    for name, module in merged.named_modules():
        if isinstance(module, HeadMaps):
            module.to_empty(device=next(base.parameters()).device)
            module.reset_buffers()
            continue
        if id(module) in skipped:
            continue
        try:
            source = base.get_submodule(name)
        except AttributeError:
            continue
        for key, tensor in (*source.named_parameters(recurse=False), *source.named_buffers(recurse=False)):
            if id(tensor) not in taken:
                data = tensor.detach() if share else tensor.detach().clone()
                taken[id(tensor)] = (
                    nn.Parameter(data, data.is_floating_point()) if isinstance(tensor, nn.Parameter) else data
                )
            setattr(module, key, taken[id(tensor)])


def _permuted(weights: LayerWeights, order: list[int], head_dim: int) -> dict[str, Tensor]:
    if order == list(range(len(order))):
        return dict(weights)
    rows = torch.cat([torch.arange(head * head_dim, (head + 1) * head_dim) for head in order])
    moved = {name: weights[name][rows.to(weights[name].device)] for name in ("q", "q_bias") if name in weights}
    moved["o"] = weights["o"][:, rows.to(weights["o"].device)]
    if "turn" in weights:
        moved["turn"] = weights["turn"][order]
    return {**weights, **moved}


def _finish(merged: PreTrainedModel, base: PreTrainedModel) -> PreTrainedModel:
    if getattr(base, "generation_config", None) is not None and merged.can_generate():
        merged.generation_config = copy.deepcopy(base.generation_config)
    left = [name for name, tensor in (*merged.named_parameters(), *merged.named_buffers()) if tensor.is_meta]
    if left:
        raise ValueError(f"the base model has no tensors for {left}; load it fully before the collapse.")
    merged.config.dtype = base.config.dtype
    return merged.train(base.training)


def _reordered(row: list[int], order: list[int]) -> list[int]:
    return [row[index] for index in order]
