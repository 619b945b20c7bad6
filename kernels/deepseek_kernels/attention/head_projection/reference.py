"""Products with one matrix for each head in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch

__all__ = ["per_head"]


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    """Multiplies x [B, T, N, K] by one matrix for each head, [N, K, M] -> [B, T, N, M].

    In float32 where the CPU has no 16-bit products.
    """
    rows = x.flatten(0, 1).transpose(0, 1)  # [N, B T, K]
    half = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    if half and not dispatch.native_half_matmul(x.dtype):
        out = torch.bmm(rows.float(), weight.float()).to(x.dtype)
    else:
        out = torch.bmm(rows, weight)
    return out.transpose(0, 1).view(*x.shape[:3], weight.shape[2])
