"""Attention on per-head keys and values in Triton: the forward kernels, and the parts that the gradients share.

A query, and a key, is two vectors: one of its own head (P wide) and the rotated one (R wide), which for keys all heads
share. Their scores are two products into one sum, so nothing is joined, copied or padded to a common width. Scores are
kept in powers of two, `2 ** (s - log_sum)`, which is one instruction.

All kernels compute a tile of queries against a tile of keys. The keys that a query sees are two numbers (`seen`), from
its index or from spans; a key tile that all queries of the tile see whole needs no mask. Where P, R or V is no power of
two, blocks are the next one (`block`), and columns beyond the width are zeros.

Tensors come as tuples: a pointer, and the strides of batch, row and head (of batch and row for the shared key). Inside,
a matrix is a pointer and the stride of a row. SIZES is (P, R, V), TILE (queries, keys).
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import configs

LOG2E = tl.constexpr(1.4426950408889634)  # 2 ** (LOG2E * x) = e ** x
UNSIZED = ["queries", "keys", "heads", "pairs", "group"]  # not worth a kernel for each divisibility

block = triton.constexpr_function(configs.block)


@triton.jit
def seen(span, batch, row, queries, keys):
    """The first key that each query of `row` sees, and one past the last.

    For a query that sees nothing: 0 and 0 without spans, `keys` and 0 with them. Queries beyond the last one are taken
    for it, so that they do not widen the range of their tile.
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
    """Range of keys that a tile of queries sees, and inside it the range of key tiles that all of them see whole.

    Tiles are counted from the start; the four numbers are in order.
    """
    start, end = tl.min(first, 0), tl.max(last, 0)
    end = tl.maximum(start, end)  # nothing is seen: from `keys` to 0
    inner = tl.minimum(start + tl.cdiv(tl.max(first, 0) - start, COLUMNS) * COLUMNS, end)
    inner_end = inner + tl.maximum(tl.min(last, 0) - inner, 0) // COLUMNS * COLUMNS
    return start, inner, inner_end, end


@triton.jit
def sees(column, first, last, CAUSAL: tl.constexpr):
    """True where a query sees a key; the three are broadcast against each other."""
    if CAUSAL:
        return column < last
    else:
        return (column >= first) & (column < last)


@triton.jit
def place(pairs, tiles, group):
    """The (batch, head) pair of this program, and the pair's tile.

    A group of pairs whose keys and values fit in the L2 cache takes all its tiles before the next one begins, tile by
    tile, so that all pairs' first tiles, the longest, start first.
    """
    index = tl.program_id(0)
    begin = index // (group * tiles) * group
    rest = index % (group * tiles)
    size = tl.minimum(pairs - begin, group)
    return begin + rest % size, rest // size


