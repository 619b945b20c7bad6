"""`topk_gate`: the choice of experts and their weights (KERNELS row 5)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deepseek_kernels import use_backend
from deepseek_kernels.moe.topk_gate import topk_gate

from ..declare import Goal, Operator, Provider, Random, Shape, compiled, require_close, require_equal
from ..scales import Scale, scale

# Of a weight: a sum, a division and a product in float32, some of which a compiler may approximate, each to a few of
# its 24 bits.
_WEIGHT_ERROR = 2.0**-20


class TopkGate(Operator):
    """Operands: scores, the bias or None, and the numbers of the model's routing."""

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
        # V2's routings scale only what they do not normalize (TRAPS C8).
        factor = config.routed_scaling_factor if biased or not normalize else 1.0
        return scores, bias, shape["topk"], *groups, 2 if biased else 1, normalize, factor

    def ours(
        self,
        scores: Tensor,
        bias: Tensor | None,
        top_k: int,
        n_group: int,
        topk_group: int,
        group_best: int,
        normalize: bool,
        factor: float,
    ) -> tuple[Tensor, Tensor]:
        return topk_gate(
            *(scores, bias, top_k),
            n_group=n_group,
            topk_group=topk_group,
            group_best=group_best,
            normalize=normalize,
            factor=factor,
        )

    def expected(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        with use_backend("reference"):
            return self.ours(*inputs)

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        def without_groups(scores: Tensor, bias: Tensor | None, top_k: int, *_: Any) -> tuple[Tensor, Tensor]:
            return torch.topk(scores if bias is None else scores + bias, top_k)

        return {
            "topk without groups": Provider(without_groups, checked=False),  # and without weights
            "eager": Provider(self.expected, devices=("cuda",)),
            "compile": compiled(self.expected, shape),
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
