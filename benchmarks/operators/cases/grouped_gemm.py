"""`grouped_gemm`: the experts' products in bfloat16 (KERNELS row 4b), alone and with both gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deepseek_kernels import grouped_gemm, use_backend

from ..declare import Goal, Operator, Provider, Random, Shape, require_close, swept
from ..fp8_operands import BF16_ROUNDING
from ..scales import Scale

# Sums in float32 of K products, and that Hopper truncates there: well below this for every K here.
_TOLERANCE = BF16_ROUNDING + 1e-4


class Forward(Operator):
    """Operands: x, weight, ends, and the gradient of the result."""

    name, op = "grouped_gemm.forward", "grouped_gemm"
    trains = False

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        rows, n, k = scale.routed, 2 * scale.expert, scale.hidden
        goal = Goal("560 TF", "640 TF") if scale.name == "v3" and not self.trains else None
        sizes = {"P": rows, "E": scale.experts, "N": n, "K": k}
        yield Shape(f"{scale.name} gate_up {rows}x{n}x{k}, {scale.experts} experts", sizes, goal, 2)

    def sweeps(self, scale: Scale) -> Iterable[Shape]:
        """From so many rows that hardly any expert is without one: `bytes` counts the weights of all."""
        n, k = 2 * scale.expert, scale.hidden
        sizes = {"E": scale.experts, "N": n, "K": k}
        name = f"{scale.name} gate_up {n}x{k}, {scale.experts} experts"
        return swept(name, sizes, "P", min(64 * scale.experts, scale.routed // 4), scale.routed)

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        rows, n, k = shape["P"], shape["N"], shape["K"]
        x = random.normal(rows, k).requires_grad_(self.trains)
        weight = random.normal(shape["E"], n, k).requires_grad_(self.trains)
        return x, weight, random.ends(rows, shape["E"]), random.normal(rows, n)

    def ours(self, x: Tensor, weight: Tensor, ends: Tensor, grad: Tensor) -> Any:
        return grouped_gemm(x, weight, ends)

    def theirs(self, x: Tensor, weight: Tensor, ends: Tensor, grad: Tensor) -> Any:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends.int())

    def expected(self, x: Tensor, weight: Tensor, ends: Tensor, grad: Tensor) -> Any:
        """The reference on float32 operands, not rounded."""
        with use_backend("reference"):
            return self.ours(*(_wide(one) for one in (x, weight)), ends, grad.float())

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        return {"grouped_mm": Provider(self.theirs)}

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        for mine, right in zip(_several(got), _several(expected), strict=True):
            require_close(mine, right, _TOLERANCE)

    def flops(self, shape: Shape) -> int:
        return 2 * shape["P"] * shape["N"] * shape["K"]

    def bytes(self, shape: Shape) -> int:
        rows, n, k = shape["P"], shape["N"], shape["K"]
        return 2 * (rows * k + shape["E"] * n * k + rows * n)


class Training(Forward):
    """The product and both of its gradients, through autograd."""

    name = "grouped_gemm.training"
    trains = True

    def ours(self, x: Tensor, weight: Tensor, ends: Tensor, grad: Tensor) -> Any:
        y = grouped_gemm(x, weight, ends)
        return y, *torch.autograd.grad(y, (x, weight), grad)

    def theirs(self, x: Tensor, weight: Tensor, ends: Tensor, grad: Tensor) -> Any:
        y = super().theirs(x, weight, ends, grad)
        return y, *torch.autograd.grad(y, (x, weight), grad)

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        # A CPU without bfloat16 products takes half a minute.
        return {"grouped_mm": Provider(self.theirs, devices=("cuda",))}

    def flops(self, shape: Shape) -> int:
        return 3 * super().flops(shape)

    def bytes(self, shape: Shape) -> int:
        """Each of the three products reads two of its matrices and writes the third."""
        return 3 * super().bytes(shape)


def _wide(x: Tensor) -> Tensor:
    return x.detach().float().requires_grad_(x.requires_grad)


def _several(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


OPERATORS = (Forward(), Training())
