"""YaRN's parameters, and the factors that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Yarn"]


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN context extension (arXiv 2309.00071) as DeepSeek parametrizes it.

    `mscale` and `mscale_all_dim` scale the cosines and sines by `m(mscale) / m(mscale_all_dim)` and the softmax by
    `m(mscale_all_dim)²`, with `m(c) = 0.1 c ln(factor) + 1`. `attention_factor` overrides the former.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def m(self, coefficient: float | None) -> float:
        if self.factor <= 1 or not coefficient:
            return 1.0
        return 0.1 * coefficient * math.log(self.factor) + 1.0

    @property
    def cos_sin_factor(self) -> float:
        """Factor of cosines and sines; 1.0 for every published file."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.m(self.mscale) / self.m(self.mscale_all_dim)
        return self.m(1.0)

    @property
    def softmax_factor(self) -> float:
        """Factor of `qk_head_dim ** -0.5` in the softmax scale; 1.0 without `mscale_all_dim`."""
        return self.m(self.mscale_all_dim) ** 2
