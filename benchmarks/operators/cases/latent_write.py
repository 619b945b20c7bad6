"""`latent_write`: norm, rotary embedding and write to the cache, fused, against one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deepseek_kernels import use_backend
from deepseek_kernels.attention.latent_write import latent_write
from deepseek_kernels.attention.packed_latents import packed_bytes, unpack

from ..declare import Operator, Provider, Shape
from ..fp8_operands import BF16_ROUNDING, CODES_OFF
from ..operands import Random
from ..scales import Scale
from ..verify import require_close, require_equal

_EPS = 1e-6
_CAPACITY = 256  # slots of each sequence in a decoding batch


class LatentWrite(Operator):
    """Operands: kv, weight, cosines, sines, cache, slots."""

    name, op = "latent_write.values", "latent_write"
    fp8 = False

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        sizes = {"C": scale.config.kv_lora_rank, "R": scale.config.qk_rope_head_dim}
        for label, batch, tokens, slots in (
            ("prefill", 1, scale.tokens, scale.tokens),
            ("decode", scale.decode, 1, _CAPACITY),
        ):
            name = f"{scale.name} {label} {batch}x{tokens}x{scale.latent}"
            yield Shape(name, {"B": batch, "T": tokens, "S": slots, **sizes}, priority=2 if label == "prefill" else 4)

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        batch, tokens, latent, rotated = shape["B"], shape["T"], shape["C"], shape["R"]
        kv, weight = random.normal(batch, tokens, latent + rotated), random.normal(latent)
        angles = random.normal(batch, tokens, rotated // 2, dtype=torch.float32) * 100
        cache = random.normal(batch, shape["S"], latent + rotated)
        if self.fp8:
            cache = random.integers(0, 256, batch, shape["S"], packed_bytes(latent, rotated)).to(torch.uint8)
        # Not the first slots, and each slot once.
        slots = (torch.arange(tokens, device=kv.device) + shape["S"] // 2) % shape["S"]
        return kv, weight, angles.cos(), angles.sin(), cache, slots.repeat(batch, 1)

    def ours(self, kv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
        latent_write(kv, weight, _EPS, cos, sin, cache, slots)
        return cache

    def unfused(self, *inputs: Any) -> Tensor:
        with use_backend("reference"):
            return self.ours(*inputs)

    def expected(self, *inputs: Any) -> Any:
        """Writes to a copy of the cache: the one that providers write to must not be right in advance."""
        *others, cache, slots = inputs
        return self.unfused(*others, cache.clone(), slots), len(inputs[1])

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        return {"unfused": Provider(self.unfused, devices=("cuda",))}

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        right, latent = expected
        if not self.fp8:
            require_equal(got[..., latent:], right[..., latent:], "keys")
            # Reciprocal roots that differ in the last bits round some values to the other side, twice.
            require_close(got[..., :latent], right[..., :latent], 2 * BF16_ROUNDING, "latents")
            return
        (mine, keys), (others, right_keys) = (unpack(cache, latent, torch.float32) for cache in (got, right))
        # Unwritten slots hold random bytes, some of which are NaN; they are the same in both caches.
        require_equal(keys, right_keys, "keys")
        require_close(mine.nan_to_num(), others.nan_to_num(), 2 * BF16_ROUNDING + CODES_OFF, "latents")

    def bytes(self, shape: Shape) -> int:
        width, angles = shape["C"] + shape["R"], 2 * 4 * (shape["R"] // 2)
        written = packed_bytes(shape["C"], shape["R"]) if self.fp8 else 2 * width
        return shape["B"] * shape["T"] * (2 * width + angles + 8 + written) + 2 * shape["C"]


class LatentWriteFP8(LatentWrite):
    """The same into a cache of FP8 tokens."""

    name, op = "latent_write.fp8", "latent_write_fp8"
    fp8 = True


OPERATORS = (LatentWrite(), LatentWriteFP8())
