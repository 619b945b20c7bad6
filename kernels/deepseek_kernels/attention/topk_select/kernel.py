"""The selection in Triton: a program holds the scores of a row in its registers and finds the K-th best bit by bit.

It is a radix select with digits of one bit: scores become integers of the same order, and the greatest number that K of
them reach is found from its highest bit on, with a comparison and a sum for each. It ends as soon as a number is
reached by K scores and no more, which for scores that differ takes about 20 of the 32 steps. A histogram of 8-bit
digits has 4 steps only, but costs more than 32 comparisons: a program has no counters of its own to add to.

A row with more keys than a program holds is shared: each program leaves the best K of its keys, in their order, and
another launch selects among these. Of equal scores all of them keep the first ones, and so does the result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..indexer_scores.kernel import visible

_HIGHEST = tl.constexpr(-(2**31))  # the highest bit


@triton.jit
def _key_of(values):
    """float32 -> uint32 of the same order, above 0: -0 equals 0, and NaN equals infinity."""
    values = tl.where(values == values, values, float("inf")) + 0.0
    bits = values.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | _HIGHEST)).to(tl.uint32, bitcast=True)


@triton.jit
def _threshold(keys, top_k):
    """A number that `top_k` keys reach or, of several that as many reach, one; more where keys are equal to it.

    More than `top_k` keys are above 0.
    """
    threshold, step = tl.full((), 0, tl.uint32), tl.full((), 2**31, tl.uint32)
    reached = top_k + 1
    while (step > 0) & (reached != top_k):
        higher = threshold | step
        count = tl.sum((keys >= higher).to(tl.int32), 0)
        enough = count >= top_k
        threshold = tl.where(enough, higher, threshold)
        reached = tl.where(enough, count, reached)
        step = step >> 1
    return threshold


@triton.jit
def _chosen(keys, top_k):
    """Marks the `top_k` best keys, or all above 0; of equal ones the first."""
    chosen = keys > 0
    if tl.sum(chosen.to(tl.int32), 0) > top_k:
        threshold = _threshold(keys, top_k)
        chosen = keys > threshold
        equal = keys == threshold
        room = top_k - tl.sum(chosen.to(tl.int32), 0)
        if tl.sum(equal.to(tl.int32), 0) > room:
            equal = equal & (tl.cumsum(equal.to(tl.int32), 0) <= room)
        chosen = chosen | equal
    return chosen


@triton.jit
def _select(row, indices, seen, begin, end, out, kept, top_k, mask_key, MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the indices of the best of a row's places `begin` to `end - 1`, and to `kept` their scores.

    Returns their number.
    """
    place = begin // 16 * 16 + tl.arange(0, BLOCK)  # aligned, for loads of several values
    inside = (place >= begin) & (place < end)
    index = place
    if indices is not None:
        index = tl.load(indices + place, inside, other=-1)
        inside = inside & (index >= 0)
    if MASK == "dense":
        inside = inside & (tl.load(seen + place.to(tl.int64) * mask_key, inside, other=0) != 0)
    values = tl.load(row + place, inside, other=0.0)
    chosen = _chosen(tl.where(inside, _key_of(values), 0), top_k)
    slots = tl.cumsum(chosen.to(tl.int32), 0)
    tl.store(out + slots - 1, index, chosen)
    if kept is not None:
        tl.store(kept + slots - 1, values, chosen)
    return tl.sum(chosen.to(tl.int32), 0)


@triton.jit
def select_kernel(
    scores,
    indices,
    mask,
    out,
    kept,
    first_row,
    queries,
    count,
    chunk,
    top_k,
    strides,
    mask_strides,
    MASK: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Selects among `chunk` of the `count` keys of a row.

    `strides` are of batch and query. With `indices`, scores are those that other programs have left, and `indices` of
    the same layout are theirs, -1 where there is none; MASK is "none" then. `out` and `kept` have `top_k` places for
    each row and chunk, from `first_row` on.
    """
    batch_stride, query_stride = strides
    mask_batch, mask_query, mask_key = mask_strides
    chunks = tl.cdiv(count, chunk)
    number = first_row + tl.program_id(0) // chunks
    batch, query = (number // queries).to(tl.int64), number % queries
    begin = tl.program_id(0) % chunks * chunk
    end = tl.minimum(begin + chunk, count)
    if MASK != "none":
        first, last = visible(query, True, batch, queries, count, mask, MASK)
        begin, end = tl.maximum(begin, first), tl.minimum(end, last)
    at = batch * batch_stride + query.to(tl.int64) * query_stride
    row = scores + at
    seen = mask
    if MASK == "dense":
        seen += batch * mask_batch + query.to(tl.int64) * mask_query
    if indices is not None:
        indices += at
    place = tl.program_id(0).to(tl.int64) * top_k
    out += place
    if kept is not None:
        kept += place
    # Short rows of a prompt take smaller tiles.
    width = end - begin // 16 * 16
    if BLOCK // 4 >= LEAST and width <= BLOCK // 4:
        total = _select(row, indices, seen, begin, end, out, kept, top_k, mask_key, MASK, BLOCK // 4)
    elif BLOCK // 2 >= LEAST and width <= BLOCK // 2:
        total = _select(row, indices, seen, begin, end, out, kept, top_k, mask_key, MASK, BLOCK // 2)
    else:
        total = _select(row, indices, seen, begin, end, out, kept, top_k, mask_key, MASK, BLOCK)
    if total < top_k:
        slot = tl.arange(0, SLOTS)
        tl.store(out + slot, tl.full((SLOTS,), -1, tl.int32), (slot >= total) & (slot < top_k))
