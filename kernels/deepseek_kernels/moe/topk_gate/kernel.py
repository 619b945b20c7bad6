"""The choice of experts in Triton: a warp holds a token's scores in its registers and takes the best, K times.

Scores are compared as integers of the same order. Of those, a warp finds the largest in one instruction, and the
smallest place that holds it in another. Groups are ranked by counting the groups ahead of each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _best_two(first, second, other_first, other_second):
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
def _gate_kernel(
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
        found = tl.min(tl.where(keys == best[:, None], place[None, :], GROUP_BLOCK * WIDTH - 1), 1)
        places = tl.where(slot[None, :] == turn, found[:, None], places)
        keys = tl.where(place[None, :] == found[:, None], _LOWEST, keys)

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
def _backward_kernel(
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
        found = (tl.load(grad + one, valid, other=0.0) - mean) * scale
        out = tl.where(expert[None, :] == expert_id[:, None], found[:, None], out)
    inside = valid[:, None] & (expert < EXPERTS)[None, :]
    tl.store(grad_scores + token[:, None] * EXPERTS + expert[None, :], out, inside)


# Programs are one warp: reductions then stay inside it and need no barrier. A multiprocessor holds 32 programs, so that
# an H200 has room for about 4096 at once; beyond, each takes two tokens, or several short ones. More would spill.
_MOST_PROGRAMS = 4096


def _tokens(tokens: int, width: int) -> int:
    """How many of them one program serves."""
    return 1 if tokens <= _MOST_PROGRAMS else max(2, 256 // width)


def _places(experts: int, n_group: int, topk_group: int) -> dict[str, int]:
    """Groups matter to the layout only where some are left out."""
    groups = n_group if topk_group < n_group else 1
    blocks = {"GROUP_BLOCK": triton.next_power_of_2(groups), "WIDTH": triton.next_power_of_2(experts // groups)}
    return {"GROUPS": groups, "KEPT": min(topk_group, groups), **blocks}


def _rows_readable(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


@torch.library.custom_op("deepseek_kernels::topk_gate", mutates_args=())
def topk_gate(
    scores: Tensor,
    bias: Tensor | None,
    top_k: int,
    n_group: int,
    topk_group: int,
    group_best: int,
    normalize: bool,
    factor: float,
) -> tuple[Tensor, Tensor]:
    weights, ids = _new(scores, bias, top_k, n_group, topk_group, group_best, normalize, factor)
    tokens, experts = scores.shape
    if not tokens:
        return weights, ids
    scores, places = _rows_readable(scores), _places(experts, n_group, topk_group)
    plain = scores if bias is None else bias.contiguous()
    with torch.cuda.device_of(scores):
        count = _tokens(tokens, places["GROUP_BLOCK"] * places["WIDTH"])
        _gate_kernel[(triton.cdiv(tokens, count),)](
            *(scores, plain, weights, ids, tokens, scores.stride(0), factor),
            EXPERTS=experts,
            TOP_K=top_k,
            BEST=group_best,
            BIASED=bias is not None,
            NORMALIZE=normalize,
            SLOTS=triton.next_power_of_2(top_k),
            **places,
            TOKENS=count,
            num_warps=1,
            enable_fp_fusion=False,  # the reference has none
        )
    return weights, ids


@topk_gate.register_fake
def _new(
    scores: Tensor,
    bias: Tensor | None,
    top_k: int,
    n_group: int,
    topk_group: int,
    group_best: int,
    normalize: bool,
    factor: float,
) -> tuple[Tensor, Tensor]:
    new, shape = scores.new_empty, (scores.shape[0], top_k)
    return new(shape), new(shape, dtype=torch.int64)


@torch.library.custom_op("deepseek_kernels::topk_gate_backward", mutates_args=())
def _backward(grad: Tensor, scores: Tensor, ids: Tensor, normalize: bool, factor: float) -> Tensor:
    grad_scores = _new_gradient(grad, scores, ids, normalize, factor)
    (tokens, experts), top_k = scores.shape, ids.shape[1]
    if not tokens:
        return grad_scores
    grad, scores, width = grad.contiguous(), _rows_readable(scores), triton.next_power_of_2(experts)
    with torch.cuda.device_of(scores):
        count = _tokens(tokens, width)
        _backward_kernel[(triton.cdiv(tokens, count),)](
            *(grad, scores, ids, grad_scores, tokens, scores.stride(0), factor),
            EXPERTS=experts,
            TOP_K=top_k,
            NORMALIZE=normalize,
            WIDTH=width,
            SLOTS=triton.next_power_of_2(top_k),
            TOKENS=count,
            num_warps=1,
        )
    return grad_scores


@_backward.register_fake
def _new_gradient(grad: Tensor, scores: Tensor, ids: Tensor, normalize: bool, factor: float) -> Tensor:
    return scores.new_empty(scores.shape)


def _remember(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.normalize, ctx.factor = inputs[6:]


def _differentiate(ctx, grad: Tensor, _) -> tuple[Tensor | None, ...]:
    scores, ids = ctx.saved_tensors
    return _backward(grad, scores, ids, ctx.normalize, ctx.factor), *[None] * 7


topk_gate.register_autograd(_differentiate, setup_context=_remember)


def compile_cases() -> list:
    """Every configuration that is launched, for `deepseek_kernels.testing.compile_gate`."""
    from ...testing.compile_gate import CompileCase

    everywhere = ("sm_90", "sm_80", "sm_100", "gfx942")
    pointers = {"ids": "*i64", **dict.fromkeys(["scores", "bias", "weights", "grad", "grad_scores"], "*fp32")}
    arguments = pointers | {"tokens": "i32", "scores_stride": "i32", "factor": "fp32"}
    # Experts, choices, groups, groups kept, their best, whether biased.
    models = {
        "V3": (256, 8, 8, 4, 2, True, everywhere),
        "V2": (160, 6, 8, 3, 1, False, ("sm_90",)),
        "V2-Lite": (64, 6, 1, 1, 1, False, ("sm_90",)),
        "Kimi-K2": (384, 8, 1, 1, 1, True, ("sm_90",)),
        "1024 experts": (1024, 16, 1, 1, 1, True, ("sm_90",)),
    }
    cases = []
    for label, (experts, top_k, groups, kept, best, biased, targets) in models.items():
        places = _places(experts, groups, kept)
        common = {"EXPERTS": experts, "TOP_K": top_k, "NORMALIZE": True, "SLOTS": triton.next_power_of_2(top_k)}
        gate = {**common, **places, "BEST": best, "BIASED": biased}
        back = {**common, "WIDTH": triton.next_power_of_2(experts)}
        gate_width = places["GROUP_BLOCK"] * places["WIDTH"]
        for count in (64, 8192):
            for name, kernel, constants, width in (
                ("gate", _gate_kernel, gate, gate_width),
                ("backward", _backward_kernel, back, back["WIDTH"]),
            ):
                cases.append(
                    CompileCase(
                        name=f"{name}, {label}, {count} tokens",
                        kernel=kernel,
                        arguments=arguments,
                        constants={**constants, "TOKENS": _tokens(count, width)},
                        num_warps=1,
                        aligned=frozenset({"scores_stride"}),
                        targets=targets,
                        options={"enable_fp_fusion": False} if kernel is _gate_kernel else {},
                    )
                )
    return cases
