"""Norm, rotation and storing in Triton: a program takes whole tokens and writes each to its slot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...norm.rms_norm.kernel import OPTIONS, inverse_root
from ...quant.fp8_quantize.kernel import encode, scale_of
from ...quant.fp8_quantize.launch import ENOUGH_PROGRAMS, cdiv, rows_readable
from ...quant.fp8_quantize.reference import ACTIVATION_FLOOR, GROUP
from ..mla_decode.packing import views


@dataclass(frozen=True)
class Tile:
    """Tokens of a program, the powers of two that a latent and half a key fit into, and the warps."""

    rows: int
    columns: int
    pairs: int
    num_warps: int


def tile_for(tokens: int, latent: int, rotated: int) -> Tile:
    """16 values of latents a thread; few tokens get a program each."""
    columns, pairs = max(GROUP, triton.next_power_of_2(latent)), triton.next_power_of_2(max(1, rotated // 2))
    rows = max(1, 2048 // columns)
    if cdiv(tokens, rows) < ENOUGH_PROGRAMS:
        rows = 1
    return Tile(rows, columns, pairs, max(1, rows * columns // 512))


@triton.jit
def write_kernel(
    kv,
    weight,
    cos,
    sin,
    slots,
    latents,
    scales,
    keys,
    count,
    tokens,
    latent,
    pairs,
    limit,
    page,
    kv_batch_stride,
    kv_stride,
    cos_batch_stride,
    cos_stride,
    sin_batch_stride,
    sin_stride,
    slots_batch_stride,
    slots_stride,
    out_stride,
    out_slot_stride,
    eps,
    per_column,
    PAGED: tl.constexpr,
    FP8: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAIRS: tl.constexpr,
    GROUP: tl.constexpr,
    FLOOR: tl.constexpr,
):
    """`count` is B * T. `latents`, `scales` and `keys` begin where those of the first slot do; `out` strides are in
    elements of `latents`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sequence, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    slot = tl.load(slots + sequence * slots_batch_stride + token * slots_stride, row < count, other=-1)
    stored = (slot >= 0) & (slot < limit)
    if PAGED:
        place = (slot // page) * out_stride + (slot % page) * out_slot_stride
    else:
        place = sequence * out_stride + slot * out_slot_stride
    source = kv + (sequence * kv_batch_stride + token * kv_stride)[:, None]
    VALUES: tl.constexpr = kv.dtype.element_ty

    column = tl.arange(0, COLUMNS)
    inside = stored[:, None] & (column < latent)[None, :]
    values = tl.load(source + column[None, :], inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, column < latent, other=0.0).to(tl.float32)
    inverse = inverse_root(values, per_column, eps, ROWS, COLUMNS)
    normed = (values * inverse[:, None]).to(VALUES).to(tl.float32)
    normed = (normed * factor[None, :]).to(VALUES)
    if FP8:
        GROUPS: tl.constexpr = COLUMNS // GROUP
        grouped = tl.reshape(normed.to(tl.float32), (ROWS, GROUPS, GROUP))
        scale = scale_of(tl.max(tl.abs(grouped), 2), FLOOR, False)  # [ROWS, GROUPS]
        codes = tl.reshape(encode(grouped, scale[:, :, None], False), (ROWS, COLUMNS))
        tl.store(latents + place[:, None] + column[None, :], codes, inside)
        group = tl.arange(0, GROUPS)
        at = scales + (place // 4)[:, None] + group[None, :]
        tl.store(at, scale, stored[:, None] & (group * GROUP < latent)[None, :])
        place //= 2  # the key's values have two bytes
    else:
        tl.store(latents + place[:, None] + column[None, :], normed.to(latents.dtype.element_ty), inside)

    pair, column = tl.arange(0, PAIRS), tl.arange(0, 2 * PAIRS)
    inside = stored[:, None] & (column < 2 * pairs)[None, :]
    values = tl.load(source + latent + column[None, :], inside, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(values, (ROWS, PAIRS, 2)))
    inside_pair = stored[:, None] & (pair < pairs)[None, :]
    at = (sequence * cos_batch_stride + token * cos_stride)[:, None] + pair[None, :]
    c = tl.load(cos + at, inside_pair, other=0.0)
    at = (sequence * sin_batch_stride + token * sin_stride)[:, None] + pair[None, :]
    s = tl.load(sin + at, inside_pair, other=0.0)
    rotated = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (ROWS, 2 * PAIRS)).to(VALUES)
    tl.store(keys + place[:, None] + column[None, :], rotated.to(keys.dtype.element_ty), inside)


@torch.library.custom_op("deepseek_kernels::latent_write", mutates_args={"buffer"})
def write(
    kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, buffer: Tensor, slots: Tensor, paged: bool
) -> None:
    batch, tokens, width = kv.shape
    if not kv.numel() or not buffer.numel():
        return
    kv, cos, sin, latent = rows_readable(kv), rows_readable(cos), rows_readable(sin), len(weight)
    fp8 = buffer.dtype == torch.uint8
    parts = views(buffer, latent) if fp8 else (buffer, buffer, buffer[..., latent:])
    limit = buffer.shape[1] * (buffer.shape[0] if paged else 1)
    tile = tile_for(batch * tokens, latent, width - latent)
    with torch.cuda.device_of(kv):
        write_kernel[(cdiv(batch * tokens, tile.rows),)](
            *(kv, weight.contiguous(), cos, sin, slots, *parts),
            *(batch * tokens, tokens, latent, (width - latent) // 2, limit, buffer.shape[1]),
            *(*kv.stride()[:2], *_token_strides(cos), *_token_strides(sin), *_token_strides(slots)),
            *(*buffer.stride()[:2], eps, 1.0 / latent),
            PAGED=paged,
            FP8=fp8,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            PAIRS=tile.pairs,
            GROUP=GROUP,
            FLOOR=ACTIVATION_FLOOR,
            num_warps=tile.num_warps,
            **OPTIONS,
        )


@write.register_fake
def _write_nothing(
    kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, buffer: Tensor, slots: Tensor, paged: bool
) -> None:
    return None


def _token_strides(x: Tensor) -> tuple[int, int]:
    """From one row of the batch to the next, none if they all share one, and from one token to the next."""
    return x.stride(0) if x.shape[0] > 1 else 0, x.stride(1)


def compile_cases() -> list:
    """Every configuration that is launched, for `deepseek_kernels.testing.compile_gate`."""
    from ...testing.compile_gate import CompileCase

    integers = ["count", "tokens", "latent", "pairs", "limit", "page"]
    outer = [f"{name}{stride}" for name in ("kv", "cos", "sin", "slots") for stride in ("_batch_stride", "_stride")]
    strides = [*outer, "out_stride", "out_slot_stride"]
    tables = {"cos": "*fp32", "sin": "*fp32", "slots": "*i64", "eps": "fp32", "per_column": "fp32"}
    kinds = [("bf16", False, False), ("bf16", True, False), ("bf16", True, True), ("fp32", True, False)]
    # Numbers that are 1 are constants to the compiler.
    amounts = [("many tokens", 8192, {"slots_stride": 1}), ("few tokens", 64, {"slots_stride": 1})]
    amounts.append(
        ("one token", 1, dict.fromkeys(["slots_stride", "count", "tokens", "slots_batch_stride", "limit"], 1))
    )
    cases = []
    for label, tokens, ones in amounts:
        tile = tile_for(tokens, 512, 64)
        for dtype, fp8, paged in kinds:
            out = {"latents": "*fp8e4nv", "scales": "*fp32", "keys": "*bf16"}
            if not fp8:
                out = dict.fromkeys(out, f"*{dtype}")
            values = dict.fromkeys(["kv", "weight"], f"*{dtype}")
            everywhere = ("sm_90", "sm_100", "gfx942") if fp8 else ("sm_90", "sm_80", "sm_100", "gfx942")
            cases.append(
                CompileCase(
                    name=f"{label}, {dtype}{' to FP8' if fp8 else ''}{', paged' if paged else ''}",
                    kernel=write_kernel,
                    arguments=values | tables | out | dict.fromkeys({*integers, *strides} - {*ones}, "i32"),
                    constants={
                        **{"PAGED": paged, "FP8": fp8, "GROUP": GROUP, "FLOOR": ACTIVATION_FLOOR, **ones},
                        **{"ROWS": tile.rows, "COLUMNS": tile.columns, "PAIRS": tile.pairs},
                    },
                    num_warps=tile.num_warps,
                    aligned=frozenset([*strides, "latent", "pairs"]) - {"slots_batch_stride"},
                    targets=everywhere if dtype == "bf16" and not paged and tokens > 1 else ("sm_90",),
                    options=OPTIONS,
                )
            )
    return cases
