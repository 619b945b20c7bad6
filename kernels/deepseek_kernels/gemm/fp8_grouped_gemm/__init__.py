"""`fp8_grouped_gemm`: FP8 products per expert over tokens sorted by expert, and the weights' gradient.

Precision, NaN and gradients are as for `fp8_gemm`. Only experts that own rows are read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from ...common.fp8 import GROUP, block_grid
from ...common.host import cdiv
from ..fp8_gemm import check_codes, check_result, check_scale, unsupported_by_triton
from . import reference

__all__ = ["fp8_grouped_gemm", "fp8_grouped_wgrad"]

# 8.9: the first with products of e4m3.
dispatch.register("fp8_grouped_gemm", "triton", capability=(8, 9))


def fp8_grouped_gemm(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    ends: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    parts: int = 1,
) -> Tensor:
    """Multiplies row block e of `x` by expert e's weight transposed, both FP8, promoted to float32 every 128 terms.

    Args:
        x: [P, K] float8_e4m3fn, rows sorted by expert; x_scale: [P, ceil(K / 128)] float32.
        weight: [E, N, K] float8_e4m3fn, in blocks of 128 x 128.
        weight_scale: [E, parts * ceil(N / parts / 128), ceil(K / 128)] float32.
        ends: [E] int64, nondecreasing; expert e owns rows `ends[e - 1]` to `ends[e] - 1`; rows from `ends[-1]` on
            are unassigned and give zeros.
        parts: number of stacked matrices in the N rows, each with a grid of scales of its own: 2 for gate above up.

    Returns:
        [P, N].

    Raises:
        ValueError: a wrong shape, dtype or device, or parts that do not divide N.

    The input's gradient is the same product with each expert's FP8 values transposed and the scales' last two
    dimensions swapped, where the parts' rows are whole blocks.
    """
    check_codes("x [P, K]", x)
    check_codes(f"weight [E, N, {x.shape[1]}]", weight, dimensions=3)
    if weight.shape[2] != x.shape[1]:
        raise ValueError(f"expected weight [E, N, {x.shape[1]}] beside x {list(x.shape)}, got {list(weight.shape)}")
    if parts < 1 or weight.shape[1] % parts:
        raise ValueError(f"expected a number of parts that divides {weight.shape[1]} rows, got {parts}")
    check_scale("x_scale", x_scale, [x.shape[0], cdiv(x.shape[1], GROUP)])
    check_scale("weight_scale", weight_scale, block_grid(weight.shape, (GROUP, GROUP), parts))
    _check_ends(ends, weight.shape[0])
    check_result(dtype, x, x_scale, weight, weight_scale, ends)
    operands = (tensor.detach() for tensor in (x, x_scale, weight, weight_scale, ends))
    return _implementation(x.device).multiply(*operands, dtype, parts)


def fp8_grouped_wgrad(
    grad_t: Tensor, grad_scale: Tensor, x_t: Tensor, x_scale: Tensor, ends: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Computes the weights' gradient: `grad.T @ x` of each expert's rows.

    Args:
        grad_t: [N, P'] float8_e4m3fn, grad_scale: [N, P' / 128], from `quantize_grouped_transposed(grad, ends)`.
        x_t: [K, P'], x_scale: [K, P' / 128], from `quantize_grouped_transposed(x, ends)`.
        ends: [E] int64, the unpadded ends that both were quantized with.

    Returns:
        [E, N, K]; zeros for experts that own no rows.

    Raises:
        ValueError: a wrong shape, dtype or device.
    """
    check_codes("grad_t [N, P']", grad_t)
    check_codes("x_t [K, P']", x_t)
    columns = grad_t.shape[1]
    if x_t.shape[1] != columns or columns % GROUP:
        raise ValueError(
            f"expected as many columns in grad_t and x_t, a multiple of {GROUP}, got {columns} and {x_t.shape[1]}"
        )
    check_scale("grad_scale", grad_scale, [grad_t.shape[0], columns // GROUP])
    check_scale("x_scale", x_scale, [x_t.shape[0], columns // GROUP])
    _check_ends(ends)
    check_result(dtype, grad_t, grad_scale, x_t, x_scale, ends)
    operands = (tensor.detach() for tensor in (grad_t, grad_scale, x_t, x_scale, ends))
    return _implementation(grad_t.device).weight_gradient(*operands, dtype)


def _check_ends(ends: Tensor, experts: int | None = None) -> None:
    if ends.ndim != 1 or ends.dtype != torch.int64 or ends.shape[0] != (ends.shape[0] if experts is None else experts):
        expected = "E" if experts is None else experts
        raise ValueError(f"expected ends [{expected}] int64, got {ends.dtype} {list(ends.shape)}")


def _implementation(device: torch.device):
    if dispatch.pick("fp8_grouped_gemm", device, unsupported_by_triton()) == "reference":
        return reference
    from . import launch

    return launch
