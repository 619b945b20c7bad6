"""Absorbed attention in Triton: parts of the keys, each by a program of its own, and the sum of the parts.

The T queries and N heads of a row of the batch are T N rows of one product, since all of them meet the same keys. A
program takes a block of these rows and a part of the keys that they see; keys are read once, for scores and values.

Logarithms are to base 2 everywhere: of the exponentials' sum of a part (`log_sums`), and of the scores, whose `factor`
is scale * log2(e). Parts are float32, so that a result is rounded once however many there are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...quant.fp8_quantize.kernel import GROUP

NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def _spans(row, rows, batch, keys, lengths, mask, heads, queries, MASK: tl.constexpr, PAGE: tl.constexpr):
    """The first key that each row sees, and one past the last; (keys, 0) for a row that sees nothing."""
    query, inside = row // heads, row < rows
    if MASK == "spans":
        at = mask + (batch.to(tl.int64) * queries + query) * 2
        first, end = tl.maximum(tl.load(at, inside, other=0), 0), tl.load(at + 1, inside, other=0)
    else:
        length = tl.minimum(tl.load(lengths + batch), keys) if PAGE else keys
        first, end = tl.zeros_like(row), tl.zeros_like(row) + length
        if MASK == "causal":
            end += query + 1 - queries
    end = tl.minimum(end, keys)
    some = inside & (first < end)
    return tl.where(some, first, keys), tl.where(some, end, 0)


@triton.jit
def _dequantized(
    codes, scales, at, inside, dtype: tl.constexpr, TOKEN: tl.constexpr, LATENT: tl.constexpr, GROUPS: tl.constexpr
):
    """Codes [KEYS, COLUMNS] times the scales of each key's groups, rounded once to `dtype`."""
    KEYS: tl.constexpr = codes.shape[0]
    COLUMNS: tl.constexpr = codes.shape[1]
    n, g = tl.arange(0, KEYS), tl.arange(0, GROUPS)
    scale_inside = inside[:, None] & (g * GROUP < LATENT)[None, :]
    scale = tl.load(scales + at + (n[:, None] * (TOKEN // 4) + g[None, :]), scale_inside, other=0.0)
    groups = codes.to(tl.float32).reshape(KEYS, GROUPS, COLUMNS // GROUPS)
    return (groups * scale[:, :, None]).reshape(KEYS, COLUMNS).to(dtype)


@triton.jit
def decode_kernel(
    q,
    latents,
    scales,
    rotated,
    out,
    log_sums,
    mask,
    table,
    lengths,
    factor,
    rows,
    heads,
    queries,
    keys,
    splits,
    q_strides,
    batch_stride,
    mask_strides,
    table_stride,
    TOKEN: tl.constexpr,
    LATENT: tl.constexpr,
    ROTATED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EXTRA: tl.constexpr,
    GROUPS: tl.constexpr,
    MASK: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    BULK: tl.constexpr,
    PARTIAL: tl.constexpr,
    HOIST: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention of a block of rows to a part of the keys that it sees.

    `q_strides` are of batch, token and head, `mask_strides` of batch, query and key. `batch_stride` and TOKEN are those
    of a page and of a key: in values, or in bytes where keys are packed, which is where there are GROUPS; UNIT is the
    number of bytes that all of these are multiples of. BULK is for operands whose rows are multiples of 16 bytes:
    results leave by the copy engine, and keys in one stretch come by it.
    """
    q_batch, q_token, q_head = q_strides
    mask_batch, mask_query, mask_key = mask_strides
    blocks = tl.cdiv(rows, ROWS)
    block, split = tl.program_id(0) % blocks, tl.program_id(0) // blocks % splits
    batch = (tl.program_id(0) // (blocks * splits)).to(tl.int64)
    PRECISION: tl.constexpr = "ieee" if q.dtype.element_ty == tl.float32 else "tf32"
    row, c, r, n = block * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, EXTRA), tl.arange(0, KEYS)
    first, end = _spans(row, rows, batch, keys, lengths, mask, heads, queries, MASK, PAGE)
    # The keys that any row sees, divided evenly in tiles: a short sequence of a batch has short splits.
    begin, until = tl.min(first, 0), tl.max(end, 0)
    tiles = tl.cdiv(tl.maximum(until - begin, 0), KEYS)
    share = tl.cdiv(tiles, splits)

    q_at = q + batch * q_batch + (row // heads).to(tl.int64) * q_token + (row % heads).to(tl.int64) * q_head
    q_latent = tl.load(q_at[:, None] + c[None, :], (row < rows)[:, None] & (c < LATENT)[None, :], other=0.0)
    r_inside = (row < rows)[:, None] & (r < ROTATED)[None, :]
    q_rotated = tl.load(q_at[:, None] + (LATENT + r)[None, :], r_inside, other=0.0)
    SOURCE: tl.constexpr = BULK and not PAGE and GROUPS == 0
    if SOURCE:  # memory beyond the last key comes as zeros, whatever it holds
        origin, height = batch * batch_stride + begin.to(tl.int64) * TOKEN, tl.maximum(until - begin, 1)
        latent_rows = tl.make_tensor_descriptor(latents + origin, [height, LATENT], [TOKEN, 1], [KEYS, COLUMNS])
        rotated_rows = tl.make_tensor_descriptor(rotated + origin, [height, ROTATED], [TOKEN, 1], [KEYS, EXTRA])
    top = tl.full((ROWS,), NOTHING, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    # With 64 rows, the addresses of all parts of all operands would take more registers than there are: no HOIST then.
    for tile in tl.range(
        split * share, tl.minimum((split + 1) * share, tiles), num_stages=STAGES, disable_licm=not HOIST
    ):
        position = begin + tile * KEYS + n
        if SOURCE:
            k_latent = latent_rows.load([tile * KEYS, 0])
            k_rotated = rotated_rows.load([tile * KEYS, 0])
        else:
            exists = position < until
            if PAGE:  # `begin` is 0
                page = tl.load(table + batch * table_stride + tile * KEYS // PAGE)
                base = page.to(tl.int64) * batch_stride + tile * KEYS % PAGE * TOKEN
            else:
                base = batch * batch_stride + (begin + tile * KEYS).to(tl.int64) * TOKEN
            in_latent, in_rotated = exists[:, None] & (c < LATENT)[None, :], exists[:, None] & (r < ROTATED)[None, :]
            k_latent = tl.load(latents + base + (n[:, None] * TOKEN + c[None, :]), in_latent, other=0.0)
            if GROUPS:
                scale_at, rotated_at = base // UNIT * (UNIT // 4), base // UNIT * (UNIT // 2)
                k_latent = _dequantized(k_latent, scales, scale_at, exists, q_latent.dtype, TOKEN, LATENT, GROUPS)
                k_rotated = tl.load(
                    rotated + rotated_at + (n[:, None] * (TOKEN // 2) + r[None, :]), in_rotated, other=0.0
                ).to(q_latent.dtype)
            else:
                k_rotated = tl.load(rotated + base + (n[:, None] * TOKEN + r[None, :]), in_rotated, other=0.0)
        scores = tl.dot(q_latent, k_latent.T, input_precision=PRECISION)
        scores = tl.dot(q_rotated, k_rotated.T, scores, input_precision=PRECISION) * factor
        seen = (position[None, :] >= first[:, None]) & (position[None, :] < end[:, None])
        if MASK == "dense":
            mask_at = mask + batch * mask_batch + (row // heads).to(tl.int64)[:, None] * mask_query
            seen = seen & (tl.load(mask_at + position.to(tl.int64)[None, :] * mask_key, seen, other=0) != 0)
        scores = tl.where(seen, scores, NOTHING)
        higher = tl.maximum(top, tl.max(scores, 1))
        level = tl.where(higher == NOTHING, 0.0, higher)  # of a row that has seen nothing so far: not -inf - -inf
        weights, shrink = tl.exp2(scores - level[:, None]), tl.exp2(top - level)
        total, top = total * shrink + tl.sum(weights, 1), higher
        result = tl.dot(weights.to(q_latent.dtype), k_latent, result * shrink[:, None], input_precision=PRECISION)
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    result *= (1.0 / total)[:, None]
    place = (batch * splits + split) * rows
    if BULK:
        out_rows = tl.make_tensor_descriptor(out + place * LATENT, [rows, LATENT], [LATENT, 1], [ROWS, COLUMNS])
        out_rows.store([block * ROWS, 0], result.to(out.dtype.element_ty))
    else:
        out_at = out + (place + row)[:, None] * LATENT + c[None, :]
        tl.store(out_at, result.to(out.dtype.element_ty), (row < rows)[:, None] & (c < LATENT)[None, :])
    if PARTIAL:
        tl.store(log_sums + place + row, tl.where(empty, NOTHING, top + tl.log2(total)), row < rows)


@triton.jit
def sum_kernel(
    parts,
    log_sums,
    out,
    rows,
    splits,
    LATENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Adds the parts of some rows, weighted by their sums of exponentials; an empty part is not read."""
    blocks = tl.cdiv(rows, ROWS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    row, c = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place, inside = batch * splits * rows + row, row < rows
    s = tl.arange(0, SPLITS)
    sums = tl.load(
        log_sums + place[None, :] + s[:, None] * rows, (s < splits)[:, None] & inside[None, :], other=NOTHING
    )
    top = tl.max(sums, 0)
    top = tl.where(top == NOTHING, 0.0, top)
    total = tl.sum(tl.exp2(sums - top[None, :]), 0)
    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(0, splits, STEP):
        some = start + tl.arange(0, STEP)
        at = place[None, :] + some.to(tl.int64)[:, None] * rows
        part_sums = tl.load(log_sums + at, (some < splits)[:, None] & inside[None, :], other=NOTHING)
        full = (part_sums != NOTHING)[:, :, None] & (c < LATENT)[None, None, :]
        values = tl.load(parts + at[:, :, None] * LATENT + c[None, None, :], full, other=0.0)
        result += tl.sum(values * tl.exp2(part_sums - top[None, :])[:, :, None], 0)
    result /= tl.where(total == 0, 1.0, total)[:, None]
    out_at = out + (batch * rows + row)[:, None] * LATENT + c[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), inside[:, None] & (c < LATENT)[None, :])
