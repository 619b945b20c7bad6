"""Angles of rotary position embeddings, with YaRN; `deepseek_kernels.rope` rotates interleaved pairs by them.

DeepSeek's weights hold each rotary pair side by side: (x0, x1), (x2, x3), ... (TRAPS A1). The rotation keeps that
order, as DeepSeek's own code does; transformers stores the rotated key de-interleaved, which gives the same scores but
other cache contents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..config.argument_types import check_types
from ..config.deepseek_config import DeepseekConfig
from ..config.json_format import rope_type
from ..config.yarn import Yarn

__all__ = ["RotaryEmbedding", "Rotation", "inverse_frequencies", "rotate_first"]


def rotate_first(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates the first R columns of each row, as the indexer of sparse attention does (TRAPS A3).

    Args:
        x: [B, T, D] or [B, T, N, D].
        cos, sin: [B or 1, T, R / 2].
        interleaved: pairs are neighbours (GLM-5) instead of column i and i + R / 2 (DeepSeek-V3.2).

    Returns:
        like x, each pair where it was; products in the dtype of `cos`, rounded once.
    """
    half = cos.shape[-1]
    if x.ndim == 4:
        cos, sin = cos[:, :, None], sin[:, :, None]
    wide, rest = x[..., : 2 * half].to(torch.promote_types(x.dtype, cos.dtype)), x[..., 2 * half :]
    pairs = wide.unflatten(-1, (half, 2)).unbind(-1) if interleaved else wide.chunk(2, dim=-1)
    first, second = pairs[0] * cos - pairs[1] * sin, pairs[0] * sin + pairs[1] * cos
    turned = torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def inverse_frequencies(dim: int, theta: float, yarn: Yarn | None = None, device=None) -> Tensor:
    """Returns the angle per position of each rotary pair, float32 [dim / 2].

    With YaRN (arXiv 2309.00071, section 3.2): pairs with more than `beta_fast` rotations over the original context keep
    their frequency, those with less than `beta_slow` are slowed by `factor`, and a linear ramp lies between.
    """
    pairs = torch.arange(0, dim, 2, dtype=torch.float32, device=device)
    base = 1.0 / (theta ** (pairs / dim))
    if yarn is None:
        return base

    def pair_with(rotations: float) -> float:
        context = yarn.original_max_position_embeddings
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with(yarn.beta_fast), pair_with(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # avoids a division by zero in a ramp of no width
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(0, 1)
    smooth = 1 - ramp  # the official code's order of operations: another one differs by 1 ulp (TRAPS A14)
    return base / yarn.factor * (1 - smooth) + base * smooth


class Rotation:
    """Cosines and sines of positions, which unpack like a tuple of two.

    No tuple, since what wraps a layer casts the tensors among its arguments and in their tuples (FSDP2's mixed
    precision, autocasts of accelerate), and angles in 16 bits turn positions of a long text into each other.

    Attributes:
        cos, sin: float32 [B, T, dim / 2].
    """

    __slots__ = ("cos", "sin")

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos, self.sin = cos, sin

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.cos, self.sin))

    def to(self, device: Any = None, *args: Any, **kwargs: Any) -> Rotation:
        """Returns the same on another device, as accelerate's hooks ask; a dtype is not taken."""
        device = kwargs.get("device", device)
        if device is None or isinstance(device, torch.dtype):
            return self
        return Rotation(self.cos.to(torch.device(device)), self.sin.to(torch.device(device)))


@check_types
class RotaryEmbedding(nn.Module):
    """Cosines and sines of positions.

    It has no buffer: the few frequencies are computed in each call, so that no `.to(bfloat16)`, meta device or partial
    load can change them.

    Args:
        dim: rotary dimension of a head.
        theta: base of the frequencies.
        yarn: its parameters, or None.
        linear: every frequency is divided by it (transformers' "linear" scaling).
        dynamic: (factor, context): for calls whose positions reach beyond `context`, theta grows with the length
            ("dynamic" scaling, NTK-aware). Keys that a cache holds keep the frequencies they were written with.
    """

    def __init__(
        self,
        dim: int,
        theta: float = 10000.0,
        yarn: Yarn | None = None,
        *,
        linear: float = 1.0,
        dynamic: tuple[float, int] | None = None,
    ) -> None:
        super().__init__()
        if dim <= 0 or dim % 2:
            raise ValueError(f"expected a positive even rotary dimension, got {dim}")
        self.dim, self.theta, self.yarn, self.linear, self.dynamic = dim, theta, yarn, linear, dynamic
        self._factor = yarn.cos_sin_factor if yarn else 1.0

    @classmethod
    @check_types
    def from_config(cls, config: DeepseekConfig) -> RotaryEmbedding:
        scaling = config.rope_scaling or {}
        kind, factor = rope_type(scaling), scaling.get("factor", 1.0)
        return cls(
            config.qk_rope_head_dim,
            config.rope_theta,
            config.yarn,
            linear=factor if kind == "linear" else 1.0,
            dynamic=(factor, config.max_position_embeddings) if kind == "dynamic" else None,
        )

    def forward(self, position_ids: Tensor) -> Rotation:
        """Returns cosines and sines of positions [B, T], float32 [B, T, dim / 2] each."""
        frequencies = inverse_frequencies(self.dim, self.theta, self.yarn, position_ids.device) / self.linear
        if self.dynamic is not None:
            frequencies = self._slowed(frequencies, position_ids)
        angles = position_ids[..., None].float() * frequencies
        return Rotation(angles.cos() * self._factor, angles.sin() * self._factor)

    def _slowed(self, frequencies: Tensor, position_ids: Tensor) -> Tensor:
        """Returns the frequencies of theta grown with the length, where that is beyond the trained context."""
        assert self.dynamic is not None
        factor, context = self.dynamic
        length = (position_ids.max() + 1).clamp(min=context)
        growth = (factor * length / context) - (factor - 1)
        pairs = torch.arange(0, self.dim, 2, dtype=torch.float32, device=frequencies.device)
        return frequencies * growth ** (-pairs / (self.dim - 2))

    def extra_repr(self) -> str:
        scaled = f", linear={self.linear}" if self.linear != 1 else ""
        scaled += f", dynamic={self.dynamic}" if self.dynamic is not None else ""
        return f"{self.dim}, theta={self.theta}, yarn={self.yarn}{scaled}"
