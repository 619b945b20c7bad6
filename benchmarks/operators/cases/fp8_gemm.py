"""`fp8_gemm`: forward, both gradients, and the transposition of the weight's codes for the input's gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from deepseek_kernels import fp8_gemm
from deepseek_kernels.gemm.fp8_gemm import transposed

from ..declare import Operator, Provider, Shape, swept
from ..fp8_operands import (
    BF16_ROUNDING,
    activations,
    block_bytes,
    group_bytes,
    product_tolerance,
    scaled_mm,
    tensorwise_mm,
    transposed_activations,
    weights,
    wide,
)
from ..goals import Goal
from ..operands import Random
from ..scales import Scale
from ..verify import require_close, require_equal


class _Product(Operator):
    """Operands: a, a_scale, b, b_scale, then those of other providers: both in bfloat16, and a scale of one."""

    op, product = "fp8_gemm", "fp8"
    dtype: ClassVar[torch.dtype] = torch.bfloat16

    def ours(self, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *others: Tensor) -> Tensor:
        return fp8_gemm(a, a_scale, b, b_scale, self.dtype)

    def expected(self, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *others: Tensor) -> Tensor:
        return wide(a, a_scale) @ wide(b, b_scale).T

    def with_others(self, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> tuple[Any, ...]:
        narrow = wide(a, a_scale, torch.bfloat16), wide(b, b_scale, torch.bfloat16)
        return a, a_scale, b, b_scale, *narrow, torch.ones((), device=a.device)

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        return {
            "scaled_mm": Provider(lambda *inputs: scaled_mm(*inputs[:4], self.dtype), devices=("cuda",)),
            "bf16 mm": Provider(lambda *inputs: F.linear(inputs[4], inputs[5])),
            "tensor-wise": Provider(
                lambda *inputs: tensorwise_mm(inputs[0], inputs[2], inputs[6], self.dtype),
                built_in=False,
                checked=False,
                devices=("cuda",),
            ),
        }

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        # The product in bfloat16 rounds both of its operands as well as the result.
        tolerance = product_tolerance(self.dtype) if ours else product_tolerance(torch.bfloat16) + 2 * BF16_ROUNDING
        require_close(got, expected, tolerance)

    def flops(self, shape: Shape) -> int:
        return 2 * shape["M"] * shape["N"] * shape["K"]


def _shape(scale: Scale, label: str, m: int, n: int, k: int, goal: Goal | None, priority: int) -> Shape:
    of_v3 = goal if scale.name == "v3" else None
    return Shape(f"{scale.name} {label} {m}x{n}x{k}", {"M": m, "N": n, "K": k}, of_v3, priority)


class Blocks(_Product):
    """The weight in blocks: forward, and the gradient of the input with the weight transposed."""

    name = "fp8_gemm.blocks"

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        rows, few, width, c = scale.prompt, scale.decode, scale.hidden, scale.config
        heads = c.num_attention_heads
        for label, m, n, k, goal, priority in (
            ("o_proj", rows, width, scale.attention, Goal("850 TF", "1100 TF"), 0),
            ("expert gate_up", rows, 2 * scale.expert, width, Goal("800 TF", "1000 TF"), 1),
            ("o_proj decode", few, width, scale.attention, Goal("38 us", "34 us"), 1),
            ("o_proj input gradient", rows, scale.attention, width, None, 3),
            ("expert gate_up decode", few, 2 * scale.expert, width, None, 4),
            ("down_proj", rows, width, scale.intermediate, None, 4),
            ("kv_a_proj", rows, scale.latent, width, None, 5),
            ("kv_b_proj", rows, heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank, None, 5),
            # Without a low rank for queries, one projection makes them.
            ("q_b_proj" if c.q_lora_rank else "q_proj", rows, scale.queries, c.q_lora_rank or width, None, 5),
        ):
            yield _shape(scale, label, m, n, k, goal, priority)

    def sweeps(self, scale: Scale) -> Iterable[Shape]:
        n, k = scale.hidden, scale.attention
        return swept(f"{scale.name} o_proj {n}x{k}", {"N": n, "K": k}, "M", 1, scale.tokens)

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        a, b = activations(random, shape["M"], shape["K"]), weights(random, shape["N"], shape["K"])
        return self.with_others(*a, *b)

    def bytes(self, shape: Shape) -> int:
        m, n, k = shape["M"], shape["N"], shape["K"]
        return group_bytes(m, k) + block_bytes(n, k) + 2 * m * n


class WeightGradient(_Product):
    """Both operands in groups of tokens, the sum over tokens kept in float32."""

    name, dtype = "fp8_gemm.wgrad", torch.float32

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        for label, m, n, k, goal, priority in (
            ("gate_proj", scale.intermediate, scale.hidden, scale.tokens, Goal("650 TF", "850 TF"), 1),
            ("o_proj", scale.hidden, scale.attention, scale.prompt, None, 4),
        ):
            yield _shape(scale, label, m, n, k, goal, priority)

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        a = transposed_activations(random, shape["K"], shape["M"])
        return self.with_others(*a, *transposed_activations(random, shape["K"], shape["N"]))

    def bytes(self, shape: Shape) -> int:
        m, n, k = shape["M"], shape["N"], shape["K"]
        return group_bytes(m, k) + group_bytes(n, k) + 4 * m * n


class Transposed(Operator):
    name, op = "fp8_gemm.transposed", "fp8_gemm"

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        rows, columns = scale.hidden, scale.attention
        yield Shape(f"{scale.name} o_proj {rows}x{columns}", {"R": rows, "C": columns})

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        return (weights(random, shape["R"], shape["C"])[0],)

    def ours(self, codes: Tensor) -> Tensor:
        return transposed(codes)

    def expected(self, codes: Tensor) -> Tensor:
        return codes.view(torch.uint8).T.contiguous().view(codes.dtype)

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        return {"contiguous": Provider(self.expected)}

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        require_equal(got, expected)

    def bytes(self, shape: Shape) -> int:
        return 2 * shape["R"] * shape["C"]


OPERATORS = (Blocks(), WeightGradient(), Transposed())
