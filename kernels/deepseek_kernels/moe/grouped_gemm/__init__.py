"""`grouped_gemm`: one product per expert over tokens sorted by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from .reference import grouped_gemm_reference

__all__ = ["grouped_gemm"]

dispatch.register("grouped_gemm", "triton")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def grouped_gemm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiplies row block e of `x` by expert e's weight transposed.

    Args:
        x: [P, K], rows sorted by expert.
        weight: [E, N, K].
        ends: [E] int64, nondecreasing; expert e owns rows `ends[e - 1]` to `ends[e] - 1`; rows from `ends[-1]` on
            are unassigned and give zeros.

    Returns:
        [P, N] in `x.dtype`. Only experts that own rows are read. Gradients of experts that own none are zeros.

    Raises:
        ValueError: the shapes or the dtypes do not fit.
    """
    if x.ndim != 2 or weight.ndim != 3 or ends.ndim != 1:
        raise ValueError(
            f"expected x [P, K], weight [E, N, K], ends [E], got {list(x.shape)}, {list(weight.shape)}, "
            f"{list(ends.shape)}"
        )
    if x.shape[1] != weight.shape[2] or ends.shape[0] != weight.shape[0]:
        raise ValueError(
            f"expected x [P, {weight.shape[2]}] and ends [{weight.shape[0]}] beside weight {list(weight.shape)}, "
            f"got {list(x.shape)} and {list(ends.shape)}"
        )
    x, weight = dispatch.autocast(x, weight)
    if x.dtype != weight.dtype:
        raise ValueError(f"expected x and weight of one dtype, got {x.dtype} and {weight.dtype}")
    unsupported = None if x.dtype in _DTYPES else f"its products are of bfloat16, float16 or float32, got {x.dtype}"
    if dispatch.pick("grouped_gemm", x.device, unsupported) == "reference":
        return grouped_gemm_reference(x, weight, ends)
    from . import launch

    return launch.grouped_gemm(x, weight, ends)
