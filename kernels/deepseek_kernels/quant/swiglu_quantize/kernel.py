"""SwiGLU and quantization in Triton: `fp8_quantize`'s row-wise kernel with two inputs for each value.

By the compile gate, a value takes 29 instructions, which an H200 issues in four fifths of the time that its memory
takes for the value's 5 bytes. So division and exponential are the short ones of the hardware, not exact ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fp8_quantize.kernel import FEW, MANY, encode, scale_of
from ..fp8_quantize.launch import cdiv, rows_readable, tile_for
from ..fp8_quantize.reference import ACTIVATION_FLOOR, GROUP, empty_codes, empty_scales


@triton.jit
def swiglu_kernel(
    gate_up,
    codes,
    scales,
    rows,
    columns,
    gate_up_stride,
    codes_stride,
    scales_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    FLOOR: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    """`columns` are those of the result."""
    GROUPS: tl.constexpr = COLUMNS // GROUP
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = gate_up + row[:, None] * gate_up_stride + column[None, :]
    gate = tl.load(at, inside, other=0.0).to(tl.float32)
    up = tl.load(at + columns, inside, other=0.0).to(tl.float32)
    values = tl.reshape(gate / (1.0 + tl.exp(-gate)) * up, (ROWS, GROUPS, GROUP))
    scale = scale_of(tl.max(tl.abs(values), 2), FLOOR, POWER_OF_TWO)  # [ROWS, GROUPS]
    out = tl.reshape(encode(values, scale[:, :, None], POWER_OF_TWO), (ROWS, COLUMNS))
    tl.store(codes + row[:, None] * codes_stride + column[None, :], out, inside)
    group = tl.program_id(1).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = (row < rows)[:, None] & (group * GROUP < columns)[None, :]
    tl.store(scales + group[None, :] * scales_stride + row[:, None], scale, inside)


@torch.library.custom_op("deepseek_kernels::swiglu_quantize", mutates_args=())
def swiglu_quantize(gate_up: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    codes, scales = _new(gate_up, power_of_two)
    if not codes.numel():
        return codes, scales
    gate_up, (rows, columns) = rows_readable(gate_up), codes.shape
    tile = tile_for(rows, columns)
    with torch.cuda.device_of(gate_up):
        swiglu_kernel[cdiv(rows, tile.rows), cdiv(columns, tile.columns)](
            *(gate_up, codes, scales, rows, columns, gate_up.stride(0), codes.stride(0), scales.stride(1)),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            GROUP=GROUP,
            FLOOR=ACTIVATION_FLOOR,
            POWER_OF_TWO=power_of_two,
            num_warps=tile.num_warps,
        )
    return codes, scales


@swiglu_quantize.register_fake
def _new(gate_up: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    return empty_codes(rows, columns, gate_up.device), empty_scales(rows, cdiv(columns, GROUP), gate_up.device)


def compile_cases() -> list:
    """Every configuration that is launched, for `deepseek_kernels.testing.compile_gate`."""
    from ...testing.compile_gate import CompileCase

    sizes = dict.fromkeys(["rows", "columns", "gate_up_stride", "codes_stride", "scales_stride"], "i32")
    cases = []
    for label, tile in (("many rows", MANY), ("few rows", FEW)):
        for dtype, power_of_two in (("bf16", False), ("bf16", True), ("fp32", False)):
            cases.append(
                CompileCase(
                    name=f"{label}, {dtype}" + (", ue8m0" if power_of_two else ""),
                    kernel=swiglu_kernel,
                    arguments={"gate_up": f"*{dtype}", "codes": "*fp8e4nv", "scales": "*fp32", **sizes},
                    constants={
                        **{"ROWS": tile.rows, "COLUMNS": tile.columns, "GROUP": GROUP},
                        **{"FLOOR": ACTIVATION_FLOOR, "POWER_OF_TWO": power_of_two},
                    },
                    num_warps=tile.num_warps,
                    aligned=frozenset(sizes),
                    targets=("sm_90", "sm_100", "gfx942") if dtype == "bf16" and not power_of_two else ("sm_90",),
                )
            )
    return cases
