"""The gradients of the indexer's scores in Triton, without atomics: the same bits in every run.

With p[t, g, s] = q[t, g] . k[s] and dS the gradient of the scores, zero where a query does not see a key,

    dw[t, g] = sum over s of dS[t, s] * ReLU(p[t, g, s])        dp[t, g, s] = dS[t, s] * w[t, g] where p > 0
    dq[t, g] = sum over s of dp[t, g, s] * k[s]                 dk[s] = sum over t and g of dp[t, g, s] * q[t, g]

One kernel runs over the keys of a block of queries (dq, dw), another over the queries of a tile of keys (dk); both
compute the products again, so that none of them is stored. dp is rounded to the operands' dtype for its products.
Arguments are as for `kernel.py`; `grad_strides` are of batch and query.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel import load_pairs, load_weights, visible

__all__ = ["key_gradient_kernel", "query_gradient_kernel"]


@triton.jit
def _load_keys(
    keys, batch, position, inside, key_stride, TOKEN: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr
):
    """Keys [KEYS, COLUMNS] at `position`; zeros where they are not `inside`."""
    c = tl.arange(0, COLUMNS)
    at = keys + batch * key_stride + position.to(tl.int64)[:, None] * TOKEN + c[None, :]
    return tl.load(at, inside[:, None] & (c < WIDTH)[None, :], other=0.0)


@triton.jit
def _load_gradient(
    grad,
    mask,
    batch,
    query,
    position,
    first,
    end,
    grad_strides,
    mask_strides,
    MASK: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """The scores' gradient, and where a query sees a key: [QUERIES, KEYS], or [KEYS, QUERIES]."""
    grad_batch, grad_query = grad_strides
    mask_batch, mask_query, mask_key = mask_strides
    row, column = batch * grad_batch + query.to(tl.int64) * grad_query, position.to(tl.int64)
    mask_row = batch * mask_batch + query.to(tl.int64) * mask_query
    if KEYS_FIRST:
        seen = (position[:, None] >= first[None, :]) & (position[:, None] < end[None, :])
        at, mask_at = row[None, :] + column[:, None], mask_row[None, :] + column[:, None] * mask_key
    else:
        seen = (position[None, :] >= first[:, None]) & (position[None, :] < end[:, None])
        at, mask_at = row[:, None] + column[None, :], mask_row[:, None] + column[None, :] * mask_key
    if MASK == "dense":
        seen = seen & (tl.load(mask + mask_at, seen, other=0) != 0)
    return tl.load(grad + at, seen, other=0.0), seen


