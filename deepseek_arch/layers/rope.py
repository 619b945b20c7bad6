"""Angles of rotary position embeddings, with YaRN; `deepseek_kernels.rope` rotates interleaved pairs by them.

DeepSeek's weights hold each rotary pair side by side: (x0, x1), (x2, x3), ... (TRAPS A1). The rotation keeps that
order, as DeepSeek's own code does; transformers stores the rotated key de-interleaved, which gives the same scores but
other cache contents.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..config.deepseek_config import DeepseekConfig
from ..config.yarn import Yarn

__all__ = ["RotaryEmbedding", "inverse_frequencies"]


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


class RotaryEmbedding(nn.Module):
    """Cosines and sines of positions.

    It has no buffer: the few frequencies are computed in each call, so that no `.to(bfloat16)`, meta device or partial
    load can change them.
    """

    def __init__(self, dim: int, theta: float = 10000.0, yarn: Yarn | None = None) -> None:
        super().__init__()
        if dim <= 0 or dim % 2:
            raise ValueError(f"expected a positive even rotary dimension, got {dim}")
        self.dim, self.theta, self.yarn = dim, theta, yarn
        self._factor = yarn.cos_sin_factor if yarn else 1.0

    @classmethod
    def from_config(cls, config: DeepseekConfig) -> RotaryEmbedding:
        return cls(config.qk_rope_head_dim, config.rope_theta, config.yarn)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines of positions [B, T], float32 [B, T, dim / 2] each."""
        angles = position_ids[..., None].float() * inverse_frequencies(
            self.dim, self.theta, self.yarn, position_ids.device
        )
        return angles.cos() * self._factor, angles.sin() * self._factor

    def extra_repr(self) -> str:
        return f"{self.dim}, theta={self.theta}, yarn={self.yarn}"
