"""`topk_gate`: the choice of experts and their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deepseek_kernels.moe.topk_gate import topk_gate

from ..declare import CheckedByReference, Provider, Shape
from ..goals import Goal
from ..operands import Random
from ..scales import Scale, scale
from ..verify import require_close, require_equal

# Relative error of a weight: a sum, a division and a product in float32, each of which a compiler may approximate in a
# few of its 24 bits.
_WEIGHT_ERROR = 2.0**-20


class TopkGate(CheckedByReference):
    """Operands: scores, the bias or None, the number of experts per token, and the other options of the routing."""

    name = op = "topk_gate"

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        config = scale.config
        biased = config.topk_method == "noaux_tc"
        sizes = {"E": config.n_routed_experts or 1, "topk": scale.topk, "biased": int(biased)}
        groups = f", {config.topk_group} of {config.n_group} groups" if (config.n_group or 1) > 1 else ""
        goals = (Goal("16 us", "12 us"), Goal("3.5 us", "2.5 us")) if scale.name == "v3" else (None, None)
        for tokens, goal in zip((scale.tokens, scale.decode), goals, strict=True):
            name = f"{scale.name} {tokens}x{sizes['E']}, top-{scale.topk}{groups}"
            yield Shape(name, {"T": tokens, **sizes}, goal, 2 if goal else 5)

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        config, biased = scale(shape.scale).config, bool(shape["biased"])
        logits = random.normal(shape["T"], shape["E"], dtype=torch.float32)
        scores = logits.sigmoid() if biased else logits.softmax(-1)
        bias = random.normal(shape["E"], dtype=torch.float32) / 8 if biased else None
        groups = (1, 1) if config.topk_method == "greedy" else (config.n_group or 1, config.topk_group or 1)
        normalize = config.norm_topk_prob and (biased or shape["topk"] > 1)
        # V2's routings scale only weights that they do not normalize (TRAPS C8).
        factor = config.routed_scaling_factor if biased or not normalize else 1.0
        options = {"n_group": groups[0], "topk_group": groups[1], "group_best": 2 if biased else 1}
        return scores, bias, shape["topk"], options | {"normalize": normalize, "factor": factor}

    def ours(self, scores: Tensor, bias: Tensor | None, top_k: int, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return topk_gate(scores, bias, top_k, **options)

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        def without_groups(scores: Tensor, bias: Tensor | None, top_k: int, *_: Any) -> tuple[Tensor, Tensor]:
            return torch.topk(scores if bias is None else scores + bias, top_k)

        return {
            "topk without groups": Provider(without_groups, checked=False),  # and without weights
            **super().providers(shape),
        }

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        require_equal(got[1], expected[1], "ids")
        if ours:
            require_equal(got[0], expected[0], "weights")
        else:
            require_close(got[0], expected[0], _WEIGHT_ERROR, "weights")

    def bytes(self, shape: Shape) -> int:
        chosen = shape["T"] * shape["topk"]
        return 4 * shape["T"] * shape["E"] + 4 * shape["E"] * shape["biased"] + (4 + 8) * chosen


OPERATORS = (TopkGate(),)
