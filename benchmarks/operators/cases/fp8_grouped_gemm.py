"""`fp8_grouped_gemm` and `fp8_grouped_wgrad`: the products of experts in FP8, forward and gradient of the weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deepseek_kernels import fp8_grouped_gemm, fp8_grouped_wgrad, quantize_grouped_transposed, use_backend

from ..declare import Operator, Provider, Shape
from ..fp8_operands import activations, block_bytes, ceil_div, group_bytes, product_tolerance, scaled_mm, weights, wide
from ..goals import Goal
from ..operands import Random
from ..scales import Scale
from ..verify import require_close


class Forward(Operator):
    """Operands: x, x_scale, weight, weight_scale, ends, parts, then x and weight in bfloat16 and `ends` as a tuple."""

    name, op, product = "fp8_grouped_gemm.forward", "fp8_grouped_gemm", "fp8"

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        of_v3 = Goal("800 TF", "1050 TF") if scale.name == "v3" else None
        # Decoding on one of eight devices, with the rows that all of them send to it.
        experts = max(1, (scale.config.n_routed_experts or 8) // 8)
        for label, rows, count, n, k, parts, goal, priority in (
            ("gate_up", scale.routed, scale.experts, 2 * scale.expert, scale.hidden, 2, of_v3, 0),
            ("down", scale.routed, scale.experts, scale.hidden, scale.expert, 1, None, 3),
            ("gate_up decode", scale.decode * scale.topk, experts, 2 * scale.expert, scale.hidden, 2, None, 3),
        ):
            sizes = {"P": rows, "E": count, "N": n, "K": k, "parts": parts}
            yield Shape(f"{scale.name} {label} {rows}x{n}x{k}, {count} experts", sizes, goal, priority)

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        x, x_scale = activations(random, shape["P"], shape["K"])
        weight, scale = weights(random, shape["E"], shape["N"], shape["K"], parts=shape["parts"])
        ends = random.ends(shape["P"], shape["E"])
        narrow = torch.stack([_narrow(*one, shape["parts"]) for one in zip(weight, scale, strict=True)])
        others = wide(x, x_scale, torch.bfloat16), narrow, tuple(ends.tolist())
        return x, x_scale, weight, scale, ends, shape["parts"], *others

    def ours(self, x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, ends: Tensor, parts: int, *others: Any):
        return fp8_grouped_gemm(x, x_scale, weight, scale, ends, parts=parts)

    def expected(self, x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, ends: Tensor, parts: int, *_: Any):
        with use_backend("reference"):
            return fp8_grouped_gemm(x, x_scale, weight, scale, ends, torch.float32, parts)

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        return {
            "scaled_mm loop": Provider(_forward_loop, devices=("cuda",)),
            "bf16 grouped_mm": Provider(_forward_bf16),
        }

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        require_close(got, expected, product_tolerance(torch.bfloat16))

    def flops(self, shape: Shape) -> int:
        return 2 * shape["P"] * shape["N"] * shape["K"]

    def bytes(self, shape: Shape) -> int:
        """Counts the weights of as many experts as the rows can reach."""
        rows, n, k, parts = shape["P"], shape["N"], shape["K"], shape["parts"]
        return group_bytes(rows, k) + min(shape["E"], rows) * parts * block_bytes(n // parts, k) + 2 * rows * n


def _narrow(codes: Tensor, scale: Tensor, parts: int) -> Tensor:
    halves = zip(codes.chunk(parts), scale.chunk(parts), strict=True)
    return torch.cat([wide(*half, torch.bfloat16) for half in halves])


def _forward_loop(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, ends: Tensor, parts: int, _x, _weight, rows: tuple
) -> Tensor:
    out, start = torch.zeros(x.shape[0], weight.shape[1], dtype=torch.bfloat16, device=x.device), 0
    for expert, end in enumerate(rows):
        if end > start:
            rows_of = slice(start, end)
            out[rows_of] = scaled_mm(x[rows_of], x_scale[rows_of], weight[expert], scale[expert])
        start = end
    return out


def _forward_bf16(*inputs: Any) -> Tensor:
    return F.grouped_mm(inputs[6], inputs[7].transpose(1, 2), offs=inputs[4].int())


class WeightGradient(Operator):
    """Operands: grad_t, grad_scale, x_t, x_scale, ends, then grad and x in bfloat16 and `ends` as a tuple."""

    name, op, product = "fp8_grouped_gemm.wgrad", "fp8_grouped_gemm", "fp8"

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        goal = Goal("450 TF", "650 TF") if scale.name == "v3" else None
        rows, n, k = scale.routed, scale.hidden, scale.expert
        sizes = {"P": rows, "E": scale.experts, "N": n, "K": k}
        yield Shape(f"{scale.name} down {n}x{k}x{rows}, {scale.experts} experts", sizes, goal, 1)

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        grad, x = random.normal(shape["P"], shape["N"]), random.normal(shape["P"], shape["K"])
        ends = random.ends(shape["P"], shape["E"])
        with use_backend("reference"):
            operands = *quantize_grouped_transposed(grad, ends), *quantize_grouped_transposed(x, ends)
        return *operands, ends, grad, x, tuple(ends.tolist())

    def ours(self, grad_t: Tensor, grad_scale: Tensor, x_t: Tensor, x_scale: Tensor, ends: Tensor, *others: Any):
        return fp8_grouped_wgrad(grad_t, grad_scale, x_t, x_scale, ends)

    def expected(self, grad_t: Tensor, grad_scale: Tensor, x_t: Tensor, x_scale: Tensor, ends: Tensor, *others: Any):
        with use_backend("reference"):
            return fp8_grouped_wgrad(grad_t, grad_scale, x_t, x_scale, ends)

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        # The operands are not quantized, so that the result differs by the error of quantization.
        bf16 = Provider(lambda *inputs: F.grouped_mm(inputs[5].T, inputs[6], offs=inputs[4].int()), checked=False)
        return {"scaled_mm loop": Provider(_gradient_loop, devices=("cuda",)), "bf16 grouped_mm": bf16}

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        require_close(got, expected, product_tolerance(torch.float32))

    def flops(self, shape: Shape) -> int:
        return 2 * shape["P"] * shape["N"] * shape["K"]

    def bytes(self, shape: Shape) -> int:
        """Leaves out the padding of each expert's rows."""
        rows, n, k = shape["P"], shape["N"], shape["K"]
        return group_bytes(n, rows) + group_bytes(k, rows) + 4 * shape["E"] * n * k


def _gradient_loop(
    grad_t: Tensor, grad_scale: Tensor, x_t: Tensor, x_scale: Tensor, ends: Tensor, _grad, _x, rows: tuple
) -> Tensor:
    out = torch.zeros(len(rows), grad_t.shape[0], x_t.shape[0], dtype=torch.float32, device=grad_t.device)
    first = start = 0
    for expert, end in enumerate(rows):
        groups = ceil_div(end - start)
        if groups:
            columns, scales = slice(first * 128, (first + groups) * 128), slice(first, first + groups)
            operands = grad_t[:, columns], grad_scale[:, scales], x_t[:, columns], x_scale[:, scales]
            out[expert] = scaled_mm(*operands, torch.float32)
        start, first = end, first + groups
    return out


OPERATORS = (Forward(), WeightGradient())
