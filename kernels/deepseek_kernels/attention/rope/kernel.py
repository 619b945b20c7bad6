"""The rotation in Triton: a program reads whole rows' rotary columns, and writes them where they are to go.

Neighbouring columns are read and written together and parted into pairs in registers: a thread holds both of a pair.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate_kernel(
    x,
    cos,
    sin,
    out,
    tokens,
    length,
    heads,
    kept,
    x_batch,
    x_token,
    x_head,
    out_batch,
    out_token,
    out_head,
    angle_batch,
    angle_token,
    PAIRS: tl.constexpr,
    BACKWARD: tl.constexpr,
    COPY: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
):
    """`kept` columns come before the pairs, and are copied if COPY. BACKWARD turns the other way."""
    COLUMNS: tl.constexpr = 2 * PAIR_BLOCK
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    batch, step = token // length, token % length
    row_exists = (token < tokens)[:, None, None] & (head < heads)[None, :, None]
    x_row = x + (batch * x_batch + step * x_token)[:, None, None] + (head * x_head)[None, :, None]
    out_row = out + (batch * out_batch + step * out_token)[:, None, None] + (head * out_head)[None, :, None]

    pair = tl.arange(0, PAIR_BLOCK)
    angle = (batch * angle_batch + step * angle_token)[:, None, None] + pair[None, None, :]
    angle_exists = (token < tokens)[:, None, None] & (pair < PAIRS)[None, None, :]
    c = tl.load(cos + angle, angle_exists, other=0.0)  # [TOKENS, 1, PAIR_BLOCK]
    s = tl.load(sin + angle, angle_exists, other=0.0)
    if BACKWARD:
        s = -s

    column = tl.arange(0, COLUMNS)
    inside = row_exists & (column < 2 * PAIRS)[None, None, :]
    at = (kept + column)[None, None, :]
    values = tl.load(x_row + at, inside, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(values, (TOKENS, HEADS, PAIR_BLOCK, 2)))
    turned = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (TOKENS, HEADS, COLUMNS))
    tl.store(out_row + at, turned.to(out.dtype.element_ty), inside)
    if COPY:
        for start in tl.range(0, kept, COLUMNS):
            inside = row_exists & (start + column < kept)[None, None, :]
            at = (start + column)[None, None, :]
            tl.store(out_row + at, tl.load(x_row + at, inside, other=0.0), inside)


# Rotary elements of a program of 128 threads: 64 bytes of bfloat16 in flight for each thread, enough to keep the memory
# busy; 16 bytes where there would not be four programs for each of 132 multiprocessors.
_MANY, _FEW = 4096, 1024
_PROGRAMS = 4 * 132


def _tile(tokens: int, heads: int, pairs: int) -> dict[str, int]:
    """Heads of one token, which share its angles, and tokens where the heads are few."""
    block = triton.next_power_of_2(pairs)
    elements = _MANY if tokens * heads * 2 * pairs >= _PROGRAMS * _MANY else _FEW
    rows = max(1, elements // (2 * block))
    wanted = min(triton.next_power_of_2(heads), rows)
    return {"TOKENS": max(1, rows // wanted), "HEADS": wanted, "PAIR_BLOCK": block}


def _columns_readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, backward: bool, copy: bool) -> None:
    if not x.numel():
        return
    if x.ndim == 3:
        x, out = x[:, :, None], out[:, :, None]
    (batch, length, heads, width), pairs = x.shape, cos.shape[2]
    cos, sin = _columns_readable(cos), _columns_readable(sin)
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    tile, kept = _tile(batch * length, heads, pairs), width - 2 * pairs
    angle_strides = (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1))
    with torch.cuda.device_of(x):
        _rotate_kernel[triton.cdiv(batch * length, tile["TOKENS"]), triton.cdiv(heads, tile["HEADS"])](
            *(x, cos, sin, out, batch * length, length, heads, kept),
            *(*x.stride()[:3], *out.stride()[:3], *angle_strides),
            PAIRS=pairs,
            BACKWARD=backward,
            COPY=copy and kept > 0,
            **tile,
            num_warps=4,
            enable_fp_fusion=False,  # the reference has none
        )


@torch.library.custom_op("deepseek_kernels::rope", mutates_args=())
def _rope(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    out = _new(x, cos, sin, backward)
    _launch(_columns_readable(x), cos, sin, out, backward, copy=True)
    return out


@_rope.register_fake
def _new(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    return x.new_empty(x.shape)


def _remember(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:3])
    ctx.backward = inputs[3]


def _differentiate(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return _rope(grad, *ctx.saved_tensors, not ctx.backward), None, None, None


_rope.register_autograd(_differentiate, setup_context=_remember)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _rope(x, cos, sin, False)


@torch.library.custom_op("deepseek_kernels::rope_", mutates_args=("x",))
def rope_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.stride(-1) == 1:
        _launch(x, cos, sin, x, backward=False, copy=False)
        return
    rotary = x[..., x.shape[-1] - 2 * cos.shape[-1] :]
    packed = rotary.contiguous()
    _launch(packed, cos, sin, packed, backward=False, copy=False)
    rotary.copy_(packed)


@rope_.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    return None


def compile_cases() -> list:
    """Every configuration that is launched, for `deepseek_kernels.testing.compile_gate`."""
    from ...testing.compile_gate import CompileCase

    strides = ["x_batch", "x_token", "x_head", "out_batch", "out_token", "out_head", "angle_batch", "angle_token"]
    integers = dict.fromkeys(["tokens", "length", "heads", "kept", *strides], "i32")
    everywhere = ("sm_90", "sm_80", "sm_100", "gfx942")
    # Tokens, heads, dtype, backward, copy.
    calls = {
        "queries in place": (8192, 128, "bf16", False, False, everywhere),
        "queries": (8192, 128, "bf16", False, True, everywhere),
        "queries backward": (8192, 128, "bf16", True, True, ("sm_90",)),
        "queries of a decode": (64, 128, "bf16", False, False, ("sm_90",)),
        "keys": (8192, 1, "bf16", False, True, everywhere),
        "queries, float32": (8192, 128, "fp32", False, False, ("sm_90",)),
    }
    return [
        CompileCase(
            name=f"{label}, {dtype}" if dtype not in label else label,
            kernel=_rotate_kernel,
            arguments={**dict.fromkeys(["x", "out"], f"*{dtype}"), "cos": "*fp32", "sin": "*fp32", **integers},
            constants={"PAIRS": 32, "BACKWARD": backward, "COPY": copy, **_tile(tokens, heads, 32)},
            num_warps=4,
            aligned=frozenset(["kept", *strides]),
            targets=targets,
            options={"enable_fp_fusion": False},
        )
        for label, (tokens, heads, dtype, backward, copy, targets) in calls.items()
    ]
