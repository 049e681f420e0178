"""A fused query-key-value projection taken apart while an adapter is on it, so that keys and values are wrapped alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..attention import AttentionSite
from ..models.family import get_path, set_path

PARTS = {"query": "q_heads", "key": "k_heads", "value": "v_heads"}


class UnpackedLinear(nn.Module):
    """Three `nn.Linear`s in place of a fused projection; the output has the fused layout.

    The fused module is kept without weights, and gets them back from `pack`.
    """

    def __init__(
        self, fused: nn.Module, parts: dict[str, tuple[Tensor, Tensor | None]], rows: dict[str, Tensor]
    ) -> None:
        super().__init__()
        self._fused, self._shape = [fused], fused.weight.shape  # a list, so that it is no submodule
        for kind, (weight, bias) in parts.items():
            part = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
            part.weight = nn.Parameter(weight.contiguous(), fused.weight.requires_grad)
            if bias is not None:
                part.bias = nn.Parameter(bias.contiguous(), fused.bias.requires_grad)
            setattr(self, PARTS[kind], part)
        order = torch.cat([rows[kind] for kind in PARTS])
        self._places = order.argsort()
        fused.weight.data = fused.weight.data.new_empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` -> `[..., rows of the fused projection]`."""
        parts = torch.cat([getattr(self, name)(x) for name in PARTS.values()], dim=-1)
        return parts.index_select(-1, self._places.to(parts.device))

    @torch.no_grad()
    def pack(self) -> nn.Module:
        """The fused module with its weights, from parts without adapters."""
        fused, parts = self._fused[0], [getattr(self, name) for name in PARTS.values()]
        weight = torch.cat([part.weight for part in parts])[self._places.to(parts[0].weight.device)]
        fused.weight.data = (weight if weight.shape == self._shape else weight.T).contiguous()
        if fused.bias is not None:
            fused.bias.data = torch.cat([part.bias for part in parts])[self._places.to(weight.device)]
        return fused


def unpack(sites: list[AttentionSite]) -> None:
    """Take every fused projection apart, in place."""
    for site in sites:
        module = site.outer("key")
        if site.family.packing == "separate" or isinstance(module, UnpackedLinear):
            continue
        parts = {kind: site.part(kind) for kind in PARTS}
        rows = {kind: site.rows(kind) for kind in PARTS}
        set_path(site.module, site.family.k, UnpackedLinear(module, parts, rows))


def pack(sites: list[AttentionSite]) -> None:
    """Undo `unpack`; the parts must be free of adapters."""
    for site in sites:
        module = get_path(site.module, site.family.k)
        if isinstance(module, UnpackedLinear):
            set_path(site.module, site.family.k, module.pack())
