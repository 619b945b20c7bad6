"""The rotation in Triton: a program reads whole rows' rotary columns, and writes them where they are to go.

Neighbouring columns are read and written together and parted into pairs in registers: a thread holds both of a pair.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotate_kernel(
    x,
    cos,
    sin,
    out,
    tokens,
    length,
    heads,
    offset,
    x_strides,
    out_strides,
    angle_strides,
    PAIRS: tl.constexpr,
    BACKWARD: tl.constexpr,
    COPY: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
):
    """Rotates pairs, the other way round with BACKWARD, behind the first `offset` columns, which are copied with COPY.

    Strides are of batch, token and head; angles are the same for all heads.
    """
    x_batch, x_token, x_head = x_strides
    out_batch, out_token, out_head = out_strides
    angle_batch, angle_token = angle_strides
    COLUMNS: tl.constexpr = 2 * PAIR_BLOCK
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    batch, step = token // length, token % length
    row_exists = (token < tokens)[:, None, None] & (head < heads)[None, :, None]
    x_row = x + (batch * x_batch + step * x_token)[:, None, None] + (head * x_head)[None, :, None]
    out_row = out + (batch * out_batch + step * out_token)[:, None, None] + (head * out_head)[None, :, None]

    pair = tl.arange(0, PAIR_BLOCK)
    angle = (batch * angle_batch + step * angle_token)[:, None, None] + pair[None, None, :]
    angle_exists = (token < tokens)[:, None, None] & (pair < PAIRS)[None, None, :]
    c = tl.load(cos + angle, angle_exists, other=0.0)  # [TOKENS, 1, PAIR_BLOCK]
    s = tl.load(sin + angle, angle_exists, other=0.0)
    if BACKWARD:
        s = -s

    column = tl.arange(0, COLUMNS)
    inside = row_exists & (column < 2 * PAIRS)[None, None, :]
    at = (offset + column)[None, None, :]
    values = tl.load(x_row + at, inside, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(values, (TOKENS, HEADS, PAIR_BLOCK, 2)))
    rotated = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (TOKENS, HEADS, COLUMNS))
    tl.store(out_row + at, rotated.to(out.dtype.element_ty), inside)
    if COPY:
        for start in tl.range(0, offset, COLUMNS):
            inside = row_exists & (start + column < offset)[None, None, :]
            at = (start + column)[None, None, :]
            tl.store(out_row + at, tl.load(x_row + at, inside, other=0.0), inside)
