"""What a mask and the bounds of a sequence let a query see, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def visible_keys(
    queries: int,
    keys: int,
    mask: Tensor | None,
    start: Tensor | None,
    length: Tensor | None,
    device: torch.device | str,
) -> Tensor:
    """Which keys each query sees: bool, broadcasts to `[B, Hq, Tq, S]`. Arguments as in `naive_decode`."""
    index = torch.arange(keys, device=device)
    end = torch.full((1,), keys, device=device) if length is None else length
    last = end.view(-1, 1, 1, 1)
    if mask is None:
        last = last - torch.arange(queries - 1, -1, -1, device=device).view(1, 1, -1, 1)
    seen = index < last
    if start is not None:
        seen = seen & (index >= start.view(-1, 1, 1, 1))
    return seen if mask is None else seen & attended(mask)


def attended(mask: Tensor) -> Tensor:
    """A mask as bool. Additive masks hide a key by their dtype's lowest number, or anything near it."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def mask_bounds(mask: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """The stretch of keys that a mask leaves visible, so that no other key need be read.

    Args:
        mask: `[B or 1, 1, Tq or 1, S]`, bool or additive.

    Returns:
        `[B]` int32 each: first key that any query sees, one past the last, and the number of keys that every query
        sees with nothing added. If that number is the length of the stretch, the mask says nothing more. Where no
        key is seen the stretch is empty (`S`, 0).

    Reductions of one small tensor: the layers of a model share their mask, and a compiler makes one kernel of them.
    """
    keys = mask.shape[-1]
    index = torch.arange(keys, device=mask.device, dtype=torch.int32)
    seen, plain = attended(mask).any(2)[:, 0], (mask if mask.dtype == torch.bool else mask == 0).all(2)[:, 0]
    first = torch.where(seen, index, keys).amin(-1)
    last = torch.where(seen, index + 1, 0).amax(-1)
    return tuple(x.to(torch.int32).expand(batch) for x in (first, last, plain.sum(-1)))
