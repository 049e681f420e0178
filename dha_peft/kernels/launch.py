"""How the Triton kernels are launched: tile shapes, number of splits, buffers. Imports Triton; only CUDA code gets here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.testing import get_dram_gbps
from triton.tools.tensor_descriptor import TensorDescriptor

from .bounds import launch_bounds, on_device_of
from .triton_decode import attend_kernel, combine_kernel

MAX_SPLITS = 512
_LOG2E = 1.4426950408889634
# Bytes that one program keeps on the way: about twice what a multiprocessor's bandwidth x latency comes to. With more,
# requests only wait in a longer queue, some programs fall behind, and the others have nothing to do at the end.
_IN_FLIGHT = 64 * 1024
# GB/s that memory has for each multiprocessor above which a program's own loads are slower than it: one takes 0.9 us for
# a tile of 32 KB and its products, and where a tile comes in less than 1.2 us that is no longer hidden well.
_FAST = 27.0
# Keys a multiprocessor below which a cache is short.
_SHORT = 128
# Rows that the copy engine can count here.
_MOST_ROWS = 2**31 - 1
# Numbers that one program of the second kernel takes: few programs start sooner than many.
_COMBINED = 4096


@dataclass(frozen=True)
class Tiling:
    """Shape of one program: `rows` (query heads x tokens), `keys` per tile, and what it needs of a multiprocessor.

    With `bulk` the tiles come through the chip's copy engine, which costs a program fewer instructions than loads of its
    own, but copies whole tiles only, and only from caches that `_are_rows`.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    per_processor: int
    bulk: bool = False