@triton.jit
def load(matrix, row, limit, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Columns FIRST to FIRST + WIDTH of these rows as [rows, block]; zeros from row `limit` on."""
    base, stride = matrix
    column = tl.arange(0, block(WIDTH))
    inside = (row < limit)[:, None]
    if block(WIDTH) > WIDTH:
        inside = inside & (column < WIDTH)[None, :]
    return tl.load(base + FIRST + row[:, None].to(tl.int64) * stride + column[None, :], inside, other=0.0)


@triton.jit
def store(matrix, tile, row, limit, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """The reverse of `load`; converts."""
    base, stride = matrix
    column = tl.arange(0, block(WIDTH))
    inside = (row < limit)[:, None]
    if block(WIDTH) > WIDTH:
        inside = inside & (column < WIDTH)[None, :]
    at = base + FIRST + row[:, None].to(tl.int64) * stride + column[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), inside)


@triton.jit
def load_pair(matrix, row, limit, SIZES: tl.constexpr):
    """Both vectors of these queries: of their own head, and rotated."""
    return load(matrix, row, limit, 0, SIZES[0]), load(matrix, row, limit, SIZES[0], SIZES[1])


@triton.jit
def load_keys(kv, key, column, limit, SIZES: tl.constexpr):
    """Both vectors of these keys, and their values."""
    own, rotated = load(kv, column, limit, 0, SIZES[0]), load(key, column, limit, 0, SIZES[1])
    return own, rotated, load(kv, column, limit, SIZES[0], SIZES[2])


@triton.jit
def scores(left, left_rotated, right, right_rotated):
    """[left rows, right rows], not scaled."""
    part = tl.dot(left, right.T, input_precision="ieee")
    return tl.dot(left_rotated, right_rotated.T, part, input_precision="ieee")


@triton.jit
def head_of(tensor, batch, head):
    """The matrix of one head."""
    base, batch_stride, row_stride, head_stride = tensor
    return base + batch * batch_stride + head * head_stride, row_stride


@triton.jit
def shared_key_of(key, batch):
    """The matrix of all heads' rotated keys."""
    base, batch_stride, row_stride = key
    return base + batch * batch_stride, row_stride


@triton.jit
def query_tile(queries, heads, pairs, group, ROWS: tl.constexpr):
    """This program's (batch, head) pair, both of its numbers, and the first query of its tile."""
    tiles = tl.cdiv(queries, ROWS)
    pair, tile = place(pairs, tiles, group)
    tile = tiles - 1 - tile  # the last queries see most
    return pair.to(tl.int64), (pair // heads).to(tl.int64), (pair % heads).to(tl.int64), tile * ROWS


@triton.jit
def _softmax_step(s, total, top, norm, v, scale):
    """Adds a tile of scores `s`, minus infinity for keys that a query does not see, to the running sums.

    `top` starts at a finite number: where nothing is seen, `s - top` stays minus infinity and not NaN.
    """
    new = tl.maximum(top, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new[:, None])
    shrink = tl.exp2(top - new)
    norm = norm * shrink + tl.sum(p, 1)  # before the product: nothing else needs `p` while that runs
    total = tl.dot(p.to(v.dtype), v, total * shrink[:, None], input_precision="ieee")
    return total, new, norm


@triton.jit
def _store_rows(out, log_sum, state, row, queries, V: tl.constexpr):
    """Averages and log sums (base 2); zeros and infinity, so that `2 ** (s - log_sum)` is 0, where nothing is seen."""
    total, top, norm = state
    some = norm > 0
    share = tl.where(some, 1.0 / tl.where(some, norm, 1.0), 0.0)
    store(out, total * share[:, None], row, queries, 0, V)
    tl.store(log_sum + row, tl.where(some, top + tl.log2(tl.where(some, norm, 1.0)), float("inf")), row < queries)


@triton.jit
def _attend(state, own, rotated, seen_keys, kv, key, start, stop, limit, scale, CAUSAL, MASKED, SIZES, COLUMNS):
    """Adds tiles of keys from `start` to `stop` to the state; no key from `limit` on is read."""
    total, top, norm = state
    first, last = seen_keys
    for at in tl.range(start, stop, COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        k, k_rotated, v = load_keys(kv, key, column, limit, SIZES)
        s = scores(own, rotated, k, k_rotated)
        if MASKED:
            s = tl.where(sees(column[None, :], first[:, None], last[:, None], CAUSAL), s, float("-inf"))
        total, top, norm = _softmax_step(s, total, top, norm, v, scale)
    return total, top, norm


@triton.jit(do_not_specialize=UNSIZED)
def forward_kernel(
    q, kv, key, span, out, log_sum, queries, keys, heads, pairs, group, scale, SIZES: tl.constexpr, TILE: tl.constexpr
):
    """One tile of queries of one head. `out` is [B, T, N, V], `log_sum` [B, N, T]."""
    V: tl.constexpr = SIZES[2]
    ROWS: tl.constexpr = TILE[0]
    pair, batch, head, start_row = query_tile(queries, heads, pairs, group, ROWS)
    row = start_row + tl.arange(0, ROWS)
    q, kv, key = head_of(q, batch, head), head_of(kv, batch, head), shared_key_of(key, batch)
    own, rotated = load_pair(q, row, queries, SIZES)
    first, last = seen(span, batch, row, queries, keys)
    start, inner, inner_end, end = whole_tiles(first, last, TILE[1])
    total = tl.zeros((ROWS, block(V)), tl.float32)
    top = tl.full((ROWS,), -1e30, tl.float32)
    norm = tl.zeros((ROWS,), tl.float32)
    state, operands = (total, top, norm), (own, rotated, (first, last), kv, key)
    scale *= LOG2E
    causal: tl.constexpr = span is None
    if not causal:
        state = _attend(state, *operands, start, inner, end, scale, False, True, SIZES, TILE[1])
    state = _attend(state, *operands, inner, inner_end, end, scale, causal, False, SIZES, TILE[1])
    state = _attend(state, *operands, inner_end, end, end, scale, causal, True, SIZES, TILE[1])
    out += (batch * queries * heads + head) * V
    _store_rows((out, heads * V), log_sum + pair * queries, state, row, queries, V)


@triton.jit(do_not_specialize=UNSIZED)
def specialized_forward_kernel(
    q, kv, key, out, log_sum, queries, keys, heads, pairs, group, scale, SIZES: tl.constexpr, TILE: tl.constexpr
):
    """The same without spans, P, R and V powers of two: one warp group copies, by descriptors, and two compute.

    One loop with a mask for all keys, since a second one cannot be specialized; nor can one with spans, which Triton
    3.6 and 3.9 fail to compile.
    """
    P: tl.constexpr = SIZES[0]
    R: tl.constexpr = SIZES[1]
    V: tl.constexpr = SIZES[2]
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    pair, batch, head, start_row = query_tile(queries, heads, pairs, group, ROWS)
    row = start_row + tl.arange(0, ROWS)
    q_at, q_row = head_of(q, batch, head)
    kv_at, kv_row = head_of(kv, batch, head)
    key_at, key_row = shared_key_of(key, batch)
    first, last = seen(None, batch, row, queries, keys)
    end = tl.max(last, 0)
    limit = tl.maximum(end, 1)
    k_tiles = tl.make_tensor_descriptor(kv_at, [limit, P], [kv_row, 1], [COLUMNS, P])
    rotated_tiles = tl.make_tensor_descriptor(key_at, [limit, R], [key_row, 1], [COLUMNS, R])
    v_tiles = tl.make_tensor_descriptor(kv_at + P, [limit, V], [kv_row, 1], [COLUMNS, V])
    own = tl.make_tensor_descriptor(q_at, [queries, P], [q_row, 1], [ROWS, P]).load([start_row, 0])
    rotated = tl.make_tensor_descriptor(q_at + P, [queries, R], [q_row, 1], [ROWS, R]).load([start_row, 0])
    total = tl.zeros((ROWS, V), tl.float32)
    top = tl.full((ROWS,), -1e30, tl.float32)
    norm = tl.zeros((ROWS,), tl.float32)
    scale *= LOG2E
    for at in tl.range(0, end, COLUMNS, warp_specialize=True):
        s = scores(own, rotated, k_tiles.load([at, 0]), rotated_tiles.load([at, 0]))
        column = at + tl.arange(0, COLUMNS)
        s = tl.where(sees(column[None, :], first[:, None], last[:, None], True), s, float("-inf"))
        total, top, norm = _softmax_step(s, total, top, norm, v_tiles.load([at, 0]), scale)
    out += (batch * queries * heads + head) * V
    _store_rows((out, heads * V), log_sum + pair * queries, (total, top, norm), row, queries, V)
