"""`sparse_mla`: attention on selected keys, for the last queries of a prompt and for drafts of two tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deepseek_kernels import sparse_mla, use_backend
from deepseek_kernels.attention.packed_latents import pack, packed_bytes

from ..declare import Operator, Provider, Shape
from ..fp8_operands import BF16_ROUNDING
from ..goals import Goal
from ..operands import Random
from ..scales import Scale
from ..verify import require_close

# Weights and the result are rounded to bfloat16, each once, and so are dequantized keys, which affect the result twice:
# as keys and as values.
_TOLERANCE = 4 * BF16_ROUNDING


class Sparse(Operator):
    """Operands: q, states, indices, then C and the scale."""

    name, op = "sparse_mla.plain", "sparse_mla"
    packed = False

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        if scale.indexer is None:
            return
        config, top_k, big = scale.config, scale.indexer[2], scale.name == "v3"
        heads = config.num_attention_heads
        goals = self.goals() if big else (None, None)
        keys = 8192 if big else 8 * scale.tokens
        for label, batch, queries, goal in (
            ("prefill", 1, scale.prompt, goals[0]),
            ("decode", 128 if big else scale.decode, 2, goals[1]),
        ):
            sizes = {"B": batch, "T": queries, "N": heads, "S": keys, "K": top_k}
            sizes |= {"C": config.kv_lora_rank, "R": config.qk_rope_head_dim}
            name = f"{scale.name} {label} b={batch} t={queries} h={heads} s={keys}, top-{top_k}"
            yield Shape(name, sizes, goal, 2 if goal else 5)

    def goals(self) -> tuple[Goal | None, Goal | None]:
        """Returns the goals of a prompt and of decoding."""
        return Goal("320 TF", "420 TF"), None

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        batch, queries, latent, width = shape["B"], shape["T"], shape["C"], shape["C"] + shape["R"]
        q, states = random.normal(batch, queries, shape["N"], width), random.normal(batch, shape["S"], width)
        chosen = random.normal(batch, queries, shape["S"]).topk(shape["K"], dim=-1).indices
        if self.packed:
            with use_backend("reference"):
                states = torch.stack([pack(row, latent) for row in states])
        return q, states, chosen.sort(dim=-1).values.int(), latent, width**-0.5

    def ours(self, *inputs: Any) -> Tensor:
        return sparse_mla(*inputs)

    def expected(self, q: Tensor, states: Tensor, *others: Any) -> Tensor:
        """Computes in float32, without rounding."""
        with use_backend("reference"):
            return sparse_mla(q.float(), states if self.packed else states.float(), *others)

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        def gathered(*inputs: Any) -> Tensor:
            with use_backend("reference"):
                return sparse_mla(*inputs)

        return {"gathered": Provider(gathered, devices=("cuda",))}

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        require_close(got, expected, _TOLERANCE)

    def flops(self, shape: Shape) -> int:
        pairs = shape["B"] * shape["T"] * shape["N"] * shape["K"]
        return 2 * pairs * (2 * shape["C"] + shape["R"])

    def bytes(self, shape: Shape) -> int:
        latent, rotated, queries = shape["C"], shape["R"], shape["B"] * shape["T"]
        token = packed_bytes(latent, rotated) if self.packed else 2 * (latent + rotated)
        # Queries of one row of the batch may select the same keys: at least as many as one of them, at most all.
        keys = shape["B"] * min(shape["S"], shape["T"] * shape["K"])
        return keys * token + queries * (2 * shape["N"] * (2 * latent + rotated) + 4 * shape["K"])


class SparsePacked(Sparse):
    """The same on a cache of FP8 tokens."""

    name, op = "sparse_mla.fp8", "sparse_mla_fp8"
    packed = True

    def goals(self) -> tuple[Goal | None, Goal | None]:
        return None, Goal("220 TF", "250 TF")


OPERATORS = (Sparse(), SparsePacked())
