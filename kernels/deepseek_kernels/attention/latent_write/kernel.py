"""Norm, rotation and storing in Triton: a program takes whole tokens and writes each to its slot."""

from __future__ import annotations

import triton
import triton.language as tl

from ...norm.rms_norm.kernel import inverse_root
from ...quant.fp8_quantize.kernel import ACTIVATION_FLOOR, GROUP, encode, scale_of


@triton.jit
def write_kernel(
    kv,
    weight,
    cos,
    sin,
    slots,
    latents,
    scales,
    keys,
    count,
    tokens,
    latent,
    pairs,
    limit,
    page,
    kv_strides,
    cos_strides,
    sin_strides,
    slots_strides,
    out_strides,
    eps,
    per_column,
    PAGED: tl.constexpr,
    FP8: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Norms, rotates and stores ROWS of `count` = B * T tokens.

    `latents`, `scales` and `keys` begin where those of the first slot do. Strides are of rows of the batch and tokens,
    `out_strides` of rows of the batch or pages and tokens, in elements of `latents`.
    """
    kv_batch_stride, kv_stride = kv_strides
    cos_batch_stride, cos_stride = cos_strides
    sin_batch_stride, sin_stride = sin_strides
    slots_batch_stride, slots_stride = slots_strides
    out_stride, out_slot_stride = out_strides
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sequence, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    slot = tl.load(slots + sequence * slots_batch_stride + token * slots_stride, row < count, other=-1)
    stored = (slot >= 0) & (slot < limit)
    if PAGED:
        place = (slot // page) * out_stride + (slot % page) * out_slot_stride
    else:
        place = sequence * out_stride + slot * out_slot_stride
    source = kv + (sequence * kv_batch_stride + token * kv_stride)[:, None]
    VALUES: tl.constexpr = kv.dtype.element_ty

    column = tl.arange(0, COLUMNS)
    inside = stored[:, None] & (column < latent)[None, :]
    values = tl.load(source + column[None, :], inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, column < latent, other=0.0).to(tl.float32)
    inverse = inverse_root(values, per_column, eps, ROWS, COLUMNS)
    normed = (values * inverse[:, None]).to(VALUES).to(tl.float32)
    normed = (normed * factor[None, :]).to(VALUES)
    if FP8:
        GROUPS: tl.constexpr = COLUMNS // GROUP
        grouped = tl.reshape(normed.to(tl.float32), (ROWS, GROUPS, GROUP))
        scale = scale_of(tl.max(tl.abs(grouped), 2), ACTIVATION_FLOOR, False)  # [ROWS, GROUPS]
        codes = tl.reshape(encode(grouped, scale[:, :, None], False), (ROWS, COLUMNS))
        tl.store(latents + place[:, None] + column[None, :], codes, inside)
        group = tl.arange(0, GROUPS)
        at = scales + (place // 4)[:, None] + group[None, :]
        tl.store(at, scale, stored[:, None] & (group * GROUP < latent)[None, :])
        place //= 2  # the key's values have two bytes
    else:
        tl.store(latents + place[:, None] + column[None, :], normed.to(latents.dtype.element_ty), inside)

    pair, column = tl.arange(0, PAIRS), tl.arange(0, 2 * PAIRS)
    inside = stored[:, None] & (column < 2 * pairs)[None, :]
    values = tl.load(source + latent + column[None, :], inside, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(values, (ROWS, PAIRS, 2)))
    inside_pair = stored[:, None] & (pair < pairs)[None, :]
    at = (sequence * cos_batch_stride + token * cos_stride)[:, None] + pair[None, :]
    c = tl.load(cos + at, inside_pair, other=0.0)
    at = (sequence * sin_batch_stride + token * sin_stride)[:, None] + pair[None, :]
    s = tl.load(sin + at, inside_pair, other=0.0)
    rotated = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (ROWS, 2 * PAIRS)).to(VALUES)
    tl.store(keys + place[:, None] + column[None, :], rotated.to(keys.dtype.element_ty), inside)
