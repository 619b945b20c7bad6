"""Attention on selected keys in Triton: a block of a query's heads and a part of its keys for each program.

The heads of one query meet the same keys, so they are the rows of its products; neighbouring queries have other keys.
Each program gathers its keys by their indices, once for scores and values. Parts are added by the kernel that adds
those of `mla_decode`. Logarithms are to base 2: of the exponentials' sum of a part (`log_sums`), and of the scores,
whose `factor` is scale * log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...quant.fp8_quantize.kernel import GROUP
from ..mla_decode.kernel import NOTHING

__all__ = ["sparse_kernel"]


@triton.jit
def _dequantized(codes, scales, inside, dtype: tl.constexpr, LATENT: tl.constexpr, GROUPS: tl.constexpr):
    """Codes [KEYS, COLUMNS] times the scales of each key's groups, at `scales` [KEYS], rounded once to `dtype`."""
    KEYS: tl.constexpr = codes.shape[0]
    COLUMNS: tl.constexpr = codes.shape[1]
    g = tl.arange(0, GROUPS)
    scale = tl.load(scales[:, None] + g[None, :], inside[:, None] & (g * GROUP < LATENT)[None, :], other=0.0)
    groups = codes.to(tl.float32).reshape(KEYS, GROUPS, COLUMNS // GROUPS)
    return (groups * scale[:, :, None]).reshape(KEYS, COLUMNS).to(dtype)


@triton.jit
def sparse_kernel(
    q,
    latents,
    scales,
    rotated,
    ids,
    out,
    log_sums,
    factor,
    heads,
    queries,
    count,
    splits,
    q_strides,
    batch_stride,
    id_strides,
    TOKEN: tl.constexpr,
    LATENT: tl.constexpr,
    ROTATED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EXTRA: tl.constexpr,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    UNIT: tl.constexpr,
    PARTIAL: tl.constexpr,
    HOIST: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention of a block of heads of one query to a part of its `count` selected keys, the last of which may be -1.

    `q_strides` are of batch, token and head, `id_strides` of batch and query. `batch_stride` and TOKEN are those of the
    keys: in values, or in bytes where keys are packed, which is where there are GROUPS; UNIT is the number of bytes
    that both are multiples of. SLOTS is a power of two that holds `count`.
    """
    q_batch, q_token, q_head = q_strides
    id_batch, id_query = id_strides
    blocks = tl.cdiv(heads, ROWS)
    block, split = tl.program_id(0) % blocks, tl.program_id(0) // blocks % splits
    number = tl.program_id(0) // (blocks * splits)
    batch, query = (number // queries).to(tl.int64), (number % queries).to(tl.int64)
    PRECISION: tl.constexpr = "ieee" if q.dtype.element_ty == tl.float32 else "tf32"
    head, c, r, n = block * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, EXTRA), tl.arange(0, KEYS)
    ids += batch * id_batch + query * id_query
    slot = tl.arange(0, SLOTS)
    chosen = tl.sum((tl.load(ids + slot, slot < count, other=-1) >= 0).to(tl.int32), 0)
    tiles = tl.cdiv(chosen, KEYS)
    share = tl.cdiv(tiles, splits)

    q_at = q + batch * q_batch + query * q_token + head * q_head
    q_latent = tl.load(q_at[:, None] + c[None, :], (head < heads)[:, None] & (c < LATENT)[None, :], other=0.0)
    r_inside = (head < heads)[:, None] & (r < ROTATED)[None, :]
    q_rotated = tl.load(q_at[:, None] + (LATENT + r)[None, :], r_inside, other=0.0)
    top = tl.full((ROWS,), NOTHING, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in tl.range(
        split * share, tl.minimum((split + 1) * share, tiles), num_stages=STAGES, disable_licm=not HOIST
    ):
        exists = tile * KEYS + n < chosen
        index = tl.load(ids + tile * KEYS + n, exists, other=0).to(tl.int64)
        in_latent, in_rotated = exists[:, None] & (c < LATENT)[None, :], exists[:, None] & (r < ROTATED)[None, :]
        base = batch * batch_stride
        k_latent = tl.load(latents + base + index[:, None] * TOKEN + c[None, :], in_latent, other=0.0)
        if GROUPS:
            scale_at = scales + base // UNIT * (UNIT // 4) + index * (TOKEN // 4)
            k_latent = _dequantized(k_latent, scale_at, exists, q_latent.dtype, LATENT, GROUPS)
            rotated_at = rotated + base // UNIT * (UNIT // 2) + index[:, None] * (TOKEN // 2) + r[None, :]
            k_rotated = tl.load(rotated_at, in_rotated, other=0.0).to(q_latent.dtype)
        else:
            k_rotated = tl.load(rotated + base + index[:, None] * TOKEN + r[None, :], in_rotated, other=0.0)
        scores = tl.dot(q_latent, k_latent.T, input_precision=PRECISION)
        scores = tl.dot(q_rotated, k_rotated.T, scores, input_precision=PRECISION) * factor
        scores = tl.where(exists[None, :], scores, NOTHING)
        higher = tl.maximum(top, tl.max(scores, 1))
        level = tl.where(higher == NOTHING, 0.0, higher)
        weights, shrink = tl.exp2(scores - level[:, None]), tl.exp2(top - level)
        total, top = total * shrink + tl.sum(weights, 1), higher
        result = tl.dot(weights.to(q_latent.dtype), k_latent, result * shrink[:, None], input_precision=PRECISION)
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    result *= (1.0 / total)[:, None]
    place = ((batch * splits + split) * queries + query) * heads + head
    out_at = out + place[:, None] * LATENT + c[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), (head < heads)[:, None] & (c < LATENT)[None, :])
    if PARTIAL:
        tl.store(log_sums + place, tl.where(empty, NOTHING, top + tl.log2(total)), head < heads)
