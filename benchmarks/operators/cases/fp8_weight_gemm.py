"""`fp8_weight_gemm`: high-precision activations times FP8 weights, expanded tile by tile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deepseek_kernels import dequantize_blocks, fp8_weight_gemm

from ..declare import Operator, Provider, Shape
from ..fp8_operands import BF16_ROUNDING, block_bytes, weights, wide
from ..operands import Random
from ..scales import Scale
from ..verify import require_close


class WeightGemm(Operator):
    """Operands: x, weight, scale, and the weight in bfloat16."""

    name = op = "fp8_weight_gemm"

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        for label, rows in (("one token", 1), ("prompt", scale.prompt)):
            n, k = 2 * scale.expert, scale.hidden
            yield Shape(f"{scale.name} expert gate_up, {label} {rows}x{n}x{k}", {"M": rows, "N": n, "K": k}, None, 4)

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        weight, scale = weights(random, shape["N"], shape["K"])
        return random.normal(shape["M"], shape["K"]), weight, scale, wide(weight, scale, torch.bfloat16)

    def ours(self, x: Tensor, weight: Tensor, scale: Tensor, narrow: Tensor) -> Tensor:
        return fp8_weight_gemm(x, weight, scale)

    def expected(self, x: Tensor, weight: Tensor, scale: Tensor, narrow: Tensor) -> Tensor:
        return x.float() @ wide(weight, scale).T

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        return {
            "dequantized linear": Provider(lambda x, w, s, _: F.linear(x, dequantize_blocks(w, s))),
            # Without scales: a wrong result, in the time of the conversion alone.
            "cast linear": Provider(lambda x, w, s, _: F.linear(x, w.to(x.dtype)), checked=False),
            "bf16 linear": Provider(lambda x, w, s, narrow: F.linear(x, narrow), built_in=False),
        }

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        require_close(got, expected, 2 * BF16_ROUNDING)  # of the result, and of the weight if it is expanded to BF16

    def flops(self, shape: Shape) -> int:
        return 2 * shape["M"] * shape["N"] * shape["K"]

    def bytes(self, shape: Shape) -> int:
        m, n, k = shape["M"], shape["N"], shape["K"]
        return 2 * m * k + block_bytes(n, k) + 2 * m * n


OPERATORS = (WeightGemm(),)
