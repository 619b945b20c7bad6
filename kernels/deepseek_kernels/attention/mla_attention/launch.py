"""Launches the kernels of `mla_attention`: custom operators, opaque to torch.compile, and their derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...common.descriptors import with_scratch
from ...common.host import cdiv, family, hopper, rows_readable
from . import backward, kernel
from .configs import (
    DELTA_ROWS,
    FORWARD,
    KEYS,
    L2_BYTES,
    PARTIAL_BYTES,
    QUERIES,
    RANGE_ROWS,
    SPECIALIZED,
    Config,
    pick,
    specializes,
)

__all__ = ["attend", "attend_backward"]

Operands = tuple[Tensor, Tensor, Tensor]  # q, kv and key


@torch.library.custom_op("deepseek_kernels::mla_attention", mutates_args=())
def attend(q: Tensor, kv: Tensor, key: Tensor, spans: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Returns the result [B, T, N, V], and the log sums of scores [B, N, T], base 2, infinity where nothing is seen."""
    out, log_sum = _results(q, kv, key, spans, scale)
    if not kv.shape[1]:
        return out.zero_(), log_sum.fill_(float("inf"))
    if not out.numel():
        return out, log_sum
    q, kv, key, spans = rows_readable(q), rows_readable(kv), rows_readable(key), _rows(spans)
    specialized = hopper(q.device) and specializes(q, kv, key, spans)
    config = SPECIALIZED if specialized else pick(FORWARD, q.dtype, family(q.device))
    grid = (q.shape[0] * q.shape[2] * cdiv(q.shape[1], config.rows),)
    operands, sizes = (_strided(q), _strided(kv), _strided(key)), _sizes(q, kv, key)
    numbers = (*_counts(q, kv), q.shape[0] * q.shape[2], _group(kv, key), scale)
    with torch.cuda.device_of(q):
        if specialized:
            run, arguments = kernel.specialized_forward_kernel[grid], (*operands, out, log_sum, *numbers)
            with_scratch(lambda: run(*arguments, SIZES=sizes, **config.options))
        else:
            kernel.forward_kernel[grid](*operands, spans, out, log_sum, *numbers, SIZES=sizes, **config.options)
    return out, log_sum


