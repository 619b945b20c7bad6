"""`topk_select`: the keys of a causal prompt, and those of one query on a long cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deepseek_kernels import topk_select

from ..declare import CheckedByReference, Provider, Shape
from ..goals import Goal
from ..operands import Random
from ..scales import Scale
from ..verify import require_equal


class Select(CheckedByReference):
    """Operands: scores, and the number of keys to select."""

    name = op = "topk_select"

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        if scale.indexer is None:
            return
        top_k, big = scale.indexer[2], scale.name == "v3"
        decode = (128, 65536) if big else (scale.decode, 8 * scale.tokens)
        for label, batch, queries, keys, goal in (
            ("prefill", 1, scale.tokens, scale.tokens, Goal("300 us", "150 us") if big else None),
            ("decode", *decode[:1], 1, decode[1], None),
        ):
            sizes = {"B": batch, "T": queries, "S": keys, "K": top_k}
            name = f"{scale.name} {label} b={batch} t={queries} s={keys}, top-{top_k}"
            yield Shape(name, sizes, goal, 2 if goal else 5)

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        return random.normal(shape["B"], shape["T"], shape["S"], dtype=torch.float32), shape["K"]

    def ours(self, scores: Tensor, top_k: int) -> Tensor:
        return topk_select(scores, top_k)

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        def without_mask(scores: Tensor, top_k: int) -> Tensor:
            return scores.topk(min(top_k, scores.shape[-1]), dim=-1, sorted=False).indices

        # Without a rule for ties, and without a mask.
        return {"topk without mask": Provider(without_mask, checked=False), **super().providers(shape)}

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        require_equal(got, expected, "indices")

    def bytes(self, shape: Shape) -> int:
        queries = shape["B"] * shape["T"]
        pairs = queries * (2 * shape["S"] - shape["T"] + 1) // 2
        return 4 * pairs + 4 * queries * min(shape["K"], shape["S"])


OPERATORS = (Select(),)
