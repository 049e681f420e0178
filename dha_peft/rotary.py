"""How far rotary positions turn a head's pairs: slow ones hardly move, and may be mixed as if they had no positions (ours).

A map `B` of a shared key moves into the queries at the collapse, `q^T R B k = (B^T q)^T R k`, exactly if it commutes with every turn `R` of
the context. Complex factors do; any other matrix does as far as the turns of what it mixes are small, or alike.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

MOST_TURN = 2 * math.pi / 3
"""Radians over the longest context up to which a pair is slow. Most attention is near, where such a pair turns by a small part of this."""


def slow_pairs(model: nn.Module, config: Any, count: int) -> Tensor:
    """Which of the `count` rotary pairs of a head turn by at most a third of a turn over `config.max_position_embeddings`, `[count]` bool.

    Frequencies are read from the model's own rotary embeddings, so that scaled ones count as they are; of several (layers with a base of
    their own) each pair takes the fastest. A model that keeps none in `inv_freq` buffers has no slow pair.
    """
    context = getattr(config, "max_position_embeddings", None)
    found = [
        buffer.detach().float().cpu()
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and buffer.shape == (count,) and not buffer.is_meta
    ]
    if not context or not found:
        return torch.zeros(count, dtype=torch.bool)
    return torch.stack(found).amax(0) * context <= MOST_TURN
