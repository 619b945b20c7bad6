"""The choice of experts in Triton: a warp holds a token's scores in its registers and takes the best, K times.

Scores are compared as integers of the same order. Of those, a warp finds the largest in one instruction, and the
smallest place that holds it in another. Groups are ranked by counting the groups ahead of each.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOWEST = tl.constexpr(-(2**31))  # below every score: what does not exist or is already taken
_MINUS_INFINITY = tl.constexpr(-(2**31) + 0x7FFFFF)  # the key of -inf
_NAN = tl.constexpr(2**31 - 1)  # the key of every NaN


@triton.jit
def _key_of(values):
    """float32 -> int32 in the order of torch.sort: -0 equals 0, and NaN is larger than anything."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return tl.where(values == values, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), _NAN)


@triton.jit
def _value_of(key):
    """The reverse of `_key_of`."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _best_two(first, second, other_first, other_second):
    """The two best of two pairs, each in order."""
    best = tl.maximum(first, other_first)
    return best, tl.maximum(tl.minimum(first, other_first), tl.maximum(second, other_second))


@triton.jit
def _limit_to_groups(
    keys, TOKENS: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr, GROUP_BLOCK: tl.constexpr
):
    """keys [TOKENS, GROUP_BLOCK * width]: those of all but the KEPT best groups become -inf."""
    grouped = tl.reshape(keys, (TOKENS, GROUP_BLOCK, keys.shape[1] // GROUP_BLOCK))
    if BEST == 1:
        score = tl.max(grouped, 2)  # [TOKENS, GROUP_BLOCK]
    else:
        first, second = tl.reduce((grouped, tl.full(grouped.shape, _LOWEST, tl.int32)), 2, _best_two)
        score = _key_of(_value_of(first) + _value_of(second))
    group = tl.arange(0, GROUP_BLOCK)
    score = tl.where((group < GROUPS)[None, :], score, _LOWEST)
    mine, other = score[:, :, None], score[:, None, :]
    earlier = (group[None, :] < group[:, None])[None, :, :]
    ahead = (other > mine) | ((other == mine) & earlier)
    kept = tl.sum(ahead.to(tl.int32), 2) < KEPT
    limited = tl.where(kept[:, :, None], grouped, tl.minimum(grouped, _MINUS_INFINITY))
    return tl.reshape(limited, keys.shape)


@triton.jit
def gate_kernel(
    scores,
    bias,
    weights,
    ids,
    tokens,
    scores_stride,
    factor,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    BEST: tl.constexpr,
    BIASED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Experts are laid out in places: GROUP_BLOCK * WIDTH of them, powers of two, in the order of their ids."""
    SIZE: tl.constexpr = EXPERTS // GROUPS
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    place = tl.arange(0, GROUP_BLOCK * WIDTH)
    expert = place // WIDTH * SIZE + place % WIDTH
    exists = (place // WIDTH < GROUPS) & (place % WIDTH < SIZE)
    row = scores + token[:, None] * scores_stride
    values = tl.load(row + expert[None, :], (token < tokens)[:, None] & exists[None, :], other=0.0)
    if BIASED:
        values += tl.load(bias + expert, exists, other=0.0)[None, :]
    keys = tl.where(exists[None, :], _key_of(values), _LOWEST)
    if KEPT < GROUPS:
        keys = _limit_to_groups(keys, TOKENS, GROUPS, KEPT, BEST, GROUP_BLOCK)

    slot = tl.arange(0, SLOTS)
    places = tl.zeros((TOKENS, SLOTS), tl.int32)
    for turn in tl.range(TOP_K):
        best = tl.max(keys, 1)
        best_place = tl.min(tl.where(keys == best[:, None], place[None, :], GROUP_BLOCK * WIDTH - 1), 1)
        places = tl.where(slot[None, :] == turn, best_place[:, None], places)
        keys = tl.where(place[None, :] == best_place[:, None], _LOWEST, keys)

    chosen = places // WIDTH * SIZE + places % WIDTH
    inside = (token < tokens)[:, None] & (slot < TOP_K)[None, :]
    weight = tl.load(row + chosen, inside, other=0.0)
    if NORMALIZE:
        total = (tl.sum(weight.to(tl.float64), 1) + 1e-20).to(tl.float32)
        weight = tl.div_rn(weight, tl.broadcast_to(total[:, None], weight.shape))
    at = token[:, None] * TOP_K + slot[None, :]
    tl.store(weights + at, weight * factor, inside)
    tl.store(ids + at, chosen.to(tl.int64), inside)


@triton.jit
def backward_kernel(
    grad,
    scores,
    ids,
    grad_scores,
    tokens,
    scores_stride,
    factor,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Whole rows of the scores' gradient, zero but for the chosen.

    weight_k = factor s_k / total, so d s_k = factor / total (d weight_k - sum_j d weight_j s_j / total).
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    valid, slot, expert = token < tokens, tl.arange(0, SLOTS), tl.arange(0, WIDTH)
    scale = tl.zeros((TOKENS,), tl.float32) + factor
    mean = tl.zeros((TOKENS,), tl.float32)
    if NORMALIZE:
        inside = valid[:, None] & (slot < TOP_K)[None, :]
        at = token[:, None] * TOP_K + slot[None, :]
        chosen = tl.load(ids + at, inside, other=0)
        score = tl.load(scores + token[:, None] * scores_stride + chosen, inside, other=0.0)
        total = tl.sum(score, 1) + 1e-20
        scale = factor / total
        mean = tl.sum(tl.load(grad + at, inside, other=0.0) * score, 1) / total
    out = tl.zeros((TOKENS, WIDTH), tl.float32)
    for turn in tl.range(TOP_K):
        one = token * TOP_K + turn
        expert_id = tl.load(ids + one, valid, other=0).to(tl.int32)
        slope = (tl.load(grad + one, valid, other=0.0) - mean) * scale
        out = tl.where(expert[None, :] == expert_id[:, None], slope[:, None], out)
    inside = valid[:, None] & (expert < EXPERTS)[None, :]
    tl.store(grad_scores + token[:, None] * EXPERTS + expert[None, :], out, inside)