@torch.library.custom_op("deepseek_kernels::mla_attention_backward", mutates_args=())
def attend_backward(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    key: Tensor,
    spans: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    scale: float,
    need_q: bool,
    need_keys: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, kv and key; an empty tensor in place of one that is not needed."""
    q_grad, kv_grad, key_grad = _gradients(grad, q, kv, key, spans, out, log_sum, scale, need_q, need_keys)
    if not (out.numel() and kv.shape[1]):
        return q_grad.zero_(), kv_grad.zero_(), key_grad.zero_()
    grad, q, kv, key, spans = rows_readable(grad), rows_readable(q), rows_readable(kv), rows_readable(key), _rows(spans)
    with torch.cuda.device_of(q):
        operands, sums = (q, kv, key), (log_sum, _delta(out, grad, log_sum))
        if need_q:
            _query_gradient(operands, spans, grad, sums, scale, q_grad)
        if need_keys:
            _key_gradients(operands, spans, grad, sums, scale, (kv_grad, key_grad))
    return q_grad, kv_grad, key_grad


def _delta(out: Tensor, grad: Tensor, log_sum: Tensor) -> Tensor:
    delta, (batch, queries, heads, width) = torch.empty_like(log_sum), out.shape
    backward.delta_kernel[(batch * heads * cdiv(queries, DELTA_ROWS),)](
        *(out, _strided(grad), delta, queries, heads), V=width, ROWS=DELTA_ROWS, num_warps=4
    )
    return delta


def _query_gradient(
    operands: Operands, spans: Tensor | None, grad: Tensor, sums: tuple[Tensor, Tensor], scale: float, out: Tensor
) -> None:
    q, kv, key = operands
    config = pick(QUERIES, q.dtype, family(q.device))
    pairs = q.shape[0] * q.shape[2]
    backward.query_gradient_kernel[(pairs * cdiv(q.shape[1], config.rows),)](
        *(*map(_strided, operands), spans, _strided(grad), sums, out, *_counts(q, kv), pairs, _group(kv, key), scale),
        SIZES=_sizes(q, kv, key),
        **config.options,
    )


def _key_gradients(
    operands: Operands,
    spans: Tensor | None,
    grad: Tensor,
    sums: tuple[Tensor, Tensor],
    scale: float,
    out: tuple[Tensor, Tensor],
) -> None:
    q, kv, key = operands
    kv_grad, key_grad = out
    config = pick(KEYS, q.dtype, family(q.device))
    batch, queries, heads = q.shape[:3]
    keys, tiles = kv.shape[1], cdiv(kv.shape[1], config.columns)
    ranges = None if spans is None else _ranges(spans, queries, keys, config)
    total = torch.zeros(key_grad.shape, dtype=torch.float32, device=key.device)
    # Some heads at a time, as many in each round.
    rounds = cdiv(heads, max(1, PARTIAL_BYTES // (total.numel() * total.element_size())))
    some = cdiv(heads, rounds)
    for begin in range(0, heads, some):
        some = min(some, heads - begin)
        parts = torch.empty(batch, some, *key_grad.shape[1:], dtype=torch.float32, device=key.device)
        backward.key_gradient_kernel[(batch * some * tiles,)](
            *(*map(_strided, operands), spans, ranges, _strided(grad), sums, kv_grad, parts, *_counts(q, kv)),
            *(batch * some, _group(q, key), begin, some, scale),
            SIZES=_sizes(q, kv, key),
            **config.options,
        )
        total += parts.sum(1)
    key_grad.copy_(total)


def _ranges(spans: Tensor, queries: int, keys: int, config: Config) -> Tensor:
    """Computes the queries that see each tile of keys: [B, tiles, 2] int32. On the device, without waiting for it."""
    ranges = spans.new_empty(spans.shape[0], cdiv(keys, config.columns), 2)
    backward.range_kernel[(ranges.shape[0] * ranges.shape[1],)](
        *(spans, ranges, queries, keys), COLUMNS=config.columns, BLOCK=RANGE_ROWS, num_warps=4
    )
    return ranges


def _results(q: Tensor, kv: Tensor, key: Tensor, spans: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    batch, queries, heads, width = q.shape
    out = q.new_empty(batch, queries, heads, kv.shape[3] - width + key.shape[2])
    return out, q.new_empty(batch, heads, queries, dtype=torch.float32)


def _gradients(grad: Tensor, q: Tensor, kv: Tensor, key: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_q, need_keys = others[-2:]
    return (
        q.new_empty(q.shape if need_q else 0),
        kv.new_empty(kv.shape if need_keys else 0),
        key.new_empty(key.shape if need_keys else 0),
    )


def _save(ctx, inputs, output) -> None:
    q, kv, key, spans, ctx.scale = inputs
    ctx.save_for_backward(q, kv, key, spans, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    need_q, need_kv, need_key, *_ = ctx.needs_input_grad
    q, kv, key, spans, out, log_sum = ctx.saved_tensors
    need_keys = need_kv or need_key
    grads = attend_backward(grad, q, kv, key, spans, out, log_sum, ctx.scale, need_q, need_keys)
    return (*(g if need else None for g, need in zip(grads, (need_q, need_kv, need_key), strict=True)), None, None)


attend.register_fake(_results)
attend.register_autograd(_differentiate, setup_context=_save)
attend_backward.register_fake(_gradients)


def _rows(spans: Tensor | None) -> Tensor | None:
    return None if spans is None else spans.contiguous()


def _sizes(q: Tensor, kv: Tensor, key: Tensor) -> tuple[int, int, int]:
    """Returns P, R and V."""
    own = q.shape[3] - key.shape[2]
    return own, key.shape[2], kv.shape[3] - own


def _counts(q: Tensor, kv: Tensor) -> tuple[int, int, int]:
    """Returns the numbers of queries, keys and heads."""
    return q.shape[1], kv.shape[1], q.shape[2]


def _strided(x: Tensor) -> tuple[Tensor | int, ...]:
    """Returns a tensor as the kernels take it: with all of its strides but the last."""
    return x, *x.stride()[:-1]


def _group(rows: Tensor, key: Tensor) -> int:
    """Returns the number of heads whose `rows` [B, S, N, ..] stay in the cache together."""
    return max(1, L2_BYTES // (rows.shape[1] * (rows.shape[3] + key.shape[2]) * rows.element_size()))
