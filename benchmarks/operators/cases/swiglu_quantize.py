"""`swiglu_quantize`: SwiGLU fused with quantization."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from deepseek_kernels import swiglu_quantize

from ..declare import CheckedByReference, Shape
from ..fp8_operands import CODES_OFF, group_bytes, wide
from ..goals import Goal
from ..operands import Random
from ..scales import Scale
from ..verify import require_close


class SwigluQuantize(CheckedByReference):
    """Operands: gate_up."""

    name = op = "swiglu_quantize"

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        for label, rows, goal in (
            ("expert", scale.tokens, Goal("24 us", "22 us") if scale.name == "v3" else None),
            ("expert of a decode", scale.decode, None),
        ):
            sizes = {"M": rows, "I": scale.expert}
            yield Shape(f"{scale.name} {label} {rows}x2x{scale.expert}", sizes, goal, 2 if goal else 5)

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        return (random.normal(shape["M"], 2 * shape["I"]),)

    def ours(self, gate_up: torch.Tensor) -> Any:
        return swiglu_quantize(gate_up)

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        # Not bit by bit: GPUs and CPUs have different exponential functions.
        require_close(got[1], expected[1], 1e-6, "scales")
        require_close(wide(*got), wide(*expected), CODES_OFF, "quantized values")

    def bytes(self, shape: Shape) -> int:
        return 4 * shape["M"] * shape["I"] + group_bytes(shape["M"], shape["I"])


OPERATORS = (SwigluQuantize(),)
