"""Heads as tensors: how a layer's attention weights are laid out, and the maps that turn a head into another frame.

Shapes used in this room: `H` heads, `d` head size, `E` input size (hidden size, plus one when biases ride along as
an input that is always 1), `P` rotary pairs, `R` remaining dimensions of a head (`2 P + R = d`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class FrameLayout:
    """Which dimensions of a head a change of frame may mix.

    `pairs` `[P, 2]`: dimensions that the position encoding rotates together; only a complex factor per pair commutes
    with it. `rest` `[R]`: dimensions that take any `R x R` map, as they have no positions or turn too slowly to matter. Values and keys
    of models without rotary positions have `P = 0`.

    `slow`: how many pairs are among the `rest`, the `s`-th of them as its dimensions `s` and `slow + s`. A map that mixes them commutes with
    positions only nearly, so read-outs of keys have to be applied where the collapse will have them, at the queries.

    `phases` `[P]` is for keys that are normalised head by head after their projection: a read-out must then commute with
    the norm, so it turns the pairs where `phases` is true without changing their length, and leaves all else alone.
    """

    pairs: Tensor
    rest: Tensor
    phases: Tensor | None = None
    slow: int = 0
    _moved: dict[torch.device, FrameLayout] = field(default_factory=dict, compare=False, repr=False)
    """Copies on other devices, as every copy makes the host wait."""

    @classmethod
    def full(cls, head_dim: int) -> FrameLayout:
        """Every dimension may mix with every other: values, and keys without rotary positions."""
        return cls(torch.empty(0, 2, dtype=torch.long), torch.arange(head_dim))

    @classmethod
    def rotary(cls, head_dim: int, rotary_dim: int | None = None, interleaved: bool = False) -> FrameLayout:
        """The first `rotary_dim` dimensions rotate in pairs `(f, f + rotary_dim / 2)`, or `(2 f, 2 f + 1)` when
        `interleaved`; the others are free."""
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        first = torch.arange(rotary_dim // 2)
        pairs = torch.stack([2 * first, 2 * first + 1] if interleaved else [first, first + rotary_dim // 2], dim=1)
        return cls(pairs, torch.arange(rotary_dim, head_dim))

    def freed(self, slow: Tensor) -> FrameLayout:
        """The same with the pairs where `slow` `[P]` is true among the free dimensions."""
        rest = torch.cat([self.pairs[slow].T.flatten(), self.rest])
        return FrameLayout(self.pairs[~slow], rest, slow=int(slow.sum()))

    @property
    def head_dim(self) -> int:
        return 2 * len(self.pairs) + len(self.rest)

    def to(self, device: torch.device | str) -> FrameLayout:
        device = torch.device(device)
        if device == self.rest.device:
            return self
        if device not in self._moved:
            with torch.inference_mode(False):  # tensors made within it could not be used for training later
                phases = None if self.phases is None else self.phases.to(device)
                self._moved[device] = FrameLayout(self.pairs.to(device), self.rest.to(device), phases, self.slow)
        return self._moved[device]

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """Without the copies, so that what was pickled beside a GPU loads without one."""
        return FrameLayout, (self.pairs, self.rest, self.phases, self.slow)


@dataclass
class AttentionWeights:
    """One attention block, independent of its family.

    `query` `[Hq, d, E]`, `key` and `value` `[H, d, E]`, `output` `[Hq, D, d]`; `Hq` is a multiple of `H`, and query
    head `q` reads KV head `q * H // Hq`. Biases, where there are any, are the last input column (`E = D + 1`).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor

    @property
    def num_heads(self) -> int:
        return self.key.shape[0]

    @property
    def head_dim(self) -> int:
        return self.key.shape[1]

    @property
    def queries_per_head(self) -> int:
        return self.query.shape[0] // self.num_heads

    def to(self, *args, **kwargs) -> AttentionWeights:
        return AttentionWeights(*(t.to(*args, **kwargs) for t in (self.query, self.key, self.value, self.output)))


@dataclass
class HeadMaps:
    """One linear map per head, of the kind that its layout allows: `pair` `[H, P, 2]` holds complex factors as
    (real, imaginary), `full` `[H, R, R]` holds matrices that act from the left."""

    pair: Tensor
    full: Tensor

    @classmethod
    def identity(cls, num_heads: int, layout: FrameLayout, **kwargs) -> HeadMaps:
        pair = torch.zeros(num_heads, len(layout.pairs), 2, **kwargs)
        pair[..., 0] = 1
        return cls(pair, torch.eye(len(layout.rest), **kwargs).repeat(num_heads, 1, 1))

    def apply(self, heads: Tensor, layout: FrameLayout) -> Tensor:
        """Map each head's rows: `heads` `[H, d, E]` to `[H, d, E]`."""
        mapped = torch.empty_like(heads)
        if len(layout.pairs):
            first, second = layout.pairs.unbind(1)
            real, imag = self.pair[..., 0, None], self.pair[..., 1, None]
            a, b = heads[:, first], heads[:, second]
            mapped[:, first] = real * a - imag * b
            mapped[:, second] = real * b + imag * a
        if len(layout.rest):
            mapped[:, layout.rest] = self.full @ heads[:, layout.rest]
        return mapped

    def restricted(self, layout: FrameLayout) -> HeadMaps:
        """The nearest read-outs that the layout allows: these maps themselves, unless it has `phases`."""
        if layout.phases is None:
            return self
        identity = HeadMaps.identity(len(self.pair), layout, dtype=self.pair.dtype, device=self.pair.device)
        length = self.pair.norm(dim=-1, keepdim=True)
        turned = torch.where(length > 0, self.pair / length.clamp_min(torch.finfo(length.dtype).tiny), identity.pair)
        return HeadMaps(torch.where(layout.phases[None, :, None], turned, identity.pair), identity.full)

    def transpose(self) -> HeadMaps:
        """The adjoint maps: what a query must do when its key is read through these maps."""
        return HeadMaps(self.pair * self.pair.new_tensor([1.0, -1.0]), self.full.transpose(1, 2))

    def select(self, heads: list[int] | Tensor) -> HeadMaps:
        return HeadMaps(self.pair[heads], self.full[heads])

    def to(self, *args, **kwargs) -> HeadMaps:
        return HeadMaps(self.pair.to(*args, **kwargs), self.full.to(*args, **kwargs))
