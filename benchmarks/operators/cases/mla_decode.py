"""`mla_decode`: absorbed attention of one query on a long cache, in bfloat16 or FP8, contiguous or in pages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deepseek_kernels import use_backend
from deepseek_kernels.attention.mla_decode import mla_decode, mla_decode_paged
from deepseek_kernels.attention.packed_latents import pack, packed_bytes, unpack

from ..declare import Operator, Provider, Shape
from ..fp8_operands import BF16_ROUNDING
from ..goals import Goal
from ..operands import Random
from ..scales import Scale
from ..verify import require_close

# Weights and the result are rounded to bfloat16, each once, and so are dequantized keys, which affect the result twice:
# as keys and as values.
_TOLERANCE = 4 * BF16_ROUNDING
_PAGE = 64


class Decode(Operator):
    """Operands: q, the cache, then C and the scale."""

    name, op = "mla_decode.plain", "mla_decode"
    packed = False

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        config, big = scale.config, scale.name in ("v3", "v2-lite", "kimi-k2")
        heads, batch = config.num_attention_heads, 128 if big else scale.decode
        # All heads on one device, or an eighth of them on each of eight devices.
        share = max(1, heads // 8)
        cases = [(batch, heads, 4096 if big else 256, 0), (batch, share, 8192 if big else 512, 0)]
        if scale.name == "v3":
            cases += [(b, heads, 4096, 4) for b in (1, 16)] + [(32, heads, keys, 4) for keys in (1024, 32768)]
        for b, n, keys, priority in dict.fromkeys(cases):
            name = f"{scale.name} b={b} h={n} s={keys}"
            sizes = {"B": b, "N": n, "S": keys, "C": config.kv_lora_rank, "R": config.qk_rope_head_dim}
            goal = self.goals().get((b, n, keys)) if scale.name == "v3" else None
            yield Shape(name, sizes, goal, priority if goal else priority + 2)

    def goals(self) -> Mapping[tuple[int, int, int], Goal]:
        """Returns the goals by batch, heads and keys."""
        return {(128, 128, 4096): Goal("400 TF", "480 TF"), (128, 16, 8192): Goal("3.2 TB/s", "3.7 TB/s")}

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        latent, width = shape["C"], shape["C"] + shape["R"]
        q, states = random.normal(shape["B"], 1, shape["N"], width), random.normal(shape["B"], shape["S"], width)
        if self.packed:
            with use_backend("reference"):
                states = torch.stack([pack(row, latent) for row in states])
        return q, states, latent, width**-0.5

    def ours(self, q: Tensor, states: Tensor, latent: int, scale: float) -> Tensor:
        return mla_decode(q, states, latent, scale)

    def expected(self, q: Tensor, states: Tensor, latent: int, scale: float) -> Tensor:
        """Computes in float32, row by row: a copy of all keys would not fit into memory beside them."""
        return torch.cat([self.exact(*one, latent, scale) for one in zip(q, states, strict=True)])

    def exact(self, q: Tensor, states: Tensor, latent: int, scale: float) -> Tensor:
        keys = _wide(states, latent)
        return ((q[0].float() @ keys.T * scale).softmax(-1) @ keys[:, :latent])[None, None]

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        if self.packed:
            return {}
        return {"sdpa": Provider(_shared), "sdpa, keys a head": Provider(_expanded, devices=("cuda",))}

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        require_close(got, expected, _TOLERANCE)

    def flops(self, shape: Shape) -> int:
        return 2 * shape["B"] * shape["N"] * shape["S"] * (2 * shape["C"] + shape["R"])

    def bytes(self, shape: Shape) -> int:
        latent, rotated = shape["C"], shape["R"]
        token = packed_bytes(latent, rotated) if self.packed else 2 * (latent + rotated)
        return shape["B"] * (shape["S"] * token + 2 * shape["N"] * (2 * latent + rotated))


class DecodePacked(Decode):
    """The same on a cache of FP8 tokens."""

    name, op = "mla_decode.fp8", "mla_decode_fp8"
    packed = True

    def goals(self) -> Mapping[tuple[int, int, int], Goal]:
        return {(128, 16, 8192): Goal("2.2 TB/s", "2.8 TB/s")}


class DecodePaged(Decode):
    """The same on shuffled pages of 64 tokens. Operands: q, pages, table, lengths, then C and the scale."""

    name = "mla_decode.paged"

    def goals(self) -> Mapping[tuple[int, int, int], Goal]:
        return {}

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        q, states, latent, scale = super().inputs(shape, random)
        pages = states.unflatten(1, (-1, _PAGE)).flatten(0, 1)
        order = torch.randperm(len(pages), generator=random.generator, device=pages.device)
        table = order.argsort().view(shape["B"], -1).int()
        lengths = torch.full((shape["B"],), shape["S"], dtype=torch.int32, device=pages.device)
        return q, pages[order], table, lengths, latent, scale

    def ours(self, *inputs: Any) -> Tensor:
        return mla_decode_paged(*inputs)

    def expected(self, *inputs: Any) -> Tensor:
        q, pages, table, _, latent, scale = inputs
        rows = [
            self.exact(one, pages[places].flatten(0, 1), latent, scale) for one, places in zip(q, table, strict=True)
        ]
        return torch.cat(rows)

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        return {}


class DecodePagedPacked(DecodePaged):
    """The same on pages of FP8 tokens."""

    name, op = "mla_decode.paged_fp8", "mla_decode_fp8"
    packed = True


def _wide(states: Tensor, latent: int) -> Tensor:
    return torch.cat(unpack(states, latent, torch.float32), -1) if states.dtype == torch.uint8 else states.float()


def _shared(q: Tensor, states: Tensor, latent: int, scale: float) -> Tensor:
    """The heads as queries of one head."""
    keys = states[:, None]
    out = F.scaled_dot_product_attention(q, keys, keys, scale=scale)  # T = 1 stands where heads would be
    return out[..., :latent]


def _expanded(q: Tensor, states: Tensor, latent: int, scale: float) -> Tensor:
    """One head of keys for all heads of queries."""
    keys = states[:, None]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, keys, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)[..., :latent]


OPERATORS = (Decode(), DecodePacked(), DecodePaged(), DecodePagedPacked())
