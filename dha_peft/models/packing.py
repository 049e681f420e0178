"""How heads lie in projections: the order inside a fused one, and a projection that stores only distinct heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .family import Packing

_CODEGEN_BLOCKS = 4


def head_order(packing: Packing, queries: int, heads: int) -> list[tuple[str, int]]:
    """What a fused projection holds, one entry ("q", "k" or "v", and the number of the head) per head."""
    if packing == "blocks":
        return [("q", i) for i in range(queries)] + [(kind, i) for kind in "kv" for i in range(heads)]
    if packing == "heads":
        share = queries // heads
        groups = [[*(("q", i * share + n) for n in range(share)), ("k", i), ("v", i)] for i in range(heads)]
        return [entry for group in groups for entry in group]
    if packing == "codegen":
        size = heads // _CODEGEN_BLOCKS
        return [(kind, block * size + i) for block in range(_CODEGEN_BLOCKS) for kind in "qvk" for i in range(size)]
    raise ValueError(f"`packing` is {packing!r}, which is no fused layout; choose one of blocks, heads, codegen.")


def packed_rows(packing: Packing, queries: int, heads: int, dim: int) -> dict[str, Tensor]:
    """Row numbers of all queries, keys and values in a fused projection, each `[heads * dim]`, head by head."""
    order = head_order(packing, queries, heads)
    rows = {}
    for kind in "qkv":
        places = [order.index((kind, i)) for i in range(queries if kind == "q" else heads)]
        rows[kind] = (torch.tensor(places)[:, None] * dim + torch.arange(dim)).flatten()
    return rows


class HeadLinear(nn.Module):
    """A projection that stores every distinct head once and gives out the layout that the family's forward wants.

    Args:
        size: inputs.
        heads: `[n]`, the stored head that is given out at each place.
        dim: size of one head.

    Attributes:
        heads: the `nn.Linear` with the distinct heads, `[max(heads) + 1) * dim, size]`.
        rows: `[n * dim]`, buffer that is not saved; `reset_buffers` restores it after loading on the meta device.
    """

    def __init__(self, size: int, heads: list[int], dim: int, bias: bool, **kwargs) -> None:
        super().__init__()
        self.places, self.dim = list(heads), dim
        self.heads = nn.Linear(size, (max(heads) + 1) * dim, bias=bias, **kwargs)
        self.register_buffer("rows", self._rows(), persistent=False)

    def _rows(self) -> Tensor:
        return (torch.tensor(self.places)[:, None] * self.dim + torch.arange(self.dim)).flatten()

    @torch.no_grad()
    def reset_buffers(self) -> None:
        self.rows.copy_(self._rows())

    def forward(self, x: Tensor) -> Tensor:
        """`[..., size]` -> `[..., n * dim]`."""
        return self.heads(x).index_select(-1, self.rows)
