"""What starts the kernels of `mla_attention`: custom operators, opaque to torch.compile, with fakes for shapes."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...common.scratch import with_scratch
from . import backward as gradients
from . import kernel
from .configs import FORWARD, KEYS, L2_BYTES, PARTIAL_BYTES, QUERIES, SPECIALIZED, Config, block, pick, specializes

__all__ = ["attend", "attend_backward"]

_DELTA_ROWS = 64  # of one program
_RANGE_ROWS = 1024


@torch.library.custom_op("deepseek_kernels::mla_attention", mutates_args=())
def attend(q: Tensor, kv: Tensor, key: Tensor, spans: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The result [B, T, N, V], and the log sums of scores [B, N, T], base 2, infinity where nothing is seen."""
    out, log_sum = _results(q, kv, key, spans, scale)
    if not kv.shape[1]:
        return out.zero_(), log_sum.fill_(float("inf"))
    if not out.numel():
        return out, log_sum
    q, kv, key, spans = _readable(q), _readable(kv), _readable(key), _rows(spans)
    sizes, strides = _sizes(q, kv, key), _strides(q, kv, key)
    specialized = _hopper(q.device) and specializes(q, kv, key, spans)
    config = SPECIALIZED if specialized else pick(FORWARD, q.dtype, _family(q.device))
    pairs, group = q.shape[0] * q.shape[2], _group(kv, key)
    grid = (pairs * _cdiv(q.shape[1], config.rows),)
    numbers = (q.shape[1], kv.shape[1], q.shape[2], pairs, group, scale, *strides)
    with torch.cuda.device_of(q):
        if specialized:
            with_scratch(
                lambda: kernel.specialized_forward_kernel[grid](
                    *(q, kv, key, out, log_sum, *numbers), **sizes, **config.blocks, **config.options
                )
            )
        else:
            arguments = (q, kv, key, spans, out, log_sum, *numbers)
            kernel.forward_kernel[grid](*arguments, **sizes, **_blocks(sizes), **config.blocks, **config.options)
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
    """The gradients of q, kv and key; of what is not needed, an empty tensor."""
    q_grad, kv_grad, key_grad = _gradients(grad, q, kv, key, spans, out, log_sum, scale, need_q, need_keys)
    if not (out.numel() and kv.shape[1]):
        return q_grad.zero_(), kv_grad.zero_(), key_grad.zero_()
    grad, q, kv, key, spans = _readable(grad), _readable(q), _readable(kv), _readable(key), _rows(spans)
    with torch.cuda.device_of(q):
        delta = _delta(out, grad, log_sum)
        if need_q:
            _query_gradient(grad, q, kv, key, spans, log_sum, delta, scale, q_grad)
        if need_keys:
            _key_gradients(grad, q, kv, key, spans, log_sum, delta, scale, kv_grad, key_grad)
    return q_grad, kv_grad, key_grad


def _delta(out: Tensor, grad: Tensor, log_sum: Tensor) -> Tensor:
    delta, width = torch.empty_like(log_sum), out.shape[3]
    gradients.delta_kernel[(log_sum.shape[0] * log_sum.shape[1] * _cdiv(out.shape[1], _DELTA_ROWS),)](
        *(out, grad, delta, out.shape[1], out.shape[2], *grad.stride()[:3]),
        V=width,
        BLOCK_V=block(width),
        ROWS=_DELTA_ROWS,
        num_warps=4,
    )
    return delta


def _query_gradient(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    key: Tensor,
    spans: Tensor | None,
    log_sum: Tensor,
    delta: Tensor,
    scale: float,
    q_grad: Tensor,
) -> None:
    sizes, config = _sizes(q, kv, key), pick(QUERIES, q.dtype, _family(q.device))
    pairs = q.shape[0] * q.shape[2]
    gradients.query_gradient_kernel[(pairs * _cdiv(q.shape[1], config.rows),)](
        *(q, kv, key, spans, grad, log_sum, delta, q_grad, q.shape[1], kv.shape[1], q.shape[2], pairs),
        *(_group(kv, key), scale, *_strides(q, kv, key), *grad.stride()[:3]),
        **sizes,
        **_blocks(sizes),
        **config.blocks,
        **config.options,
    )


