"""`dense_gemm`: few rows of activations, which a CPU multiplies as fast as it reads the weight, dozens, a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from deepseek_kernels import dense_gemm

from ..declare import Operator, Provider, Shape
from ..fp8_operands import BF16_ROUNDING
from ..operands import Random
from ..scales import Scale
from ..verify import require_close


class Dense(Operator):
    """Operands: x, weight."""

    name = op = "dense_gemm"

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        n, k = 2 * scale.expert, scale.hidden
        for rows in dict.fromkeys((1, 2, 4, 8, 16, 32, scale.prompt)):
            yield Shape(f"{scale.name} gate_up {rows}x{n}x{k}", {"M": rows, "N": n, "K": k}, None, 5)

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        return random.normal(shape["M"], shape["K"]), random.normal(shape["N"], shape["K"])

    def ours(self, x: Tensor, weight: Tensor) -> Tensor:
        return dense_gemm(x, weight)

    def expected(self, x: Tensor, weight: Tensor) -> Tensor:
        return x.float() @ weight.float().T

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        return {"linear": Provider(F.linear)}

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        require_close(got, expected, 2 * BF16_ROUNDING)

    def flops(self, shape: Shape) -> int:
        return 2 * shape["M"] * shape["N"] * shape["K"]

    def bytes(self, shape: Shape) -> int:
        m, n, k = shape["M"], shape["N"], shape["K"]
        return 2 * (m * k + n * k + m * n)


OPERATORS = (Dense(),)
