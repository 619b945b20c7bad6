"""`indexer_scores`: the lightning indexer of a causal prompt, and of one query on a long cache, in BF16 and in FP8."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from deepseek_kernels import hadamard_quantize, indexer_scores, use_backend
from deepseek_kernels.attention.packed_index_keys import pack_index_keys, packed_index_bytes

from ..declare import CheckedByReference, Shape
from ..fp8_operands import PRODUCT_ERROR
from ..goals import Goal
from ..operands import Random
from ..scales import Scale
from ..verify import require_close, require_equal

# Exact products, and sums of 128 and 64 of them in float32.
_SUM_ERROR = 2.0**-16


class Scores(CheckedByReference):
    """Operands: q, keys, weights."""

    name = op = "indexer_scores"
    fp8 = False
    tolerance = _SUM_ERROR

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        if scale.indexer is None:
            return
        heads, width, _ = scale.indexer
        big, goals = scale.name == "v3", self.goals() if scale.name == "v3" else (None, None)
        decode = (128, 65536) if big else (scale.decode, 8 * scale.tokens)
        for label, batch, queries, keys, goal in (
            ("prefill", 1, scale.tokens, scale.tokens, goals[0]),
            ("decode", decode[0], 1, decode[1], goals[1]),
        ):
            sizes = {"B": batch, "T": queries, "S": keys, "G": heads, "D": width}
            name = f"{scale.name} {label} b={batch} t={queries} s={keys}, {heads}x{width}"
            yield Shape(name, sizes, goal, 2 if goal else 5)

    def goals(self) -> tuple[Goal | None, Goal | None]:
        """Returns the goals of a prompt and of decoding."""
        return None, None

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        batch, queries, keys, heads, width = (shape[size] for size in "BTSGD")
        q, k = random.normal(batch, queries, heads, width), random.normal(batch, keys, width)
        weights = random.normal(batch, queries, heads).float()
        if not self.fp8:
            return q, k, weights
        with use_backend("reference"):
            codes, scale = hadamard_quantize(q.view(-1, width))
            packed = k.new_empty(batch, keys, packed_index_bytes(width)).byte()
            for row, own in zip(packed, k, strict=True):  # one by one: rotations are float32
                row.copy_(pack_index_keys(own))
        return codes.view(q.shape), packed, weights * scale.view(weights.shape)

    def ours(self, q: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
        return indexer_scores(q, keys, weights)

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        unseen = expected.isneginf()
        require_equal(got.isneginf().byte(), unseen.byte(), "keys that are seen")
        require_close(got.masked_fill(unseen, 0), expected.masked_fill(unseen, 0), self.tolerance, "scores")

    def pairs(self, shape: Shape) -> int:
        """Returns the pairs of a query and a key that it sees."""
        return shape["B"] * shape["T"] * (2 * shape["S"] - shape["T"] + 1) // 2

    def flops(self, shape: Shape) -> int:
        return 2 * self.pairs(shape) * shape["G"] * shape["D"]

    def bytes(self, shape: Shape) -> int:
        value, key = (1, packed_index_bytes(shape["D"])) if self.fp8 else (2, 2 * shape["D"])
        queries = shape["B"] * shape["T"] * shape["G"] * (value * shape["D"] + 4)
        return queries + shape["B"] * shape["S"] * key + 4 * self.pairs(shape)


class PlainScores(Scores):
    """BF16 operands."""

    name = "indexer_scores.plain"


class PackedScores(Scores):
    """FP8 queries and packed keys, as DeepSeek runs it."""

    name, op, product = "indexer_scores.fp8", "indexer_scores_fp8", "fp8"
    fp8, tolerance = True, PRODUCT_ERROR

    def goals(self) -> tuple[Goal | None, Goal | None]:
        return Goal("450 TF", "650 TF"), Goal("340 us", "300 us")


OPERATORS: tuple[Scores, ...] = (PlainScores(), PackedScores())