@lru_cache(maxsize=512)
def choose_tiling(rows: int, block_d: int, shared_memory: int, short: bool = False, bulk: bool = False) -> Tiling:
    """Tiles that keep the accumulators in registers and fill shared memory with loads in flight.

    Args:
        rows: query heads x tokens. block_d: columns of a tile.
        shared_memory: bytes that one program may use.
        short: there is so little to read that the time of a program's steps counts, not the memory's.
        bulk: the copy engine may be used.

    `benchmarks/decode_tune.py` compares them. For 32 query heads of 128 on an H100 these are within 1 % of the fastest at
    every size; `bulk` is not among those there.
    """
    rows = min(128 if block_d <= 128 else 64, max(16, triton.next_power_of_2(rows)))
    if short and rows <= 32:
        return Tiling(rows, 64, 4, _stages(rows, 64, block_d, shared_memory // 2, _IN_FLIGHT // 2), 2)
    fits = [keys for keys in (128, 64, 32) if keys * block_d <= 128 * 128 and (rows <= 32 or keys < 128)]
    deep = [keys for keys in fits if _stages(rows, keys, block_d, shared_memory) >= 3]
    keys = deep[0] if deep else fits[-1]
    bulk = bulk and rows <= 32
    return Tiling(rows, keys, 4 if bulk else 8, _stages(rows, keys, block_d, shared_memory), 1, bulk)


def _stages(rows: int, keys: int, block_d: int, shared_memory: int, in_flight: int = _IN_FLIGHT) -> int:
    """Tiles in shared memory, beside the queries and the probabilities."""
    tile = keys * block_d * 2
    room = shared_memory - rows * (block_d + keys) * 2 - 4096
    return max(2, min(8, 1 + in_flight // tile, room // tile))


@lru_cache(maxsize=4096)
def choose_splits(tasks: int, slots: int, num_keys: int, heads_read: int, rows: int, tile: int) -> int:
    """Number of programs per sequence that finish first.

    Args:
        tasks: programs without splitting. slots: programs that run at once. num_keys: capacity of the cache.
        heads_read: key heads + value heads. rows: query rows of a program. tile: keys of a tile.

    The cost is counted in half-precision head vectors: what all slots together have to read, partial outputs included
    (float32, written and read once), a share of what the busiest slot reads, because memory is saturated before every
    slot is at work, and what a wave of programs takes to start and to end. Fitted to an H100.
    """

    def cost(splits: int) -> float:
        waves, rounds = -(-tasks * splits // slots), -(-num_keys // (splits * tile))
        # A tile takes some time, however few keys there are in it.
        keys = rounds * max(-(-num_keys // (splits * rounds)), 64)
        program = keys * heads_read + (0 if splits == 1 else rows * 4)
        return program * (tasks * splits / slots + 0.3 * waves) + 470 * waves

    most = max(1, min(MAX_SPLITS, -(-num_keys // 32)))
    return min(range(1, most + 1), key=cost)


@dataclass(frozen=True)
class Device:
    """What the choices here need to know of a GPU.

    `shared_memory` is what one program may use, in bytes. `early_start`: kernels may start before their inputs are done.
    `bulk`: there is an engine that copies tiles, and memory is so fast that it is needed.
    """

    processors: int
    shared_memory: int
    early_start: bool
    bulk: bool


@lru_cache(maxsize=16)
def device_of(index: int) -> Device:
    props = torch.cuda.get_device_properties(index)
    hopper = torch.version.cuda is not None and props.major >= 9
    return Device(
        processors=props.multi_processor_count,
        shared_memory=getattr(props, "shared_memory_per_block_optin", 96 * 1024),
        early_start=hopper and hasattr(triton.language.extra.cuda, "gdc_wait"),
        bulk=hopper and get_dram_gbps(index) > _FAST * props.multi_processor_count,
    )


def launch_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_map: Tensor,
    value_map: Tensor,
    scale: float,
    mask: Tensor | None = None,
    start: Tensor | None = None,
    length: Tensor | None = None,
    plain: Tensor | None = None,
    tiling: Tiling | None = None,
    splits: int | None = None,
) -> Tensor:
    """Arguments as in `naive_decode`, all on one CUDA device; `mask` is `[B or 1, 1, Tq or 1, S]`. With a mask, start,
    length and plain are its `mask_bounds`, or all None.

    `tiling` and `splits` override the choice made here (measurements).
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, tokens, dim = q.shape
    if mask is not None and plain is None:
        start, length, plain = launch_bounds(mask, batch)
    start, length, plain = (x if x is None else x.contiguous() for x in (start, length, plain))
    # Tiles of at least 64 columns: a narrower one is read by two kinds of matrix instruction, and Triton 3.6 then loads the
    # next tile over it before the slower kind has read it (one buffer too few).
    rows, num_keys, block_d = heads * tokens, k.shape[2], max(64, triton.next_power_of_2(dim))
    device = device_of(q.device.index or 0)
    if tiling is None:
        short = batch * num_keys <= _SHORT * device.processors
        tiling = choose_tiling(rows, block_d, device.shared_memory, short, device.bulk)
    bulk = tiling.bulk and _are_rows(k, v)
    tiles = _one_array(k, v, tiling.keys) if bulk else k
    row_blocks = -(-rows // tiling.rows)
    slots = device.processors * tiling.per_processor
    heads_read = k.shape[1] + v.shape[1]
    capacity = -(-num_keys // 64) * 64  # so that a growing cache asks anew only now and then
    splits = splits or choose_splits(batch * row_blocks, slots, capacity, heads_read, tiling.rows, tiling.keys)
    out = q.new_empty(batch, tokens, heads, dim).transpose(1, 2)
    part, lse = _partials(q, splits, rows)
    with on_device_of(q):
        attend_kernel[(splits, row_blocks, batch)](
            q, k, v, tiles, key_map, value_map, *_mask_pointer(mask, q), q if start is None else start,
            q if length is None else length, q if plain is None else plain, out, part, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *_mask_strides(mask), *out.stride()[:3], k.shape[1], v.shape[1], num_keys, rows, splits, scale * _LOG2E,
            0.0 if _mask_kind(mask) < 2 else torch.finfo(mask.dtype).min / 2,
            TOKENS=tokens, DIM=dim, BLOCK_D=block_d, ROWS=tiling.rows, KEYS=tiling.keys, STAGES=tiling.stages,
            ALIGN=_alignment(k, v), MASK=_mask_kind(mask), HAS_START=start is not None, HAS_LENGTH=length is not None,
            SPLIT=splits > 1, BULK=bulk, PDL=device.early_start, num_warps=tiling.warps,
            **({"launch_pdl": True} if device.early_start else {}),
        )  # fmt: skip
        if splits > 1:
            _combine(part, lse, out, device.early_start)
    return out


def _are_rows(k: Tensor, v: Tensor) -> bool:
    """Whether both caches are made of rows of one array, each with a power of 2 of numbers and right behind another."""
    dim, apart = k.shape[-1], abs(k.data_ptr() - v.data_ptr()) // k.element_size()
    if dim not in (64, 128, 256) or apart % dim or (k.data_ptr() | v.data_ptr()) % 16:
        return False
    span = apart + max(sum(s * (n - 1) for s, n in zip(x.stride(), x.shape, strict=True)) for x in (k, v))
    return span // dim < _MOST_ROWS and all(
        x.stride(2) == dim and x.stride(0) % dim == x.stride(1) % dim == 0 for x in (k, v)
    )


def _one_array(k: Tensor, v: Tensor, keys: int) -> TensorDescriptor:
    """The rows of both caches, from the lower address on, to be read in tiles of so many `keys`."""
    dim = k.shape[-1]
    return TensorDescriptor(k if k.data_ptr() <= v.data_ptr() else v, [_MOST_ROWS, dim], [dim, 1], [keys, dim])


def _combine(part: Tensor, lse: Tensor, out: Tensor, pdl: bool) -> None:
    batch, splits, rows, dim = part.shape
    padded, wide = triton.next_power_of_2(splits), triton.next_power_of_2(dim)
    dims = max(16, min(wide, _COMBINED // padded))
    group = max(1, min(triton.next_power_of_2(rows), _COMBINED // (padded * dims)))
    combine_kernel[(-(-rows // group), batch, -(-dim // dims))](
        part, lse, out, *out.stride()[:3], rows, splits, TOKENS=out.shape[2], DIM=dim, SPLITS=padded, ROWS=group,
        DIMS=dims, PDL=pdl, num_warps=max(4, min(8, group)), **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def _partials(q: Tensor, splits: int, rows: int) -> tuple[Tensor, Tensor]:
    if splits == 1:
        return q, q
    shape = (q.shape[0], splits, rows)
    return q.new_empty(*shape, q.shape[-1], dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


def _alignment(k: Tensor, v: Tensor) -> int:
    """8 if every row of 8 numbers can be loaded at once, else 1."""
    strides = (*k.stride()[:3], *v.stride()[:3])
    return 8 if all(s % 8 == 0 for s in strides) and (k.data_ptr() | v.data_ptr()) % 16 == 0 else 1


def _mask_kind(mask: Tensor | None) -> int:
    return 0 if mask is None else 1 if mask.dtype == torch.bool else 2


def _mask_pointer(mask: Tensor | None, other: Tensor) -> tuple[Tensor]:
    return (other if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask,)


def _mask_strides(mask: Tensor | None) -> tuple[int, int, int]:
    if mask is None:
        return 0, 0, 0
    batch, _, token, key = mask.stride()
    return (batch if mask.shape[0] > 1 else 0), (token if mask.shape[2] > 1 else 0), key
