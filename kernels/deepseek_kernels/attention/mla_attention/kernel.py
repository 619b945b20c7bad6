"""Attention on per-head keys and values in Triton: the forward kernels, and what the gradients share with them.

A query, and a key, is two vectors: one of its own head (P wide) and the rotated one (R wide), which for keys all heads
share. Their scores are two products into one sum, so nothing is joined, copied or padded to a common width. Scores are
kept in powers of two, `2 ** (s - log_sum)`, which is one instruction.

All kernels compute a tile of queries against a tile of keys. Which keys a query sees is two numbers (`_seen`), whether
they come from its index or from spans; a key tile that all queries of the tile see whole needs no mask. Where P, R or V
is no power of two, blocks are the next one (BLOCK_P and so on), and what is beyond is zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # 2 ** (LOG2E * x) = e ** x
UNSIZED = ["queries", "keys", "heads", "pairs", "group"]  # not worth a kernel for each divisibility


@triton.jit
def seen(span, batch, row, queries, keys):
    """The first key that each query of `row` sees, and one past the last.

    Where it sees nothing: 0 and 0 without spans, `keys` and 0 with them. Queries beyond the last one are taken for it,
    so that they do not widen the range of their tile.
    """
    row = tl.minimum(row, queries - 1)
    if span is None:
        return row * 0, tl.maximum(row + (keys - queries + 1), 0)
    else:
        at = span + (batch.to(tl.int64) * queries + row) * 2
        first = tl.maximum(tl.load(at), 0)
        last = tl.minimum(tl.load(at + 1), keys)
        some = first < last
        return tl.where(some, first, keys), tl.where(some, last, 0)


@triton.jit
def whole_tiles(first, last, COLUMNS: tl.constexpr):
    """Of the keys of a tile of queries: start and end, and between them the start and end of tiles that all see whole.

    Tiles are counted from the start; the four numbers are in order.
    """
    start, end = tl.min(first, 0), tl.max(last, 0)
    end = tl.maximum(start, end)  # nothing is seen: from `keys` to 0
    inner = tl.minimum(start + tl.cdiv(tl.max(first, 0) - start, COLUMNS) * COLUMNS, end)
    inner_end = inner + tl.maximum(tl.min(last, 0) - inner, 0) // COLUMNS * COLUMNS
    return start, inner, inner_end, end


@triton.jit
def looks(column, first, last, CAUSAL: tl.constexpr):
    """Whether a query sees a key; the three are broadcast against each other."""
    if CAUSAL:
        return column < last
    else:
        return (column >= first) & (column < last)


@triton.jit
def place(pairs, tiles, group):
    """Which (batch, head) pair, and which of its tiles, this program computes.

    A group of pairs whose keys and values fit in the L2 cache takes all its tiles before the next one begins, tile by
    tile, so that all pairs' first tiles, the longest, start first.
    """
    index = tl.program_id(0)
    begin = index // (group * tiles) * group
    rest = index % (group * tiles)
    size = tl.minimum(pairs - begin, group)
    return begin + rest % size, rest // size


@triton.jit
def load(base, row, stride, limit, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a matrix [.., WIDTH] as [rows, BLOCK]; zeros from row `limit` on."""
    column = tl.arange(0, BLOCK)
    inside = (row < limit)[:, None]
    if WIDTH < BLOCK:
        inside = inside & (column < WIDTH)[None, :]
    return tl.load(base + row[:, None].to(tl.int64) * stride + column[None, :], inside, other=0.0)


