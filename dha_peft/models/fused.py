"""Projections of the same input as one product: fewer and larger matrix products in a decode step, same weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .family import Family

MLP_NAMES = ("gate_proj", "up_proj")


def fuse_projections(trunk: nn.Module, family: Family) -> int:
    """Fuse query, key and value projections, and gate and up projections, of a trunk in place.

    Projections stay as they are where something prevents it: other modules than plain `nn.Linear` (adapters, quantized
    weights), hooks (offloading), different dtypes or devices, a fused layout already.

    Returns:
        How many products were saved in a forward pass.
    """
    saved, names = 0, (family.q, family.k, family.v)
    if family.packing == "separate" and not family.gather and "." not in "".join(names):
        # A cross-attention reads its keys and values from the encoder, and only once per text.
        saved += sum(_fuse(block.module, names) for block in family.blocks(trunk) if block.role != "cross")
    for module in list(trunk.modules()):
        if all(hasattr(module, name) for name in MLP_NAMES):
            saved += _fuse(module, MLP_NAMES)
    return saved


def unfuse_projections(trunk: nn.Module) -> None:
    """Undo `fuse_projections`: every projection is an `nn.Linear` of its own again."""
    for parent in list(trunk.modules()):
        for lead in [child for child in parent.children() if isinstance(child, FusedLinear)]:
            for name, weight, bias in zip(lead.names, *lead.parts(), strict=True):
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
                linear.weight = nn.Parameter(weight.detach().clone(), lead.weight.requires_grad)
                if bias is not None:
                    linear.bias = nn.Parameter(bias.detach().clone(), lead.weight.requires_grad)
                setattr(parent, name, linear.train(lead.training))


class FusedLinear(nn.Module):
    """Stands where the first of several linears was. It multiplies for all of them, gives out its own part, and keeps
    the rest until the others, `FusedPart`, are called with the same input.

    In state dicts the weights have the names and shapes of the separate linears.

    Args:
        linears: name inside the parent -> linear, in the order in which the parent calls them.
    """

    def __init__(self, linears: dict[str, nn.Linear]) -> None:
        super().__init__()
        first, *_ = all_of = list(linears.values())
        self.names, self.sizes = list(linears), [linear.out_features for linear in all_of]
        self.in_features, self.out_features = first.in_features, first.out_features
        trainable = first.weight.requires_grad
        self.weight = nn.Parameter(torch.cat([linear.weight.detach() for linear in all_of]), trainable)
        self.bias = None
        if first.bias is not None:
            self.bias = nn.Parameter(torch.cat([linear.bias.detach() for linear in all_of]), trainable)
        self.kept: dict[int, Tensor] = {}
        self.register_state_dict_post_hook(_split_names)

    def parts(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """Weights and biases of the separate linears, as views."""
        biases = [None] * len(self.sizes) if self.bias is None else self.bias.split(self.sizes)
        return list(self.weight.split(self.sizes)), list(biases)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` -> `[..., out_features]` of the first linear."""
        first, *others = F.linear(x, self.weight, self.bias).split(self.sizes, -1)
        self.kept.clear()
        self.kept[0] = x
        for index, part in enumerate(others, 1):
            self.kept[index] = part
        return first

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, " + ", ".join(map("{}={}".format, self.names, self.sizes))


class FusedPart(nn.Module):
    """Stands where one of the other linears was, and gives out what the first has computed for it."""

    def __init__(self, lead: FusedLinear, index: int) -> None:
        super().__init__()
        self.lead, self.index = (lead,), index  # in a tuple, so that it is no child
        self.in_features, self.out_features = lead.in_features, lead.sizes[index]

    @property
    def weight(self) -> Tensor:
        return self.lead[0].parts()[0][self.index]

    @property
    def bias(self) -> Tensor | None:
        return self.lead[0].parts()[1][self.index]

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` -> `[..., out_features]`."""
        kept = self.lead[0].kept
        if self.index not in kept or kept[0] is not x:
            return F.linear(x, self.weight, self.bias)
        part = kept.pop(self.index)
        if len(kept) == 1:
            kept.clear()  # holds no activation once all have been given out
        return part


def _fuse(parent: nn.Module, names: tuple[str, ...]) -> int:
    linears = {name: getattr(parent, name) for name in names}
    if not _alike(list(linears.values())):
        return 0
    lead = FusedLinear(linears).train(parent.training)
    setattr(parent, names[0], lead)
    # At the parent, because a module is shown only those entries of a state dict that bear its own name.
    parent.register_load_state_dict_pre_hook(_join_names)
    for index, name in enumerate(names[1:], 1):
        setattr(parent, name, FusedPart(lead, index).train(parent.training))
    return len(names) - 1


def _alike(linears: list[nn.Module]) -> bool:
    if any(type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks for linear in linears):
        return False
    if any(hasattr(linear, "_hf_hook") or type(linear.weight) is not nn.Parameter for linear in linears):
        return False
    kinds = {(x.weight.dtype, x.weight.device, x.in_features, x.bias is None) for x in linears}
    return len(kinds) == 1 and not any(linear.weight.is_meta for linear in linears)


def _split_names(module: FusedLinear, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    parent = prefix.removesuffix(f"{module.names[0]}.")
    for kind in ("weight", "bias"):
        whole = state.pop(f"{prefix}{kind}", None)
        if whole is not None:
            for name, part in zip(module.names, whole.split(module.sizes), strict=True):
                state[f"{parent}{name}.{kind}"] = part


def _join_names(parent: nn.Module, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
    for lead in [child for child in parent.children() if isinstance(child, FusedLinear)]:
        for kind in ("weight", "bias"):
            keys = [f"{prefix}{name}.{kind}" for name in lead.names]
            if all(key in state for key in keys):
                state[keys[0]] = torch.cat([state.pop(key) for key in keys])
