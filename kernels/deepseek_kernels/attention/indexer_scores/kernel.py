"""Scores of the indexer in Triton: a program holds all heads of some queries and goes over a part of the keys.

Keys are the rows of the product and pairs of a query and a head its columns, so that the sum over heads is one along
columns, which a thread and its three neighbours share. Products of (query, head, key) never leave the registers.

With FP8 operands the tensor cores of Hopper keep 14 bits of a sum of up to 128 products (TRAPS E8), those of one head;
everything behind it is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["scores_kernel", "visible"]

_NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def visible(query, inside, batch, queries, keys, mask, MASK: tl.constexpr):
    """The first key that each query sees, and one past the last; (keys, 0) for one that sees nothing.

    `mask` and MASK are from `common.masks.kernel_arguments`; of a dense mask, all keys are between the two. `inside`
    tells which queries exist.
    """
    if MASK == "spans":
        at = mask + (batch * queries + query) * 2
        first, end = tl.maximum(tl.load(at, inside, other=0), 0), tl.load(at + 1, inside, other=0)
    else:
        first = tl.zeros_like(query)
        end = first + keys
        if MASK == "causal":
            end += query + 1 - queries
    end = tl.minimum(end, keys)
    some = inside & (first < end)
    return tl.where(some, first, keys), tl.where(some, end, 0)


@triton.jit
def load_pairs(
    q, batch, first, queries, strides, HEADS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr,
    PLACES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """All heads of the queries from `first` on, [QUERIES * PLACES, COLUMNS]; zeros for those that do not exist."""
    q_batch, q_token, q_head = strides
    pair, c = tl.arange(0, QUERIES * PLACES), tl.arange(0, COLUMNS)
    query, head = first + pair // PLACES, pair % PLACES
    at = q + batch * q_batch + query.to(tl.int64) * q_token + head * q_head
    inside = ((query < queries) & (head < HEADS))[:, None] & (c < WIDTH)[None, :]
    return tl.load(at[:, None] + c[None, :], inside, other=0.0)


@triton.jit
def load_weights(weights, batch, query, queries, strides, HEADS: tl.constexpr, PLACES: tl.constexpr):
    """Weights [QUERIES, PLACES] of the heads of `query`."""
    weight_batch, weight_token = strides
    head = tl.arange(0, PLACES)
    at = weights + batch * weight_batch + query.to(tl.int64)[:, None] * weight_token + head[None, :]
    return tl.load(at, (query < queries)[:, None] & (head < HEADS)[None, :], other=0.0)


@triton.jit
def scores_kernel(
    q,
    keys,
    scales,
    weights,
    mask,
    out,
    queries,
    count,
    chunk,
    q_strides,
    key_stride,
    weight_strides,
    mask_strides,
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
    """Scores of QUERIES queries with `chunk` of the `count` keys.

    `q_strides` are of batch, token and head, `weight_strides` of batch and token, `key_stride` of batch; TOKEN is that
    of a key: in values, or in bytes where keys are packed, which is where there are `scales`.
    """
    mask_batch, mask_query, mask_key = mask_strides
    chunks, blocks = tl.cdiv(count, chunk), tl.cdiv(queries, QUERIES)
    block = blocks - 1 - tl.program_id(0) // chunks % blocks  # the last queries see most
    batch = (tl.program_id(0) // (chunks * blocks)).to(tl.int64)
    start = tl.program_id(0) % chunks * chunk
    stop = tl.minimum(start + chunk, count)
    PRECISION: tl.constexpr = "ieee" if q.dtype.element_ty == tl.float32 else "tf32"
    query, n, c = block * QUERIES + tl.arange(0, QUERIES), tl.arange(0, KEYS), tl.arange(0, COLUMNS)
    first, end = visible(query, query < queries, batch, queries, count, mask, MASK)
    # Of this program's tiles, those with keys that any of its queries sees.
    tiles = tl.cdiv(stop - start, KEYS)
    begin = tl.minimum(tl.maximum(tl.min(first, 0) - start, 0) // KEYS, tiles)
    until = tl.maximum(begin, tl.minimum(tl.cdiv(tl.maximum(tl.max(end, 0) - start, 0), KEYS), tiles))
    row = out + (batch * queries + query)[None, :] * count
    nothing = tl.full((KEYS, QUERIES), _NOTHING, tl.float32)
    for tile in tl.range(0, begin):
        position = start + tile * KEYS + n
        tl.store(row + position[:, None], nothing, (position < stop)[:, None] & (query < queries)[None, :])
    for tile in tl.range(until, tiles):
        position = start + tile * KEYS + n
        tl.store(row + position[:, None], nothing, (position < stop)[:, None] & (query < queries)[None, :])
    pairs = load_pairs(q, batch, block * QUERIES, queries, q_strides, HEADS, WIDTH, QUERIES, PLACES, COLUMNS)
    exists = (tl.arange(0, PLACES) < HEADS)[None, None, :]
    # Addresses and weights are not kept from tile to tile: with 128 registers two programs share a multiprocessor.
    for tile in tl.range(begin, until, num_stages=STAGES, disable_licm=True):
        at = start + tile * KEYS
        position = at + n
        base = batch * key_stride + at.to(tl.int64) * TOKEN
        # Instead of a key that does not exist, the last one: no mask, which would take registers.
        places = keys + base + tl.minimum(n, count - 1 - at)[:, None] * TOKEN + c[None, :]
        key = tl.load(places, (c < WIDTH)[None, :], other=0.0) if COLUMNS > WIDTH else tl.load(places)
        products = tl.dot(key, pairs.T, input_precision=PRECISION)
        products = tl.maximum(products, 0.0, propagate_nan=tl.PropagateNan.ALL).reshape(KEYS, QUERIES, PLACES)
        if PLACES > HEADS:
            products = tl.where(exists, products, 0.0)  # zeros times an infinite key
        weight = load_weights(weights, batch, query, queries, weight_strides, HEADS, PLACES)
        score = tl.sum(products * weight[None, :, :], 2)
        if scales is not None:
            score *= tl.load(scales + base // 4 + n * (TOKEN // 4), position < count, other=0.0)[:, None]
        seen = (position[:, None] >= first[None, :]) & (position[:, None] < end[None, :])
        if MASK == "dense":
            mask_at = mask + batch * mask_batch + query.to(tl.int64)[None, :] * mask_query
            seen = seen & (tl.load(mask_at + position.to(tl.int64)[:, None] * mask_key, seen, other=0) != 0)
        score = tl.where(seen, score, _NOTHING)
        tl.store(row + position[:, None], score, (position < stop)[:, None] & (query < queries)[None, :])
