"""The rotation of interleaved pairs in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rope", "rope_"]


def _rotated(rotary: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves of each pair, rotated: [..., R] -> twice [..., R / 2] in the dtype of cos."""
    if rotary.ndim == 4:
        cos, sin = cos[:, :, None], sin[:, :, None]  # the same for all heads
    wide = rotary if rotary.dtype == cos.dtype else rotary.to(cos.dtype)
    even, odd = wide[..., ::2], wide[..., 1::2]
    return even * cos - odd * sin, even * sin + odd * cos


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See the operator, without its checks."""
    start = x.shape[-1] - 2 * cos.shape[-1]
    unrotated, rotary = x[..., :start], x[..., start:]
    rotated = torch.stack(_rotated(rotary, cos, sin), dim=-1).flatten(-2).to(x.dtype)
    return torch.cat((unrotated, rotated), dim=-1) if start else rotated


def rope_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See the operator, without its checks."""
    rotary = x[..., x.shape[-1] - 2 * cos.shape[-1] :]
    # Both are computed before either is written: where nothing is cast, they are computed from x itself.
    first, second = _rotated(rotary, cos, sin)
    rotary[..., ::2], rotary[..., 1::2] = first, second
    return x
