"""Decode attention in Triton for any key map and any value map: every key and value head is read exactly once.

One program serves a share of one sequence and all query heads. It walks over blocks of keys; in each block the key
heads and then the value heads pass by as one uninterrupted stream of tiles, so the loads never drain between keys and
values. The matrix unit is idle anyway, so a tile meets *all* query heads, and each query head keeps the result of the
one head that its map names. A second kernel combines the shares.

Scores are kept transposed (`[keys, rows]`, a row is one query head and token), so that the tile is the wide operand
of the product and goes from shared memory straight to the matrix unit.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1.0e30)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _share(
    batch, start_ptr, length_ptr, num_keys, num_splits, HAS_START: tl.constexpr, HAS_LENGTH: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """First and last key + 1 of the sequence, and how many keys (`unit`) a program takes at a time. Nothing is read on
    the host.

    Units are dealt out like cards, so that the programs of a sequence read neighbouring memory at the same time. They
    are as large as a tile can be with the same number of them for every program: a whole tile each would leave the
    others waiting while a few walk through all heads once more for the last keys.
    """
    begin, end = 0, num_keys
    if HAS_START:
        begin = tl.maximum(tl.load(start_ptr + batch).to(tl.int32), 0)
    if HAS_LENGTH:
        end = tl.minimum(tl.load(length_ptr + batch).to(tl.int32), num_keys)
    keys = tl.maximum(end - begin, 1)
    return begin, end, tl.maximum(tl.cdiv(keys, num_splits * tl.cdiv(keys, num_splits * KEYS)), 16)


@triton.jit
def _hide(
    scores, key, token, first, stop, end, holes, mask_ptr, mask_st, mask_ss, lowest, TOKENS: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Scores `[keys, rows]` in base 2 with -inf where a row must not look, nor outside of the keys first to stop - 1.
    MASK: 0 causal, 1 bool, 2 additive."""
    ours = (key >= first) & (key < stop)
    seen = ours[:, None]
    if MASK == 0:
        if TOKENS > 1:
            seen = seen & (key[:, None] <= (end - TOKENS + token)[None, :])
        return tl.where(seen, scores, -float("inf"))
    # Most masks only bound the sequence, which start and length have said already; then nothing is loaded.
    if TOKENS == 1:
        at, read = mask_ptr + key.to(tl.int64) * mask_ss, ours & holes
        value = tl.load(at, mask=read, other=1 - (MASK - 1)).to(tl.float32)[:, None]
    else:
        at, read = mask_ptr + key[:, None].to(tl.int64) * mask_ss + token[None, :] * mask_st, seen & holes
        value = tl.load(at, mask=read, other=1 - (MASK - 1)).to(tl.float32)
    if MASK == 1:
        return tl.where(seen & (value != 0), scores, -float("inf"))
    return tl.where(seen & (value > lowest), scores + value * LOG2E, -float("inf"))


