"""The gradients of `kernel.py` in Triton, without atomics: the same bits in every run.

With p the probabilities, do the gradient of the result, and delta = sum(out * do) of each query,

    dv = p.T @ do        ds = p * (do @ v.T - delta)        dq = scale * ds @ k        dk = scale * ds.T @ q

One kernel runs over the queries of a tile of keys (dk, dv), another over the keys of a tile of queries (dq). Both
compute the probabilities again, from the log sums: 1.4 times the products of one kernel that does everything, which
would have to add up dq with atomics. The former computes transposed scores `k @ q.T`, so that no product takes the
transpose of another's result: Triton from 3.4 on got that wrong on Hopper.

Arguments are as for `kernel.py`; `sums` are pointers to log sums and deltas, [B, N, T].
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel import (
    LOG2E,
    UNSIZED,
    block,
    head_of,
    load,
    load_keys,
    load_pair,
    place,
    query_tile,
    scores,
    seen,
    sees,
    shared_key_of,
    store,
    whole_tiles,
)


@triton.jit(do_not_specialize=UNSIZED)
def delta_kernel(out, grad, delta, queries, heads, V: tl.constexpr, ROWS: tl.constexpr):
    """sum(out * grad) of each query and head -> [B, N, T]. `out` is [B, T, N, V]."""
    tiles = tl.cdiv(queries, ROWS)
    pair, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    left = load((out + (batch * queries * heads + head) * V, heads * V), row, queries, 0, V)
    right = load(head_of(grad, batch, head), row, queries, 0, V)
    result = tl.sum(left.to(tl.float32) * right.to(tl.float32), 1)
    tl.store(delta + pair.to(tl.int64) * queries + row, result, row < queries)


@triton.jit(do_not_specialize=UNSIZED)
def range_kernel(span, ranges, queries, keys, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """The first query that sees a tile of keys, and one past the last; T and 0 where none does. [B, tiles, 2]"""
    tiles = tl.cdiv(keys, COLUMNS)
    batch, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    start = tl.full((BLOCK,), queries, tl.int32)
    end = tl.zeros((BLOCK,), tl.int32)
    for at in tl.range(0, queries, BLOCK):
        row = at + tl.arange(0, BLOCK)
        first, last = seen(span, batch, row, queries, keys)
        inside = (row < queries) & (first < (tile + 1) * COLUMNS) & (last > tile * COLUMNS)
        start = tl.where(inside, tl.minimum(start, row), start)
        end = tl.where(inside, row + 1, end)
    place = ranges + tl.program_id(0).to(tl.int64) * 2
    tl.store(place, tl.min(start, 0))
    tl.store(place + 1, tl.max(end, 0))


@triton.jit
def _add_queries(
    gradients, key_tile, column, q, grad, sums, span, batch, queries, keys, start, stop, scale, MASKED, SIZES, ROWS
):
    """Adds the queries from `start` to `stop` to the gradients of one tile of keys, not scaled."""
    dk, dk_rotated, dv = gradients
    k, k_rotated, v = key_tile
    log_sum, delta = sums
    for at in tl.range(start, stop, ROWS):
        row = at + tl.arange(0, ROWS)
        own, rotated = load_pair(q, row, stop, SIZES)
        do = load(grad, row, stop, 0, SIZES[2])
        # A query beyond `stop` has the probability 0.
        exponent = tl.load(log_sum + row, row < stop, other=float("inf"))
        s = scores(k, k_rotated, own, rotated)  # [keys, queries]
        p = tl.exp2(s * scale - exponent[None, :])
        if MASKED:
            first, last = seen(span, batch, row, queries, keys)
            inside = sees(column[:, None], first[None, :], last[None, :], span is None)
            p = tl.where(inside, p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(v, do.T, input_precision="ieee")
        ds = p * (dp - tl.load(delta + row, row < stop, other=0.0)[None, :])
        if MASKED:
            ds = tl.where(inside, ds, 0.0)  # a key that no query sees may hold anything
        ds = ds.to(own.dtype)
        dk = tl.dot(ds, own, dk, input_precision="ieee")
        dk_rotated = tl.dot(ds, rotated, dk_rotated, input_precision="ieee")
    return dk, dk_rotated, dv


@triton.jit(do_not_specialize=[*UNSIZED, "begin", "some"])
def key_gradient_kernel(
    q,
    kv,
    key,
    span,
    ranges,
    grad,
    sums,
    kv_grad,
    key_grads,
    queries,
    keys,
    heads,
    pairs,
    group,
    begin,
    some,
    scale,
    SIZES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of keys of one head: `kv_grad` [B, S, N, P + V], and its part of the shared key's gradient.

    Heads are `some` from number `begin` on; pairs are of a row of the batch and one of these; `key_grads` is
    [B, some, S, R], to be added up over heads.
    """
    P: tl.constexpr = SIZES[0]
    R: tl.constexpr = SIZES[1]
    V: tl.constexpr = SIZES[2]
    ROWS: tl.constexpr = TILE[0]
    COLUMNS: tl.constexpr = TILE[1]
    tiles = tl.cdiv(keys, COLUMNS)
    pair, tile = place(pairs, tiles, group)
    batch, head = (pair // some).to(tl.int64), (begin + pair % some).to(tl.int64)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    q, grad = head_of(q, batch, head), head_of(grad, batch, head)
    at = (batch * heads + head) * queries
    sums = sums[0] + at, sums[1] + at
    key_tile = load_keys(head_of(kv, batch, head), shared_key_of(key, batch), column, keys, SIZES)
    if span is None:
        # Query t sees keys up to t + keys - queries: the first tiles of queries see a part of this tile.
        start = tl.maximum(tile * COLUMNS - (keys - queries), 0)
        stop = queries
        partial = tl.maximum((tile + 1) * COLUMNS - 1 - (keys - queries), start)
        inner = tl.minimum(start + tl.cdiv(partial - start, ROWS) * ROWS, stop)
    else:
        start = tl.load(ranges + (batch * tiles + tile) * 2)
        stop = tl.load(ranges + (batch * tiles + tile) * 2 + 1)
        inner = stop
    dk = tl.zeros((COLUMNS, block(P)), tl.float32)
    dk_rotated = tl.zeros((COLUMNS, block(R)), tl.float32)
    dv = tl.zeros((COLUMNS, block(V)), tl.float32)
    gradients, operands = (dk, dk_rotated, dv), (key_tile, column, q, grad, sums, span, batch, queries, keys)
    gradients = _add_queries(gradients, *operands, start, inner, scale * LOG2E, True, SIZES, ROWS)
    if span is None:
        gradients = _add_queries(gradients, *operands, inner, stop, scale * LOG2E, False, SIZES, ROWS)
    dk, dk_rotated, dv = gradients
    kv_grad += (batch * keys * heads + head) * (P + V)
    store((kv_grad, heads * (P + V)), dk * scale, column, keys, 0, P)
    store((kv_grad, heads * (P + V)), dv, column, keys, P, V)
    store((key_grads + pair.to(tl.int64) * keys * R, R), dk_rotated * scale, column, keys, 0, R)


@triton.jit
def _add_keys(
    gradients, own, rotated, do, sums, seen_keys, kv, key, start, stop, limit, scale, CAUSAL, MASKED, SIZES, COLUMNS
):
    """Adds the keys from `start` to `stop` to the gradient of one tile of queries, not scaled."""
    dq, dq_rotated = gradients
    log_sum, delta = sums
    first, last = seen_keys
    for at in tl.range(start, stop, COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        k, k_rotated, v = load_keys(kv, key, column, limit, SIZES)
        p = tl.exp2(scores(own, rotated, k, k_rotated) * scale - log_sum[:, None])
        ds = p * (tl.dot(do, v.T, input_precision="ieee") - delta[:, None])
        if MASKED:
            ds = tl.where(sees(column[None, :], first[:, None], last[:, None], CAUSAL), ds, 0.0)
        ds = ds.to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
        dq_rotated = tl.dot(ds, k_rotated, dq_rotated, input_precision="ieee")
    return dq, dq_rotated


@triton.jit(do_not_specialize=UNSIZED)
def query_gradient_kernel(
    q,
    kv,
    key,
    span,
    grad,
    sums,
    q_grad,
    queries,
    keys,
    heads,
    pairs,
    group,
    scale,
    SIZES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of queries of one head: `q_grad` [B, T, N, P + R]."""
    P: tl.constexpr = SIZES[0]
    R: tl.constexpr = SIZES[1]
    ROWS: tl.constexpr = TILE[0]
    pair, batch, head, start_row = query_tile(queries, heads, pairs, group, ROWS)
    row = start_row + tl.arange(0, ROWS)
    q, kv, key = head_of(q, batch, head), head_of(kv, batch, head), shared_key_of(key, batch)
    own, rotated = load_pair(q, row, queries, SIZES)
    do = load(head_of(grad, batch, head), row, queries, 0, SIZES[2])
    at = pair * queries + row
    log_sum = tl.load(sums[0] + at, row < queries, other=float("inf"))
    delta = tl.load(sums[1] + at, row < queries, other=0.0)
    first, last = seen(span, batch, row, queries, keys)
    start, inner, inner_end, end = whole_tiles(first, last, TILE[1])
    dq = tl.zeros((ROWS, block(P)), tl.float32)
    dq_rotated = tl.zeros((ROWS, block(R)), tl.float32)
    gradients, operands = (dq, dq_rotated), (own, rotated, do, (log_sum, delta), (first, last), kv, key)
    scale_two = scale * LOG2E
    causal: tl.constexpr = span is None
    if not causal:
        gradients = _add_keys(gradients, *operands, start, inner, end, scale_two, False, True, SIZES, TILE[1])
    gradients = _add_keys(gradients, *operands, inner, inner_end, end, scale_two, causal, False, SIZES, TILE[1])
    gradients = _add_keys(gradients, *operands, inner_end, end, end, scale_two, causal, True, SIZES, TILE[1])
    dq, dq_rotated = gradients
    q_grad += (batch * queries * heads + head) * (P + R)
    store((q_grad, heads * (P + R)), dq * scale, row, queries, 0, P)
    store((q_grad, heads * (P + R)), dq_rotated * scale, row, queries, P, R)
