"""`hadamard_quantize`: the rotation of the indexer's queries, alone and with the quantization behind it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from deepseek_kernels import hadamard, hadamard_quantize

from ..declare import CheckedByReference, Shape
from ..operands import Random
from ..scales import Scale
from ..verify import require_equal


class Rotate(CheckedByReference):
    """Operand: x."""

    name, op = "hadamard_quantize.rotate", "hadamard_quantize"

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        if scale.indexer is None:
            return
        heads, width, _ = scale.indexer
        for label, tokens in (("queries", scale.tokens), ("queries of a decode", scale.decode)):
            yield Shape(f"{scale.name} {label} {tokens * heads}x{width}", {"M": tokens * heads, "D": width})

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        return (random.normal(shape["M"], shape["D"]),)

    def ours(self, x: Tensor) -> Any:
        return hadamard(x)

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        require_equal(got, expected)

    def bytes(self, shape: Shape) -> int:
        return 4 * shape["M"] * shape["D"]


class RotateQuantize(Rotate):
    """The same, to FP8 with scales that are powers of two."""

    name = "hadamard_quantize.fp8"

    def ours(self, x: Tensor) -> Any:
        return hadamard_quantize(x)

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        require_equal(got[0], expected[0], "codes")
        require_equal(got[1], expected[1], "scales")

    def bytes(self, shape: Shape) -> int:
        return shape["M"] * (3 * shape["D"] + 4 * -(-shape["D"] // 128))


OPERATORS = (Rotate(), RotateQuantize())
