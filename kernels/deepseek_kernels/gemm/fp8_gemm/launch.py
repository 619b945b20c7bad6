"""What starts the kernels of `fp8_gemm`: a custom operator, opaque to torch.compile, which has its fake for shapes."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...common.scratch import with_scratch
from ...quant.fp8_quantize.reference import GROUP
from . import kernel
from .configs import BAND, SUM_BLOCK, Config, product_config
from .reference import new_product


@torch.library.custom_op("deepseek_kernels::fp8_gemm", mutates_args=())
def multiply(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    out = new_product(a, a_scale, b, b_scale, dtype)
    if not out.numel():
        return out
    if not a.shape[1]:
        return out.zero_()
    a, b = aligned(a), aligned(b)
    by_rows = b_scale.shape[0] != cdiv(b.shape[0], GROUP)
    config, splits = product_config(*out.shape, a.shape[1], by_rows, hopper(a.device), processors(a.device))
    with torch.cuda.device_of(a):
        if config.specialized:
            _specialized(a, a_scale, b, b_scale, out, by_rows, config)
        elif splits == 1:
            _plain(a, a_scale, b, b_scale, out[None], by_rows, config)
        else:
            parts = torch.empty(splits, *out.shape, dtype=torch.float32, device=a.device)
            _plain(a, a_scale, b, b_scale, parts, by_rows, config)
            kernel.sum_kernel[(cdiv(out.numel(), SUM_BLOCK),)](
                *(parts, out, out.numel()), SPLITS=splits, BLOCK=SUM_BLOCK, num_warps=4
            )
    return out


multiply.register_fake(new_product)


def _specialized(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor, by_rows: bool, config: Config
) -> None:
    programs = min(cdiv(out.shape[0], config.rows) * cdiv(out.shape[1], config.columns), processors(a.device))
    strides = a.stride(0), b.stride(0), *a_scale.stride(), *b_scale.stride()
    arguments = (a, a_scale, b, b_scale, out, *out.shape, a.shape[1], *strides)
    constants = {"GROUP": GROUP, "BAND": BAND, "RIGHT_BLOCK": not by_rows}
    with_scratch(
        lambda: kernel.specialized_kernel[(programs,)](*arguments, **config.blocks, **constants, **config.options)
    )


def _plain(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, parts: Tensor, by_rows: bool, config: Config
) -> None:
    """`parts` [splits, M, N] are to be added."""
    left, left_scale, right, right_scale = (b, b_scale, a, a_scale) if config.swapped else (a, a_scale, b, b_scale)
    out_strides = parts.mT.stride() if config.swapped else parts.stride()
    tiles = cdiv(left.shape[0], config.rows) * cdiv(right.shape[0], config.columns)
    kernel.plain_kernel[tiles, parts.shape[0]](
        *(left, left_scale, right, right_scale, parts, left.shape[0], right.shape[0], a.shape[1]),
        *(left.stride(0), right.stride(0), *left_scale.stride(), *right_scale.stride()),
        *(*out_strides[1:], out_strides[0]),
        GROUP=GROUP,
        BAND=BAND,
        LEFT_BLOCK=config.swapped,
        RIGHT_BLOCK=not by_rows and not config.swapped,
        STAGES=config.num_stages,
        **config.blocks,
        **config.options,
    )


def aligned(codes: Tensor) -> Tensor:
    """Codes as the kernels read them: rows at multiples of 16 bytes, and a multiple of 16 codes long.

    What is not so is copied, zeros behind it: a product reads an operand once for each tile of the other one, and
    without 16-byte loads that costs more than the copy. Published shapes and `quantize_rows` of them need none.
    """
    rows, depth = codes.shape
    whole = cdiv(depth, 16) * 16
    if (
        depth == whole
        and codes.stride(1) == 1
        and codes.stride(0) % 16 == 0
        and codes.stride(0) >= depth
        and codes.data_ptr() % 16 == 0
    ):
        return codes
    out = torch.zeros(rows, whole, dtype=torch.uint8, device=codes.device)
    out[:, :depth] = codes.view(torch.uint8)
    return out.view(codes.dtype)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; in the interpreter so few that a program gets several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def hopper(device: torch.device) -> bool:
    """Whether specialized kernels run. The interpreter takes them too."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9
