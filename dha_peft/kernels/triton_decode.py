"""Decode attention in Triton for any key map and any value map: every key and value head is read exactly once.

One program serves one stretch of one sequence and all query heads. It walks over blocks of keys; in each block the
key heads and then the value heads pass by as one uninterrupted stream of tiles, so the loads never drain between
keys and values. The matrix unit is idle anyway, so a tile meets *all* query heads, and each query head keeps the
result of the one head that its map names. A second kernel combines the stretches.

Scores are kept transposed (`[keys, rows]`, a row is one query head and token), so that the tile is the wide operand
of the product and goes from shared memory straight to the matrix unit.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1.0e30)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _stretch(
    batch, split, start_ptr, length_ptr, num_keys, num_splits, HAS_START: tl.constexpr, HAS_LENGTH: tl.constexpr,
    KEYS: tl.constexpr, DEAL: tl.constexpr,
):  # fmt: skip
    """First key and end of this program's share, and of the whole sequence. Nothing is read on the host.

    The share is one stretch of keys or, with DEAL, every `num_splits`-th block of KEYS keys: blocks are dealt out like
    cards, so that the programs of one sequence read neighbouring memory at the same time.
    """
    begin, end = 0, num_keys
    if HAS_START:
        begin = tl.maximum(tl.load(start_ptr + batch).to(tl.int32), 0)
    if HAS_LENGTH:
        end = tl.minimum(tl.load(length_ptr + batch).to(tl.int32), num_keys)
    if DEAL:
        first, stop = begin + split * KEYS, end
    else:
        share = (tl.cdiv(tl.maximum(end - begin, 0), num_splits) + 15) // 16 * 16
        first = begin + split * share
        stop = tl.minimum(end, first + share)
    return first, stop, begin, end


@triton.jit
def _hide(
    scores, key, token, stop, end, holes, mask_ptr, mask_st, mask_ss, lowest, TOKENS: tl.constexpr, MASK: tl.constexpr
):  # fmt: skip
    """Scores `[keys, rows]` in base 2 with -inf where a row must not look. MASK: 0 causal, 1 bool, 2 additive."""
    seen = (key < stop)[:, None]
    if MASK == 0:
        if TOKENS > 1:
            seen = seen & (key[:, None] <= (end - TOKENS + token)[None, :])
        return tl.where(seen, scores, -float("inf"))
    # Most masks only bound the sequence, which start and length have said already; then nothing is loaded.
    if TOKENS == 1:
        at, read = mask_ptr + key.to(tl.int64) * mask_ss, (key < stop) & holes
        value = tl.load(at, mask=read, other=1 - (MASK - 1)).to(tl.float32)[:, None]
    else:
        at, read = mask_ptr + key[:, None].to(tl.int64) * mask_ss + token[None, :] * mask_st, seen & holes
        value = tl.load(at, mask=read, other=1 - (MASK - 1)).to(tl.float32)
    if MASK == 1:
        return tl.where(seen & (value != 0), scores, -float("inf"))
    return tl.where(seen & (value > lowest), scores + value * LOG2E, -float("inf"))


@triton.jit
def _prefetch(
    batch, first, stop, num_keys, k_ptr, v_ptr, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, key_heads,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Ask for the first tiles of a stretch without waiting for them: the L2 cache fetches rows on its own."""
    key = first + tl.arange(0, KEYS)[:, None]
    line = tl.arange(0, BLOCK_D // 64)[None, :] * 64  # 128 bytes of bf16 or fp16
    # Before the previous kernel is done the bounds may be anything; a wrong guess costs a useless fetch of row 0.
    key = tl.where((key >= 0) & (key < tl.minimum(stop, num_keys)), key, 0).to(tl.int64)
    for tile in tl.static_range(TILES):
        if tile < key_heads:
            row = k_ptr + batch * k_sb + tile * k_sh + key * k_ss
        else:
            row = v_ptr + batch * v_sb + (tile - key_heads) * v_sh + key * v_ss
        at = (row + tl.where(line < DIM, line, 0)).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit(
    do_not_specialize=["key_heads", "value_heads", "num_keys", "num_rows", "num_splits", "mask_sb", "mask_st"]
)  # a cache that grows must not compile anew
def attend_kernel(
    q_ptr, k_ptr, v_ptr, key_map_ptr, value_map_ptr, mask_ptr, start_ptr, length_ptr, plain_ptr, out_ptr, part_ptr, lse_ptr,
    q_sb, q_sh, q_st, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, mask_sb, mask_st, mask_ss, out_sb, out_sh, out_st,
    key_heads, value_heads, num_keys, num_rows, num_splits, scale, lowest,
    TOKENS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr, ALIGN: tl.constexpr, MASK: tl.constexpr, HAS_START: tl.constexpr, HAS_LENGTH: tl.constexpr,
    SPLIT: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr, DEAL: tl.constexpr,
):  # fmt: skip
    """Grid (splits, blocks of rows, batch). With SPLIT, writes each stretch's output (float32, `part [B, splits,
    rows, d]`) and its base-2 log-sum-exp (`lse [B, splits, rows]`), else the final output. `plain [B]` counts the keys
    that the mask shows to every query unchanged."""
    split, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    if PDL == 2:
        tl.extra.cuda.gdc_launch_dependents()
    if PREFETCH:
        first, stop, begin, end = _stretch(
            batch, split, start_ptr, length_ptr, num_keys, num_splits, HAS_START, HAS_LENGTH, KEYS, DEAL
        )  # fmt: skip
        _prefetch(
            batch, first, stop, num_keys, k_ptr, v_ptr, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, key_heads,
            DIM, BLOCK_D, KEYS, PREFETCH,
        )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real, head, token = row < num_rows, row // TOKENS, row % TOKENS
    dim, col = tl.arange(0, BLOCK_D), tl.arange(0, KEYS)
    in_dim = dim < DIM
    key_of = tl.load(key_map_ptr + head, mask=real, other=1 << 20).to(tl.int32)
    value_of = tl.load(value_map_ptr + head, mask=real, other=1 << 20).to(tl.int32)
    at = batch * q_sb + head * q_sh + token * q_st
    q = tl.load(q_ptr + at[None, :] + dim[:, None], mask=real[None, :] & in_dim[:, None], other=0.0)
    first, stop, begin, end = _stretch(
        batch, split, start_ptr, length_ptr, num_keys, num_splits, HAS_START, HAS_LENGTH, KEYS, DEAL
    )  # fmt: skip
    holes = False
    if MASK != 0:
        holes = tl.load(plain_ptr + batch) != end - begin

    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([BLOCK_D, ROWS], tl.float32)
    scores = tl.zeros([KEYS, ROWS], tl.float32)
    probs = scores.to(q.dtype)
    # Keys and values are addressed from one base pointer, so that one load in the loop serves both.
    to_values = (v_ptr.to(tl.int64) - k_ptr.to(tl.int64)) // (k_ptr.dtype.element_ty.primitive_bitwidth // 8)
    to_values, to_keys = to_values + batch * v_sb, batch * k_sb
    tiles = key_heads + value_heads
    tile, block = tl.full([], 0, tl.int32), first
    stride = KEYS
    if DEAL:
        stride = KEYS * num_splits
    for _ in tl.range(0, tl.cdiv(tl.maximum(stop - first, 0), stride) * tiles, num_stages=STAGES):
        is_key = tile < key_heads
        step = tl.multiple_of(tl.where(is_key, k_ss, v_ss), ALIGN)
        head_at = tl.where(
            is_key, to_keys + tile.to(tl.int64) * k_sh, to_values + (tile - key_heads).to(tl.int64) * v_sh
        )
        base = tl.multiple_of(head_at + block.to(tl.int64) * step, ALIGN)
        key = block + col
        x = tl.load(
            k_ptr + base + (col[:, None] * step + dim[None, :]),
            mask=(key < stop)[:, None] & in_dim[None, :],
            other=0.0,
        )
        if is_key:
            scores = tl.where((key_of == tile)[None, :], tl.dot(x, q), scores)
            if tile == key_heads - 1:
                mask_at = mask_ptr + batch * mask_sb
                hidden = _hide(
                    scores * scale, key, token, stop, end, holes, mask_at, mask_st, mask_ss, lowest, TOKENS, MASK
                )
                new_top = tl.maximum(top, tl.max(hidden, 0))
                weights = tl.exp2(hidden - new_top[None, :])
                shrink = tl.exp2(top - new_top)
                total = total * shrink + tl.sum(weights, 0)
                out = out * shrink[None, :]
                top = new_top
                probs = weights.to(q.dtype)
        else:
            out += tl.where((value_of == tile - key_heads)[None, :], tl.dot(tl.trans(x), probs), 0.0)
        tile += 1
        block = tl.where(tile == tiles, block + stride, block)
        tile = tl.where(tile == tiles, 0, tile)

    if PDL == 1:
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
    TOKENS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, DIMS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (rows, batch, parts of d): the stretches' outputs, weighted by their share of the softmax."""
    row, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    dim, split = tl.program_id(2) * DIMS + tl.arange(0, DIMS), tl.arange(0, SPLITS)
    if PDL:
        tl.extra.cuda.gdc_wait()
    real = split < num_splits
    at = (batch * num_splits + split) * num_rows + row
    lse = tl.load(lse_ptr + at, mask=real, other=-float("inf"))
    part = tl.load(part_ptr + at[:, None] * DIM + dim[None, :], mask=real[:, None] & (dim < DIM)[None, :], other=0.0)
    weight = tl.exp2(lse - tl.maximum(tl.max(lse, 0), LOWEST))
    out = tl.sum(part * weight[:, None], 0) / tl.maximum(tl.sum(weight, 0), 1.0e-30)
    place = out_ptr + batch * out_sb + row // TOKENS * out_sh + row % TOKENS * out_st
    tl.store(place + dim, out, mask=dim < DIM)
