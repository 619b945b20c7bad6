"""The gradients of `kernel.py` in Triton, without atomics: the same bits in every run.

With p the probabilities, do the gradient of the result, and delta = sum(out * do) of each query,

    dv = p.T @ do        ds = p * (do @ v.T - delta)        dq = scale * ds @ k        dk = scale * ds.T @ q

One kernel runs over the queries of a tile of keys (dk, dv), another over the keys of a tile of queries (dq). Both
compute the probabilities again, from the log sums: 1.4 times the products of one kernel that does everything, which
would have to add up dq with atomics. The former computes transposed scores `k @ q.T`, so that no product takes the
transpose of another's result: Triton from 3.4 on got that wrong on Hopper.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel import LOG2E, UNSIZED, load, looks, place, scores, seen, store, whole_tiles


@triton.jit(do_not_specialize=UNSIZED)
def delta_kernel(
    out,
    grad,
    delta,
    queries,
    heads,
    grad_batch,
    grad_row,
    grad_head,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
):
    """sum(out * grad) of each query and head -> [B, N, T]. `out` is [B, T, N, V]."""
    tiles = tl.cdiv(queries, ROWS)
    pair, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    left = load(out + (batch * queries * heads + head) * V, row, heads * V, queries, V, BLOCK_V)
    right = load(grad + batch * grad_batch + head * grad_head, row, grad_row, queries, V, BLOCK_V)
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
        sees = (row < queries) & (first < (tile + 1) * COLUMNS) & (last > tile * COLUMNS)
        start = tl.where(sees, tl.minimum(start, row), start)
        end = tl.where(sees, row + 1, end)
    place = ranges + tl.program_id(0).to(tl.int64) * 2
    tl.store(place, tl.min(start, 0))
    tl.store(place + 1, tl.max(end, 0))


@triton.jit
def _add_queries(
    dk,
    dk_rotated,
    dv,
    k,
    k_rotated,
    v,
    column,
    q,
    grad,
    log_sum,
    delta,
    span,
    batch,
    q_row,
    grad_row,
    queries,
    keys,
    start,
    stop,
    scale,
    MASKED: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds the queries from `start` to `stop` to the gradients of one tile of keys, not scaled."""
    for at in tl.range(start, stop, ROWS):
        row = at + tl.arange(0, ROWS)
        own = load(q, row, q_row, stop, P, BLOCK_P)
        rotated = load(q + P, row, q_row, stop, R, BLOCK_R)
        do = load(grad, row, grad_row, stop, V, BLOCK_V)
        # A query beyond `stop` has the probability 0.
        sums = tl.load(log_sum + row, row < stop, other=float("inf"))
        s = scores(k, k_rotated, own, rotated)  # [keys, queries]
        p = tl.exp2(s * scale - sums[None, :])
        if MASKED:
            first, last = seen(span, batch, row, queries, keys)
            sees = looks(column[:, None], first[None, :], last[None, :], span is None)
            p = tl.where(sees, p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(v, do.T, input_precision="ieee")
        ds = p * (dp - tl.load(delta + row, row < stop, other=0.0)[None, :])
        if MASKED:
            ds = tl.where(sees, ds, 0.0)  # a key that nobody sees may hold anything
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
    grad,
    log_sum,
    delta,
    ranges,
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
    q_batch,
    q_row,
    q_head,
    kv_batch,
    kv_row,
    kv_head,
    key_batch,
    key_row,
    grad_batch,
    grad_row,
    grad_head,
    P: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of keys of one head: `kv_grad` [B, S, N, P + V], and its part of the shared key's gradient.

    Heads are `some` from number `begin` on; `pairs` are of a row of the batch and one of these; `key_grads` is
    [B, some, S, R], to be added up over heads.
    """
    tiles = tl.cdiv(keys, COLUMNS)
    pair, tile = place(pairs, tiles, group)
    batch, head = (pair // some).to(tl.int64), (begin + pair % some).to(tl.int64)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    q += batch * q_batch + head * q_head
    kv += batch * kv_batch + head * kv_head
    grad += batch * grad_batch + head * grad_head
    sums = (batch * heads + head) * queries
    k = load(kv, column, kv_row, keys, P, BLOCK_P)
    k_rotated = load(key + batch * key_batch, column, key_row, keys, R, BLOCK_R)
    v = load(kv + P, column, kv_row, keys, V, BLOCK_V)
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
    dk = tl.zeros((COLUMNS, BLOCK_P), tl.float32)
    dk_rotated = tl.zeros((COLUMNS, BLOCK_R), tl.float32)
    dv = tl.zeros((COLUMNS, BLOCK_V), tl.float32)
    dk, dk_rotated, dv = _add_queries(
        *(dk, dk_rotated, dv, k, k_rotated, v, column, q, grad, log_sum + sums, delta + sums, span, batch),
        *(q_row, grad_row, queries, keys, start, inner, scale * LOG2E),
        *(True, P, R, V, BLOCK_P, BLOCK_R, BLOCK_V, ROWS),
    )
    if span is None:
        dk, dk_rotated, dv = _add_queries(
            *(dk, dk_rotated, dv, k, k_rotated, v, column, q, grad, log_sum + sums, delta + sums, span, batch),
            *(q_row, grad_row, queries, keys, inner, stop, scale * LOG2E),
            *(False, P, R, V, BLOCK_P, BLOCK_R, BLOCK_V, ROWS),
        )
    kv_grad += (batch * keys * heads + head) * (P + V)
    store(kv_grad, dk * scale, column, heads * (P + V), keys, P, BLOCK_P)
    store(kv_grad + P, dv, column, heads * (P + V), keys, V, BLOCK_V)
    store(key_grads + pair.to(tl.int64) * keys * R, dk_rotated * scale, column, R, keys, R, BLOCK_R)


@triton.jit
def _add_keys(
    dq,
    dq_rotated,
    q,
    q_rotated,
    do,
    sums,
    delta,
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
    """Adds the keys from `start` to `stop` to the gradient of one tile of queries, not scaled."""
    for at in tl.range(start, stop, COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        k = load(kv, column, kv_row, end, P, BLOCK_P)
        k_rotated = load(key, column, key_row, end, R, BLOCK_R)
        v = load(kv + P, column, kv_row, end, V, BLOCK_V)
        p = tl.exp2(scores(q, q_rotated, k, k_rotated) * scale - sums[:, None])
        ds = p * (tl.dot(do, v.T, input_precision="ieee") - delta[:, None])
        if MASKED:
            ds = tl.where(looks(column[None, :], first[:, None], last[:, None], CAUSAL), ds, 0.0)
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
    log_sum,
    delta,
    q_grad,
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
    grad_batch,
    grad_row,
    grad_head,
    P: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of queries of one head: `q_grad` [B, T, N, P + R]."""
    tiles = tl.cdiv(queries, ROWS)
    pair, tile = place(pairs, tiles, group)
    tile = tiles - 1 - tile
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    q += batch * q_batch + head * q_head
    kv += batch * kv_batch + head * kv_head
    key += batch * key_batch
    own = load(q, row, q_row, queries, P, BLOCK_P)
    rotated = load(q + P, row, q_row, queries, R, BLOCK_R)
    do = load(grad + batch * grad_batch + head * grad_head, row, grad_row, queries, V, BLOCK_V)
    at = pair.to(tl.int64) * queries + row
    sums = tl.load(log_sum + at, row < queries, other=float("inf"))
    deltas = tl.load(delta + at, row < queries, other=0.0)
    first, last = seen(span, batch, row, queries, keys)
    start, inner, inner_end, end = whole_tiles(first, last, COLUMNS)
    dq = tl.zeros((ROWS, BLOCK_P), tl.float32)
    dq_rotated = tl.zeros((ROWS, BLOCK_R), tl.float32)
    if span is not None:
        dq, dq_rotated = _add_keys(
            *(dq, dq_rotated, own, rotated, do, sums, deltas, first, last, kv, key, kv_row, key_row),
            *(start, inner, end, scale * LOG2E, False, True, P, R, V, BLOCK_P, BLOCK_R, BLOCK_V, COLUMNS),
        )
    dq, dq_rotated = _add_keys(
        *(dq, dq_rotated, own, rotated, do, sums, deltas, first, last, kv, key, kv_row, key_row),
        *(inner, inner_end, end, scale * LOG2E, span is None, False, P, R, V, BLOCK_P, BLOCK_R, BLOCK_V, COLUMNS),
    )
    dq, dq_rotated = _add_keys(
        *(dq, dq_rotated, own, rotated, do, sums, deltas, first, last, kv, key, kv_row, key_row),
        *(inner_end, end, end, scale * LOG2E, span is None, True, P, R, V, BLOCK_P, BLOCK_R, BLOCK_V, COLUMNS),
    )
    q_grad += (batch * queries * heads + head) * (P + R)
    store(q_grad, dq * scale, row, heads * (P + R), queries, P, BLOCK_P)
    store(q_grad + P, dq_rotated * scale, row, heads * (P + R), queries, R, BLOCK_R)