def _key_gradients(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    key: Tensor,
    spans: Tensor | None,
    log_sum: Tensor,
    delta: Tensor,
    scale: float,
    kv_grad: Tensor,
    key_grad: Tensor,
) -> None:
    sizes, config = _sizes(q, kv, key), pick(KEYS, q.dtype, _family(q.device))
    batch, queries, heads = q.shape[:3]
    keys, tiles = kv.shape[1], _cdiv(kv.shape[1], config.columns)
    ranges = None if spans is None else _ranges(spans, queries, keys, config)
    total = torch.zeros(key_grad.shape, dtype=torch.float32, device=key.device)
    # Heads at a time, evenly shared out.
    rounds = _cdiv(heads, max(1, PARTIAL_BYTES // (total.numel() * total.element_size())))
    some = _cdiv(heads, rounds)
    for begin in range(0, heads, some):
        some = min(some, heads - begin)
        parts = torch.empty(batch, some, *key_grad.shape[1:], dtype=torch.float32, device=key.device)
        gradients.key_gradient_kernel[(batch * some * tiles,)](
            *(q, kv, key, spans, grad, log_sum, delta, ranges, kv_grad, parts, queries, keys, heads, batch * some),
            *(_group(q, key), begin, some, scale, *_strides(q, kv, key), *grad.stride()[:3]),
            **sizes,
            **_blocks(sizes),
            **config.blocks,
            **config.options,
        )
        total += parts.sum(1)
    key_grad.copy_(total)


def _ranges(spans: Tensor, queries: int, keys: int, config: Config) -> Tensor:
    """Which queries see each tile of keys: [B, tiles, 2] int32. On the device, which nothing waits for."""
    ranges = spans.new_empty(spans.shape[0], _cdiv(keys, config.columns), 2)
    gradients.range_kernel[(ranges.shape[0] * ranges.shape[1],)](
        *(spans, ranges, queries, keys), COLUMNS=config.columns, BLOCK=_RANGE_ROWS, num_warps=4
    )
    return ranges


def _results(q: Tensor, kv: Tensor, key: Tensor, spans: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    batch, queries, heads, width = q.shape
    out = q.new_empty(batch, queries, heads, kv.shape[3] - width + key.shape[2])
    return out, q.new_empty(batch, heads, queries, dtype=torch.float32)


def _gradients(
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
    return (
        q.new_empty(q.shape if need_q else 0),
        kv.new_empty(kv.shape if need_keys else 0),
        key.new_empty(key.shape if need_keys else 0),
    )


def _remember(ctx, inputs, output) -> None:
    q, kv, key, spans, ctx.scale = inputs
    ctx.save_for_backward(q, kv, key, spans, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    need_q, need_kv, need_key, *_ = ctx.needs_input_grad
    q, kv, key, spans, out, log_sum = ctx.saved_tensors
    need_keys = need_kv or need_key
    found = attend_backward(grad, q, kv, key, spans, out, log_sum, ctx.scale, need_q, need_keys)
    return (*(g if need else None for g, need in zip(found, (need_q, need_kv, need_key), strict=True)), None, None)


attend.register_fake(_results)
attend.register_autograd(_differentiate, setup_context=_remember)
attend_backward.register_fake(_gradients)


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(spans: Tensor | None) -> Tensor | None:
    return None if spans is None else spans.contiguous()


def _sizes(q: Tensor, kv: Tensor, key: Tensor) -> dict[str, int]:
    own = q.shape[3] - key.shape[2]
    return {"P": own, "R": key.shape[2], "V": kv.shape[3] - own}


def _blocks(sizes: dict[str, int]) -> dict[str, int]:
    return {f"BLOCK_{name}": block(width) for name, width in sizes.items()}


def _strides(q: Tensor, kv: Tensor, key: Tensor) -> tuple[int, ...]:
    return *q.stride()[:3], *kv.stride()[:3], *key.stride()[:2]


def _group(rows: Tensor, key: Tensor) -> int:
    """Heads whose `rows` [B, S, N, ..] stay in the cache together."""
    return max(1, L2_BYTES // (rows.shape[1] * (rows.shape[3] + key.shape[2]) * rows.element_size()))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def _family(device: torch.device) -> str:
    """Whose configurations run; in the interpreter a Hopper's."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    # 12: a Blackwell without tensor memory, and with less shared memory than any before it.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def _hopper(device: torch.device) -> bool:
    """Whether the specialized kernel runs. The interpreter takes it too."""
    return _family(device) == "sm_90"
