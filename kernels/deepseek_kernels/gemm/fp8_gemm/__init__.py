"""`fp8_gemm`: the product of two FP8 matrices with scales in groups of 128 along what is summed over.

The three products of a linear layer `y = x @ w.T`, x [M, K], w [N, K] (V3 report, section 3.3):

- forward: `fp8_gemm(x, x_scale, w, w_scale)`, activations in groups of 1 x 128, the weight in blocks of 128 x 128;
- gradient of x: `fp8_gemm(dy, dy_scale, transposed(w), w_scale.T)`: the blocks stay the same, only the FP8 values move;
- gradient of w: `fp8_gemm(dy_t, dy_t_scale, x_t, x_t_scale, torch.float32)`, both in groups of 1 x 128 *tokens*, from
  `quantize_transposed`.

Sums of 128 products are multiplied by the product of their two scales, which has to be a normal float32, and added in
float32 (TRAPS E8). A NaN makes its row, or column, of the result NaN. The results carry no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from ...common.fp8 import GROUP, HIGH_PRECISION, block_grid
from ...common.host import cdiv
from . import reference
from .reference import dequantize, multiply_into

__all__ = [
    "check_codes",
    "check_result",
    "check_scale",
    "dequantize",
    "fp8_gemm",
    "multiply_into",
    "transposed",
    "unsupported_by_triton",
]

# 8.9: the first with products of e4m3.
dispatch.register("fp8_gemm", "triton", capability=(8, 9))


def fp8_gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Computes `(a * a_scale) @ (b * b_scale).T`, products of 128 terms promoted to float32 and scaled there, rounded
    once.

    Args:
        a: [M, K] float8_e4m3fn.
        a_scale: [M, ceil(K / 128)] float32.
        b: [N, K] float8_e4m3fn.
        b_scale: [ceil(N / 128), ceil(K / 128)] float32 for blocks, or [N, ceil(K / 128)] for rows.
        dtype: of the result: float32, bfloat16 or float16.

    Returns:
        [M, N].

    Raises:
        ValueError: a wrong shape, dtype or device.
    """
    _check(a, a_scale, b, b_scale)
    check_result(dtype, a, a_scale, b, b_scale)
    operands = (a.detach(), a_scale.detach(), b.detach(), b_scale.detach())
    if dispatch.pick("fp8_gemm", a.device, unsupported_by_triton()) == "reference":
        return reference.multiply(*operands, dtype)
    from . import launch

    return launch.multiply(*operands, dtype)


def transposed(codes: Tensor) -> Tensor:
    """Returns the transpose of a matrix of FP8 values, a copy with rows at multiples of 16 bytes.

    Raises:
        ValueError: not a matrix of float8_e4m3fn.
    """
    check_codes("codes [R, C]", codes)
    return reference.transposed(codes)


def _check(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> None:
    check_codes("a [M, K]", a)
    check_codes(f"b [N, {a.shape[1]}]", b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"expected b [N, {a.shape[1]}] beside a {list(a.shape)}, got {list(b.shape)}")
    groups = cdiv(a.shape[1], GROUP)
    check_scale("a_scale", a_scale, [a.shape[0], groups])
    check_scale("b_scale", b_scale, block_grid(b.shape, (GROUP, GROUP)), [b.shape[0], groups])


def check_codes(what: str, codes: Tensor, dimensions: int = 2) -> None:
    """Raises ValueError unless `codes` are FP8 values in so many dimensions."""
    if codes.ndim != dimensions or codes.dtype != torch.float8_e4m3fn:
        raise ValueError(f"expected {what} float8_e4m3fn, got {codes.dtype} {list(codes.shape)}")


def check_scale(name: str, scale: Tensor, *shapes: list[int] | tuple[int, ...]) -> None:
    """Raises ValueError unless `scale` is float32 of one of these shapes."""
    if list(scale.shape) not in [list(shape) for shape in shapes] or scale.dtype != torch.float32:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"expected {name} {expected} float32, got {scale.dtype} {list(scale.shape)}")


def check_result(dtype: torch.dtype, *operands: Tensor) -> None:
    """Raises ValueError for a result in a dtype that no product has, or operands on several devices."""
    if dtype not in HIGH_PRECISION:
        raise ValueError(f"expected dtype float32, bfloat16 or float16, got {dtype}")
    devices = [str(operand.device) for operand in operands]
    if len(set(devices)) > 1:
        raise ValueError(f"expected all operands on one device, got {', '.join(devices)}")


def unsupported_by_triton() -> str | None:
    """Returns the reason why no device of this machine runs the kernels, or None."""
    return "its kernels multiply the FP8 of NVIDIA GPUs" if torch.version.hip else None