@triton.jit
def store(base, tile, row, stride, limit, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The reverse of `load`; converts."""
    column = tl.arange(0, BLOCK)
    inside = (row < limit)[:, None]
    if WIDTH < BLOCK:
        inside = inside & (column < WIDTH)[None, :]
    at = base + row[:, None].to(tl.int64) * stride + column[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), inside)


@triton.jit
def scores(left, left_rotated, right, right_rotated):
    """[left rows, right rows], not scaled."""
    part = tl.dot(left, right.T, input_precision="ieee")
    return tl.dot(left_rotated, right_rotated.T, part, input_precision="ieee")


@triton.jit
def _softmax_step(s, total, top, norm, v, scale):
    """Adds a tile of scores `s`, minus infinity where a query does not look, to the running sums.

    `top` starts at a finite number: where nothing is seen, `s - top` stays minus infinity and not NaN.
    """
    new = tl.maximum(top, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new[:, None])
    shrink = tl.exp2(top - new)
    norm = norm * shrink + tl.sum(p, 1)  # before the product: nothing else needs `p` while that runs
    total = tl.dot(p.to(v.dtype), v, total * shrink[:, None], input_precision="ieee")
    return total, new, norm


@triton.jit
def _store_rows(out, log_sum, total, top, norm, row, row_stride, queries, V: tl.constexpr, BLOCK_V: tl.constexpr):
    """Averages and log sums (base 2); zeros and infinity, so that `2 ** (s - log_sum)` is 0, where nothing is seen."""
    some = norm > 0
    share = tl.where(some, 1.0 / tl.where(some, norm, 1.0), 0.0)
    store(out, total * share[:, None], row, row_stride, queries, V, BLOCK_V)
    tl.store(log_sum + row, tl.where(some, top + tl.log2(tl.where(some, norm, 1.0)), float("inf")), row < queries)


@triton.jit
def _attend(
    total,
    top,
    norm,
    q,
    q_rotated,
    first,
    last,
    kv,
    key,
    kv_row,
    key_row,
    start,
    stop,
    end,
    scale,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Tiles of keys from `start` to `stop`; no key from `end` on is read."""
    for at in tl.range(start, stop, COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        k = load(kv, column, kv_row, end, P, BLOCK_P)
        k_rotated = load(key, column, key_row, end, R, BLOCK_R)
        v = load(kv + P, column, kv_row, end, V, BLOCK_V)
        s = scores(q, q_rotated, k, k_rotated)
        if MASKED:
            s = tl.where(looks(column[None, :], first[:, None], last[:, None], CAUSAL), s, float("-inf"))
        total, top, norm = _softmax_step(s, total, top, norm, v, scale)
    return total, top, norm


@triton.jit(do_not_specialize=UNSIZED)
def forward_kernel(
    q,
    kv,
    key,
    span,
    out,
    log_sum,
    queries,
    keys,
    heads,
    pairs,
    group,
    scale,
    q_batch,
    q_row,
    q_head,
    kv_batch,
    kv_row,
    kv_head,
    key_batch,
    key_row,
    P: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of queries of one head. `out` is [B, T, N, V], `log_sum` [B, N, T]."""
    tiles = tl.cdiv(queries, ROWS)
    pair, tile = place(pairs, tiles, group)
    tile = tiles - 1 - tile  # the last queries see most
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    q += batch * q_batch + head * q_head
    kv += batch * kv_batch + head * kv_head
    key += batch * key_batch
    own = load(q, row, q_row, queries, P, BLOCK_P)
    rotated = load(q + P, row, q_row, queries, R, BLOCK_R)
    first, last = seen(span, batch, row, queries, keys)
    start, inner, inner_end, end = whole_tiles(first, last, COLUMNS)
    total = tl.zeros((ROWS, BLOCK_V), tl.float32)
    top = tl.full((ROWS,), -1e30, tl.float32)
    norm = tl.zeros((ROWS,), tl.float32)
    scale *= LOG2E
    if span is not None:
        total, top, norm = _attend(
            *(total, top, norm, own, rotated, first, last, kv, key, kv_row, key_row, start, inner, end, scale),
            *(False, True, P, R, V, BLOCK_P, BLOCK_R, BLOCK_V, COLUMNS),
        )
    total, top, norm = _attend(
        *(total, top, norm, own, rotated, first, last, kv, key, kv_row, key_row, inner, inner_end, end, scale),
        *(span is None, False, P, R, V, BLOCK_P, BLOCK_R, BLOCK_V, COLUMNS),
    )
    total, top, norm = _attend(
        *(total, top, norm, own, rotated, first, last, kv, key, kv_row, key_row, inner_end, end, end, scale),
        *(span is None, True, P, R, V, BLOCK_P, BLOCK_R, BLOCK_V, COLUMNS),
    )
    out += (batch * queries * heads + head) * V
    log_sum += pair.to(tl.int64) * queries
    _store_rows(out, log_sum, total, top, norm, row, heads * V, queries, V, BLOCK_V)


@triton.jit(do_not_specialize=UNSIZED)
def specialized_forward_kernel(
    q,
    kv,
    key,
    out,
    log_sum,
    queries,
    keys,
    heads,
    pairs,
    group,
    scale,
    q_batch,
    q_row,
    q_head,
    kv_batch,
    kv_row,
    kv_head,
    key_batch,
    key_row,
    P: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The same without spans, P, R and V powers of two: one warp group copies, by descriptors, and two compute.

    One loop with a mask for all keys, since a second one cannot be specialized; nor can one with spans, which Triton
    3.6 and 3.9 fail to compile.
    """
    tiles = tl.cdiv(queries, ROWS)
    pair, tile = place(pairs, tiles, group)
    tile = tiles - 1 - tile
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    q += batch * q_batch + head * q_head
    kv += batch * kv_batch + head * kv_head
    key += batch * key_batch
    first, last = seen(None, batch, row, queries, keys)
    end = tl.max(last, 0)
    limit = tl.maximum(end, 1)
    k_tiles = tl.make_tensor_descriptor(kv, [limit, P], [kv_row, 1], [COLUMNS, P])
    rotated_tiles = tl.make_tensor_descriptor(key, [limit, R], [key_row, 1], [COLUMNS, R])
    v_tiles = tl.make_tensor_descriptor(kv + P, [limit, V], [kv_row, 1], [COLUMNS, V])
    own = tl.make_tensor_descriptor(q, [queries, P], [q_row, 1], [ROWS, P]).load([tile * ROWS, 0])
    rotated = tl.make_tensor_descriptor(q + P, [queries, R], [q_row, 1], [ROWS, R]).load([tile * ROWS, 0])
    total = tl.zeros((ROWS, V), tl.float32)
    top = tl.full((ROWS,), -1e30, tl.float32)
    norm = tl.zeros((ROWS,), tl.float32)
    scale *= LOG2E
    for at in tl.range(0, end, COLUMNS, warp_specialize=True):
        s = scores(own, rotated, k_tiles.load([at, 0]), rotated_tiles.load([at, 0]))
        column = at + tl.arange(0, COLUMNS)
        s = tl.where(looks(column[None, :], first[:, None], last[:, None], True), s, float("-inf"))
        total, top, norm = _softmax_step(s, total, top, norm, v_tiles.load([at, 0]), scale)
    out += (batch * queries * heads + head) * V
    log_sum += pair.to(tl.int64) * queries
    _store_rows(out, log_sum, total, top, norm, row, heads * V, queries, V, V)


def compile_cases() -> list:
    """Every configuration that is launched, for `deepseek_kernels.testing.compile_gate`."""
    from .compile_cases import compile_cases

    return compile_cases()
