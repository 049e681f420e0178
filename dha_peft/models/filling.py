"""Collapsed weights into the attention modules of a merged model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..plan import Groups
from .family import Family, get_path
from .packing import HeadLinear

LayerWeights = Mapping[str, Tensor]


def fill_attention(
    target: nn.Module, source: nn.Module, family: Family, weights: LayerWeights, key_groups: Groups, layer: int
) -> None:
    """Fill one merged attention block from the collapsed weights of layer `layer` (see `build_merged`).

    Raises:
        ValueError: weights that do not fit the plan, or a bias that the family does not have.
    """
    bias = {name: getattr(get_path(source, getattr(family, name)), "bias", None) is not None for name in "qkvo"}
    for name, has in bias.items():
        if f"{name}_bias" in weights and not has:
            raise ValueError(f"layer {layer} has a `{name}_bias`, but this family's {name} projection has no bias.")
    like = get_path(source, family.o).weight
    if family.packing == "separate":
        for name in "qkv":
            _fill(get_path(target, getattr(family, name)), weights, (name,), layer, like)
    else:
        _fill(get_path(target, family.k), weights, ("q", "k", "v"), layer, like)
    _fill(get_path(target, family.o), weights, ("o",), layer, like)
    if family.has_turn(source):
        _fill_turn(target, family, weights, like, layer)
    if family.has_norm(source, "head_layer"):
        _tie_norms(getattr(target, family.norm), getattr(source, family.norm), key_groups, target)


@torch.no_grad()
def _fill(module: nn.Module, weights: LayerWeights, names: tuple[str, ...], layer: int, like: Tensor) -> None:
    """Give one projection its collapsed weights (several when fused) and bias, in dtype and device of `like`."""
    if isinstance(module, HeadLinear):
        module.to_empty(device=like.device)
        module.reset_buffers()
        module = module.heads
    weight = torch.cat([weights[name] for name in names])
    shape = tuple(module.weight.shape)
    transposed = not isinstance(module, nn.Linear)  # transformers' Conv1D
    if tuple(weight.shape) != (shape[::-1] if transposed else shape):
        raise ValueError(
            f"`{'`, `'.join(names)}` of layer {layer} has shape {tuple(weight.shape)}, but the plan needs {shape}."
        )
    weight = weight.T.contiguous() if transposed else weight
    module.weight = nn.Parameter(weight.detach().to(like.device, like.dtype, copy=True))
    if module.bias is not None:
        parts = [weights.get(f"{name}_bias", weights[name].new_zeros(len(weights[name]))) for name in names]
        module.bias = nn.Parameter(torch.cat(parts).detach().to(like.device, like.dtype, copy=True))


def _fill_turn(target: nn.Module, family: Family, weights: LayerWeights, like: Tensor, layer: int) -> None:
    modules = [(target.dha_turn, "factor", "turn")]
    if family.key_norm == "all_rms":
        modules.append((getattr(target, family.norm), "root", "root"))
    for module, parameter, name in modules:
        module.to_empty(device=like.device)
        module.to(like.dtype).reset_parameters()
        if name in weights:
            setattr(module, parameter, nn.Parameter(weights[name].detach().to(like.device, like.dtype, copy=True)))
        elif name == "root":
            raise ValueError(f"layer {layer} has no `root`, which a norm over all key heads needs; see `SharedNorm`.")


@torch.no_grad()
def _tie_norms(target: nn.Module, source: nn.Module, key_groups: Groups, attention: nn.Module) -> None:
    """Gains of a group's norms become their mean; norms that all heads share are copied."""
    maps = attention.dha_maps
    heads = maps.keys if attention.dha_gather else range(maps.num_key_heads)
    if hasattr(source, "norms"):
        gains = torch.stack([norm.weight for norm in source.norms])
        for norm, head in zip(target.norms, heads, strict=True):
            norm.weight = nn.Parameter(gains[list(key_groups[head])].mean(0))
        return
    for name, tensor in source.named_parameters():
        if tensor.dim() == 2:
            tensor = torch.stack([tensor[list(key_groups[head])].mean(0) for head in heads])
        setattr(target, name, nn.Parameter(tensor.detach().clone()))
