"""`fp8_weight_gemm`: activations of high precision times an FP8 weight that is expanded tile by tile.

FP8 weights run so on devices that do not multiply FP8: the weight stays e4m3, and the extra memory of a
product is a few megabytes, never a copy of the layer. Results are those of the dequantized weight to rounding (W8A16):
nothing quantizes the activations.

The weight that is multiplied, in the product and in its derivative, is `dequantize_blocks(weight, scale, block_size,
dtype)`. Its dtype is float32, but for two cases with 16-bit activations, where it is theirs: on a GPU; and on a CPU
that multiplies 16-bit floats (`dispatch.native_half_matmul`), from 32 rows on, counted for each expert. The products of
16-bit floats are exact in float32, so rounding the weight is the only error there that float32 weights do not have: at
most half a unit in the last place of each element.

On a CPU, one to eight rows of bfloat16 or float32 that need no gradient run in C++, which decodes codes in registers
and multiplies the float32 sums of each block by its scale, or the activations by it.

A NaN of the weight gives NaN wherever the dequantized weight would; FP8 values and scales get no gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import dispatch
from ...common.fp8 import HIGH_PRECISION, block_grid
from . import cpu
from .reference import product as fp8_weight_product

__all__ = ["check_operands", "fp8_weight_gemm", "fp8_weight_grouped_gemm", "fp8_weight_product"]

dispatch.register("fp8_weight_gemm", "cpu")


def fp8_weight_gemm(x: Tensor, weight: Tensor, scale: Tensor, block_size: tuple[int, int] = (128, 128)) -> Tensor:
    """Computes `x @ dequantize_blocks(weight, scale).T` without ever holding the dequantized weight; differentiable in
    x.

    Args:
        x: [..., K] float32, bfloat16 or float16.
        weight: [N, K] float8_e4m3fn.
        scale: [ceil(N / block_rows), ceil(K / block_columns)] float32.

    Returns:
        [..., N] in `x.dtype`, accumulated in float32, rounded once; the dequantized weight's dtype is as above.

    Raises:
        ValueError: a wrong shape or dtype.
    """
    if x.ndim < 1 or weight.ndim != 2:
        raise ValueError(f"expected x [..., K] and weight [N, K], got {list(x.shape)} and {list(weight.shape)}")
    check_operands(x, weight, scale, block_size, 1)
    (x,) = dispatch.autocast(x)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if dispatch.pick("fp8_weight_gemm", x.device) == "cpu" and cpu.takes(rows, weight):
        out = cpu.fp8_weight_gemm(rows, weight, scale, block_size)
        return out.view(*x.shape[:-1], weight.shape[0])
    out = fp8_weight_product(rows, weight[None], scale[None], None, *block_size, 1, False)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def fp8_weight_grouped_gemm(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    ends: Tensor,
    block_size: tuple[int, int] = (128, 128),
    parts: int = 1,
) -> Tensor:
    """Multiplies row block e of `x` by expert e's dequantized weight transposed; differentiable in x.

    Args:
        x: [P, K], rows sorted by expert.
        weight: [E, N, K] float8_e4m3fn.
        scale: [E, parts * ceil(N / parts / block_rows), ceil(K / block_columns)] float32.
        ends: [E] int64, as for `grouped_gemm`; rows from `ends[-1]` on give zeros.
        parts: number of stacked matrices in the N rows, each with a grid of its own: 2 for gate above up.

    Returns:
        [P, N] in `x.dtype`, to the same precision as `fp8_weight_gemm`. Only experts that own rows are read.

    Raises:
        ValueError: a wrong shape or dtype, or parts that do not divide N.
    """
    if x.ndim != 2 or weight.ndim != 3 or ends.shape != weight.shape[:1]:
        raise ValueError(
            f"expected x [P, K], weight [E, N, K] and ends [E], got {list(x.shape)}, {list(weight.shape)} and "
            f"{list(ends.shape)}"
        )
    check_operands(x, weight, scale, block_size, parts)
    dispatch.pick("fp8_weight_gemm", x.device)
    (x,) = dispatch.autocast(x)
    return fp8_weight_product(x, weight, scale, ends, *block_size, parts, False)


def check_operands(x: Tensor, weight: Tensor, scale: Tensor, block_size: tuple[int, int], parts: int) -> None:
    """Raises ValueError unless x [..., K] and scales of a weight [(E,) N, K] fit, in `parts` stacked matrices."""
    if x.dtype not in HIGH_PRECISION or x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"expected x [..., {weight.shape[-1]}] in float32, bfloat16 or float16, got {x.dtype} {list(x.shape)}"
        )
    if weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"expected a float8_e4m3fn weight, got {weight.dtype}")
    if len(block_size) != 2 or min(block_size) < 1:
        raise ValueError(f"expected two positive block sizes, got {block_size}")
    if parts < 1 or weight.shape[-2] % parts:
        raise ValueError(f"expected a number of parts that divides {weight.shape[-2]} rows, got {parts}")
    grid = block_grid(weight.shape, block_size, parts)
    if scale.shape != grid or scale.dtype != torch.float32:
        raise ValueError(
            f"expected float32 scales {list(grid)} for the weight {list(weight.shape)} in blocks of "
            f"{list(block_size)}, got {scale.dtype} {list(scale.shape)}"
        )