@triton.jit
def _attend(
    q, key_of, value_of, token, k_ptr, tiles_ptr, to_keys, to_values, k_sh, k_ss, v_sh, v_ss, key_heads, value_heads,
    block, unit, stride, end, scale, holes, mask_ptr, mask_st, mask_ss, lowest,
    TOKENS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr, ALIGN: tl.constexpr, MASK: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """What these rows find in the keys from `block` on, `unit` of every `stride`: values `[d, rows]` weighted by exp2(score
    - top), those weights' sums and tops, both `[rows]`. `to_keys` and `to_values` lead to the sequence, from `k_ptr` or, with
    BULK, from the start of the array."""
    dim, col = tl.arange(0, BLOCK_D), tl.arange(0, KEYS)
    in_dim = dim < DIM
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([BLOCK_D, ROWS], tl.float32)
    scores = tl.zeros([KEYS, ROWS], tl.float32)
    probs = scores.to(q.dtype)
    tiles = key_heads + value_heads
    tile = tl.full([], 0, tl.int32)
    for _ in tl.range(0, tl.cdiv(tl.maximum(end - block, 0), stride) * tiles, num_stages=STAGES):
        is_key = tile < key_heads
        step = tl.multiple_of(tl.where(is_key, k_ss, v_ss), ALIGN)
        head_at = tl.where(
            is_key, to_keys + tile.to(tl.int64) * k_sh, to_values + (tile - key_heads).to(tl.int64) * v_sh
        )
        stop = tl.minimum(end, block + unit)
        if BULK:
            # The engine copies whole tiles: the last one begins early enough to end with the sequence.
            start = tl.minimum(block, end - KEYS)
            x = tiles_ptr.load([(head_at // DIM).to(tl.int32) + start, 0])
        else:
            start = block
            base = tl.multiple_of(head_at + block.to(tl.int64) * step, ALIGN)
            x = tl.load(
                k_ptr + base + (col[:, None] * step + dim[None, :]),
                mask=(block + col < stop)[:, None] & in_dim[None, :],
                other=0.0,
            )
        # Two branches, one for keys and one for values, would be miscompiled: ptxas 12.8 (Triton 3.6) lets one of them use
        # an address that only the other computes (seen with 4 warps and with 64 x 64 tiles). So every tile meets the
        # probabilities, and keys meet the queries inside of that. The outer branch is always taken; it makes Triton send
        # for the next tile before it multiplies this one, not after.
        if tile < tiles:
            out += tl.where((value_of == tile - key_heads)[None, :], tl.dot(tl.trans(x), probs), 0.0)
            if tile < key_heads:
                scores = tl.where((key_of == tile)[None, :], tl.dot(x, q), scores)
        if tile == key_heads - 1:
            hidden = _hide(
                scores * scale, start + col, token, block, stop, end, holes, mask_ptr, mask_st, mask_ss, lowest, TOKENS,
                MASK,
            )  # fmt: skip
            new_top = tl.maximum(top, tl.max(hidden, 0))
            weights = tl.exp2(hidden - new_top[None, :])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(weights, 0)
            out = out * shrink[None, :]
            top = new_top
            probs = weights.to(q.dtype)
        tile += 1
        block = tl.where(tile == tiles, block + stride, block)
        tile = tl.where(tile == tiles, 0, tile)
    return out, total, top


@triton.jit(
    do_not_specialize=["key_heads", "value_heads", "num_keys", "num_rows", "num_splits", "mask_sb", "mask_st"]
)  # a cache that grows must not compile anew
def attend_kernel(
    q_ptr, k_ptr, v_ptr, tiles_ptr, key_map_ptr, value_map_ptr, mask_ptr, start_ptr, length_ptr, plain_ptr, out_ptr, part_ptr, lse_ptr,
    q_sb, q_sh, q_st, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, mask_sb, mask_st, mask_ss, out_sb, out_sh, out_st,
    key_heads, value_heads, num_keys, num_rows, num_splits, scale, lowest,
    TOKENS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr, ALIGN: tl.constexpr, MASK: tl.constexpr, HAS_START: tl.constexpr, HAS_LENGTH: tl.constexpr,
    SPLIT: tl.constexpr, BULK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (splits, blocks of rows, batch). With SPLIT, writes each share's output (float32, `part [B, splits,
    rows, d]`) and its base-2 log-sum-exp (`lse [B, splits, rows]`), else the final output. `plain [B]` counts the keys
    that the mask shows to every query unchanged. With BULK, `tiles_ptr` describes both caches as rows of one array."""
    split, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_wait()
    # The bounds first: they travel while the maps and the queries do.
    begin, end, unit = _share(batch, start_ptr, length_ptr, num_keys, num_splits, HAS_START, HAS_LENGTH, KEYS)
    holes = False
    if MASK != 0:
        holes = tl.load(plain_ptr + batch) != end - begin
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real, head, token = row < num_rows, row // TOKENS, row % TOKENS
    dim = tl.arange(0, BLOCK_D)
    key_of = tl.load(key_map_ptr + head, mask=real, other=1 << 20).to(tl.int32)
    value_of = tl.load(value_map_ptr + head, mask=real, other=1 << 20).to(tl.int32)
    in_dim = dim < DIM
    at = batch * q_sb + head * q_sh + token * q_st
    q = tl.load(q_ptr + at[None, :] + dim[:, None], mask=real[None, :] & in_dim[:, None], other=0.0)

    # Keys and values are addressed from one base pointer, so that one load in the loop serves both.
    apart = (v_ptr.to(tl.int64) - k_ptr.to(tl.int64)) // (k_ptr.dtype.element_ty.primitive_bitwidth // 8)
    to_keys, to_values = batch * k_sb, apart + batch * v_sb
    block, stride, mask_ptr = begin + split * unit, unit * num_splits, mask_ptr + batch * mask_sb
    # A whole tile would reach beyond a sequence that is shorter, and what lies there may be no number.
    if BULK and end - begin >= KEYS:
        low = tl.minimum(apart, 0)  # the array begins with the cache at the lower address
        out, total, top = _attend(
            q, key_of, value_of, token, k_ptr, tiles_ptr, to_keys - low, to_values - low, k_sh, k_ss, v_sh, v_ss, key_heads, value_heads,
            block, unit, stride, end, scale, holes, mask_ptr, mask_st, mask_ss, lowest,
            TOKENS, DIM, BLOCK_D, ROWS, KEYS, STAGES, ALIGN, MASK, True,
        )  # fmt: skip
    else:
        out, total, top = _attend(
            q, key_of, value_of, token, k_ptr, tiles_ptr, to_keys, to_values, k_sh, k_ss, v_sh, v_ss, key_heads, value_heads,
            block, unit, stride, end, scale, holes, mask_ptr, mask_st, mask_ss, lowest,
            TOKENS, DIM, BLOCK_D, ROWS, KEYS, 1 if BULK else STAGES, ALIGN, MASK, False,
        )  # fmt: skip

    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    out = out / tl.maximum(total, 1.0e-30)[None, :]
    stored = real[None, :] & in_dim[:, None]
    if SPLIT:
        at = (batch * num_splits + split) * num_rows + row
        tl.store(part_ptr + at[None, :] * DIM + dim[:, None], out, mask=stored)
        lse = tl.where(total > 0, top + tl.log2(tl.maximum(total, 1.0e-30)), -float("inf"))
        tl.store(lse_ptr + at, lse, mask=real)
    else:
        at = batch * out_sb + head * out_sh + token * out_st
        tl.store(out_ptr + at[None, :] + dim[:, None], out, mask=stored)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def combine_kernel(
    part_ptr, lse_ptr, out_ptr, out_sb, out_sh, out_st, num_rows, num_splits,
    TOKENS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, batch, parts of d): the shares' outputs, weighted by their share of the softmax."""
    row, batch = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1).to(tl.int64)
    dim, split = tl.program_id(2) * DIMS + tl.arange(0, DIMS), tl.arange(0, SPLITS)
    if PDL:
        tl.extra.cuda.gdc_wait()
    real, in_dim = row < num_rows, dim < DIM
    at, there = (batch * num_splits + split[None, :]) * num_rows + row[:, None], real[:, None] & (split < num_splits)
    part = tl.load(
        part_ptr + at[:, :, None] * DIM + dim[None, None, :], mask=there[:, :, None] & in_dim[None, None, :], other=0.0
    )
    lse = tl.load(lse_ptr + at, mask=there, other=-float("inf"))
    weight = tl.exp2(lse - tl.maximum(tl.max(lse, 1), LOWEST)[:, None])
    weight = weight / tl.maximum(tl.sum(weight, 1), 1.0e-30)[:, None]
    out = tl.sum(part * weight[:, :, None], 1)
    place = batch * out_sb + row // TOKENS * out_sh + row % TOKENS * out_st
    tl.store(out_ptr + place[:, None] + dim[None, :], out, mask=real[:, None] & in_dim[None, :])