@triton.jit
def query_gradient_kernel(
    q,
    keys,
    weights,
    mask,
    grad,
    q_grad,
    weights_grad,
    queries,
    count,
    q_strides,
    key_stride,
    weight_strides,
    mask_strides,
    grad_strides,
    TOKEN: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    PLACES: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    MASK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradients of all heads of QUERIES queries, and of their weights; both results are contiguous."""
    PRECISION: tl.constexpr = "ieee" if q.dtype.element_ty == tl.float32 else "tf32"
    blocks = tl.cdiv(queries, QUERIES)
    start = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES  # the last queries see most
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    query, n = start + tl.arange(0, QUERIES), tl.arange(0, KEYS)
    first, end = visible(query, query < queries, batch, queries, count, mask, MASK)
    begin, until = tl.min(first, 0), tl.max(end, 0)
    pairs = load_pairs(q, batch, start, queries, q_strides, HEADS, WIDTH, QUERIES, PLACES, COLUMNS)
    weight = load_weights(weights, batch, query, queries, weight_strides, HEADS, PLACES)
    dq = tl.zeros((QUERIES * PLACES, COLUMNS), tl.float32)
    dw = tl.zeros((QUERIES, PLACES), tl.float32)
    for at in tl.range(begin, until, KEYS, num_stages=STAGES):
        position = at + n
        key = _load_keys(keys, batch, position, position < until, key_stride, TOKEN, WIDTH, COLUMNS)
        ds, seen = _load_gradient(
            grad, mask, batch, query, position, first, end, grad_strides, mask_strides, MASK, False
        )
        products = tl.dot(pairs, key.T, input_precision=PRECISION).reshape(QUERIES, PLACES, KEYS)
        products = tl.where(seen[:, None, :], products, 0.0)  # a key that no query sees may hold anything
        dw += tl.sum(tl.maximum(products, 0.0, propagate_nan=tl.PropagateNan.ALL) * ds[:, None, :], 2)
        dp = tl.where(products <= 0, 0.0, weight[:, :, None] * ds[:, None, :])
        dp = dp.reshape(QUERIES * PLACES, KEYS).to(key.dtype)
        dq = tl.dot(dp, key, dq, input_precision=PRECISION)
    pair, c, head = tl.arange(0, QUERIES * PLACES), tl.arange(0, COLUMNS), tl.arange(0, PLACES)
    row = batch * queries + start + pair // PLACES
    inside = (start + pair // PLACES < queries) & (pair % PLACES < HEADS)
    at = q_grad + (row * HEADS + pair % PLACES)[:, None] * WIDTH + c[None, :]
    tl.store(at, dq.to(q_grad.dtype.element_ty), inside[:, None] & (c < WIDTH)[None, :])
    at = weights_grad + (batch * queries + query)[:, None] * HEADS + head[None, :]
    tl.store(at, dw, (query < queries)[:, None] & (head < HEADS)[None, :])


@triton.jit
def key_gradient_kernel(
    q,
    keys,
    weights,
    mask,
    grad,
    key_grads,
    queries,
    count,
    parts,
    q_strides,
    key_stride,
    weight_strides,
    mask_strides,
    grad_strides,
    TOKEN: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    PLACES: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    MASK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of a tile of keys from a part of the queries that see it: `key_grads` [B, parts, S, D] float32."""
    PRECISION: tl.constexpr = "ieee" if q.dtype.element_ty == tl.float32 else "tf32"
    tiles = tl.cdiv(count, KEYS)
    at, part = tl.program_id(0) % tiles * KEYS, tl.program_id(0) // tiles % parts
    batch = (tl.program_id(0) // (tiles * parts)).to(tl.int64)
    position, c = at + tl.arange(0, KEYS), tl.arange(0, COLUMNS)
    key = _load_keys(keys, batch, position, position < count, key_stride, TOKEN, WIDTH, COLUMNS)
    blocks, before = tl.cdiv(queries, QUERIES), 0
    if MASK == "causal":  # query t sees keys up to t + count - queries
        before = tl.minimum(tl.maximum(at - (count - queries), 0) // QUERIES, blocks)
    share = tl.cdiv(blocks - before, parts)
    begin = before + part * share
    dk = tl.zeros((KEYS, COLUMNS), tl.float32)
    for block in tl.range(begin, tl.minimum(begin + share, blocks), num_stages=STAGES):
        query = block * QUERIES + tl.arange(0, QUERIES)
        first, end = visible(query, query < queries, batch, queries, count, mask, MASK)
        ds, seen = _load_gradient(
            grad, mask, batch, query, position, first, end, grad_strides, mask_strides, MASK, True
        )
        pairs = load_pairs(q, batch, block * QUERIES, queries, q_strides, HEADS, WIDTH, QUERIES, PLACES, COLUMNS)
        weight = load_weights(weights, batch, query, queries, weight_strides, HEADS, PLACES)
        products = tl.dot(key, pairs.T, input_precision=PRECISION).reshape(KEYS, QUERIES, PLACES)
        products = tl.where(seen[:, :, None], products, 0.0)
        dp = tl.where(products <= 0, 0.0, weight[None, :, :] * ds[:, :, None])
        dp = dp.reshape(KEYS, QUERIES * PLACES).to(pairs.dtype)
        dk = tl.dot(dp, pairs, dk, input_precision=PRECISION)
    row = (batch * parts + part) * count + position
    tl.store(key_grads + row[:, None] * WIDTH + c[None, :], dk, (position < count)[:, None] & (c < WIDTH)[None, :])
