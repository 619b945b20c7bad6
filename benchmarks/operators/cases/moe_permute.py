"""`moe_permute`: tokens in the order of their experts, the weighted sum on the way back, and its gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deepseek_kernels import permute, sort_by_expert, unpermute

from ..declare import CheckedByReference, Provider, Shape, compiled
from ..fp8_operands import BF16_ROUNDING
from ..goals import Goal
from ..operands import Random, with_gradients
from ..scales import Scale
from ..verify import require_close, require_equal


class Permute(CheckedByReference):
    """Operands: x, order, inverse."""

    name, op = "moe_permute.permute", "moe_permute"

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        goal = Goal("290 us") if scale.name == "v3" else None
        sizes = {"T": scale.tokens, "topk": scale.topk, "H": scale.hidden, "E": scale.config.n_routed_experts or 1}
        yield Shape(f"{scale.name} {scale.tokens}x{scale.hidden}, top-{scale.topk}", sizes, goal, 2)

    def routing(self, shape: Shape, random: Random) -> tuple[Tensor, Tensor]:
        scores = random.normal(shape["T"], shape["E"], dtype=torch.float32)
        order, inverse, _ = sort_by_expert(scores.topk(shape["topk"]).indices, shape["E"])
        return order, inverse

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        return random.normal(shape["T"], shape["H"]), *self.routing(shape, random)

    def ours(self, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return permute(x, order, inverse)

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        return {"index_select": Provider(lambda x, order, inverse: x.index_select(0, order // inverse.shape[1]))}

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        require_equal(got, expected)

    def bytes(self, shape: Shape) -> int:
        rows = shape["T"] * shape["topk"]
        return 2 * shape["H"] * (shape["T"] + rows) + 8 * rows


class Unpermute(Permute):
    """Operands: y, weights, order, inverse."""

    name = "moe_permute.unpermute"

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        routing = self.routing(shape, random)
        weights = random.normal(shape["T"], shape["topk"], dtype=torch.float32).softmax(-1)
        return random.normal(shape["T"] * shape["topk"], shape["H"]), weights, *routing

    def ours(self, y: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return unpermute(y, weights, order, inverse)

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        def weighted_sum(y: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
            return (y[inverse].float() * weights[:, :, None]).sum(1).to(y.dtype)

        return {"weighted sum": Provider(weighted_sum), "compile": compiled(weighted_sum, shape)}

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        # Both are rounded once from float32 sums in any order: some elements differ by one unit.
        require_close(got, expected, BF16_ROUNDING)

    def bytes(self, shape: Shape) -> int:
        return super().bytes(shape) + 4 * shape["T"] * shape["topk"]


class Training(Unpermute):
    """The weighted sum and both of its gradients, through autograd. Operands: those of the sum, and its gradient."""

    name = "moe_permute.training"

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        return (replace(shape, goal=None) for shape in super().shapes(scale))  # goals are those of passes forward

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        y, weights, *routing = super().inputs(shape, random)
        return y.requires_grad_(), weights.requires_grad_(), *routing, random.normal(shape["T"], shape["H"])

    def ours(self, y: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, grad: Tensor) -> Any:
        return with_gradients(unpermute(y, weights, order, inverse), (y, weights), grad)

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        weighted_sum = super().providers(shape)["weighted sum"].call

        def with_both(y: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, grad: Tensor) -> Any:
            return with_gradients(weighted_sum(y, weights, order, inverse), (y, weights), grad)

        return {"weighted sum": Provider(with_both)}

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        for mine, right in zip(got, expected, strict=True):
            require_close(mine, right, BF16_ROUNDING)

    def bytes(self, shape: Shape) -> int:
        """Counts two passes over the rows, the second of which also writes them."""
        return 2 * super().bytes(shape) + 2 * shape["T"] * shape["topk"] * shape["H"]


OPERATORS = (Permute(), Unpermute(), Training())
