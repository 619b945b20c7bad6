"""`grouped_gemm`: the products of experts in bfloat16, forward and with both gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from deepseek_kernels import grouped_gemm, use_backend

from ..declare import Operator, Provider, Shape, swept
from ..fp8_operands import BF16_ROUNDING
from ..goals import Goal
from ..operands import Random, as_tuple, widened, with_gradients
from ..scales import Scale
from ..verify import require_close

# Besides the rounding, sums of K products in float32, which Hopper truncates: below 1e-4 for every K here.
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
        """Starts at so many rows that hardly any expert has none: `bytes` counts the weights of all experts."""
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
        """Computes the reference on float32 operands, without rounding."""
        with use_backend("reference"):
            return self.ours(widened(x), widened(weight), ends, grad.float())

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        return {"grouped_mm": Provider(self.theirs)}

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        for mine, right in zip(as_tuple(got), as_tuple(expected), strict=True):
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
        return with_gradients(grouped_gemm(x, weight, ends), (x, weight), grad)

    def theirs(self, x: Tensor, weight: Tensor, ends: Tensor, grad: Tensor) -> Any:
        return with_gradients(super().theirs(x, weight, ends, grad), (x, weight), grad)

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        # A CPU without bfloat16 products takes half a minute.
        return {"grouped_mm": Provider(self.theirs, devices=("cuda",))}

    def flops(self, shape: Shape) -> int:
        return 3 * super().flops(shape)

    def bytes(self, shape: Shape) -> int:
        """Counts three products, each of which reads two of the matrices and writes the third."""
        return 3 * super().bytes(shape)


OPERATORS = (Forward(), Training())
