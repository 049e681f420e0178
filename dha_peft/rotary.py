"""How far rotary positions turn a head's pairs: slow ones hardly move, and may be mixed as if they had no positions (ours).

A map `B` of a shared key moves into the queries at the collapse, `q^T R B k = (B^T q)^T R k`, exactly if it commutes with every turn `R` of
the context. Complex factors do; any other matrix does as far as the turns of what it mixes are small, or alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MOST_TURN = 2 * math.pi / 3
"""Radians over the longest context up to which a pair is slow. Most attention is near, where such a pair turns by a small part of this."""


def context_turns(model: nn.Module) -> list[Tensor]:
    """Radians by which each rotary embedding of a model turns its pairs over `config.max_position_embeddings`, `[pairs]` each.

    They are read from `inv_freq` buffers, so that scaled frequencies count as they are; a model that keeps none there has none.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    buffers = [b for name, b in model.named_buffers() if name.endswith("inv_freq") and not b.is_meta]
    return [buffer.detach().float().cpu() * context for buffer in buffers] if context else []


def slow_pairs(turns: list[Tensor], count: int) -> Tensor:
    """Which of the `count` rotary pairs of a head turn by at most a third of a turn, `[count]` bool. `turns` is from `context_turns`; of
    several that fit (layers with a base of their own) each pair takes the fastest."""
    fitting = [own for own in turns if own.shape == (count,)]
    return torch.stack(fitting).amax(0) <= MOST_TURN if fitting else torch.zeros(count, dtype=torch.bool)
