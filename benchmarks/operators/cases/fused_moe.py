"""`fused_moe`: the routed experts of a layer on one of eight devices, decoding and in a prefill; `grouped_gemm_swiglu`.

Decoding reads every expert once. V3's 32 experts have 1.88 GB of bfloat16 in the first product (437 us at 4.3 TB/s) and
half of that in the second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deepseek_kernels import use_backend
from deepseek_kernels.moe.fused_moe import fused_moe, grouped_gemm_swiglu, reference

from ..declare import Operator, Provider, Shape
from ..fp8_operands import BF16_ROUNDING
from ..operands import Random
from ..scales import Scale
from ..verify import require_close

# The providers round at most gate, up, silu(gate), their product, each row and the sum. In the norm, silu increases a
# relative error by 1.3 at most, and the error of float32 sums is far below a rounding.
_TOLERANCE = 6.3 * BF16_ROUNDING + 1e-4


class Experts(Operator):
    """Operands: x, gate_up, down, expert_ids, weights."""

    name, op = "fused_moe.experts", "fused_moe"

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        experts = max(scale.topk, (scale.config.n_routed_experts or 1) // 8)
        for label, tokens, priority in (("decode", scale.decode, 1), ("prefill", scale.prompt, 2)):
            sizes = {"T": tokens, "topk": scale.topk, "E": experts, "H": scale.hidden, "I": scale.expert}
            name = f"{scale.name} {label} {tokens}x{scale.hidden}, top-{scale.topk} of {experts}x{scale.expert}"
            yield Shape(name, sizes, None, priority)

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        scores = random.normal(shape["T"], shape["E"], dtype=torch.float32)
        weights, ids = scores.softmax(-1).topk(shape["topk"])
        return (
            random.normal(shape["T"], shape["H"]),
            random.normal(shape["E"], 2 * shape["I"], shape["H"]).mul_(shape["H"] ** -0.5),
            random.normal(shape["E"], shape["H"], shape["I"]).mul_(shape["I"] ** -0.5),
            ids,
            weights,
        )

    def ours(self, *inputs: Tensor) -> Tensor:
        return fused_moe(*inputs)

    def expected(self, *inputs: Tensor) -> Tensor:
        """Computes the reference on float32 operands, without rounding."""
        with use_backend("reference"):
            return self.ours(*(one.float() if one.is_floating_point() else one for one in inputs))

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        return {
            "grouped_mm": Provider(_grouped_mm, devices=("cuda",)),
            "loop": Provider(_loop),
            "our operators": Provider(reference.fused_moe, built_in=False, devices=("cuda",)),  # as "reference"
        }

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        require_close(got, expected, _TOLERANCE)

    def flops(self, shape: Shape) -> int:
        return 2 * shape["T"] * shape["topk"] * 3 * shape["I"] * shape["H"]

    def bytes(self, shape: Shape) -> int:
        """Counts the weights of as many experts as the choices can reach."""
        pairs = shape["T"] * shape["topk"]
        matrices = min(shape["E"], pairs) * 3 * shape["I"] * shape["H"]
        return 2 * (matrices + 2 * shape["T"] * shape["H"]) + (8 + 4) * pairs


def _grouped_mm(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    sorted_ids, order = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(sorted_ids, torch.arange(len(gate_up), device=x.device), right=True).int()
    gate, up = F.grouped_mm(x[order // ids.shape[1]], gate_up.mT, offs=ends).chunk(2, -1)
    y = F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends)
    rows = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device)).view_as(ids)
    return (y[rows].float() * weights[:, :, None]).sum(1).to(x.dtype)


def _loop(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in ids.unique().tolist():
        token, choice = (ids == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, -1)
        y = F.linear(F.silu(gate) * up, down[expert])
        out.index_add_(0, token, y.float() * weights[token, choice, None])
    return out.to(x.dtype)


class SwiGLU(Operator):
    """Operands: x, gate_up, ends."""

    name, op = "fused_moe.swiglu", "fused_moe"

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        rows, width, hidden = scale.routed, scale.expert, scale.hidden
        sizes = {"P": rows, "E": scale.experts, "I": width, "H": hidden}
        yield Shape(f"{scale.name} {rows}x2x{width}x{hidden}, {scale.experts} experts", sizes, None, 3)

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        gate_up = random.normal(shape["E"], 2 * shape["I"], shape["H"]).mul_(shape["H"] ** -0.5)
        return random.normal(shape["P"], shape["H"]), gate_up, random.ends(shape["P"], shape["E"])

    def ours(self, x: Tensor, gate_up: Tensor, ends: Tensor) -> Tensor:
        return grouped_gemm_swiglu(x, gate_up, ends)

    def expected(self, x: Tensor, gate_up: Tensor, ends: Tensor) -> Tensor:
        with use_backend("reference"):
            return self.ours(x.float(), gate_up.float(), ends)

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        def grouped_mm(x: Tensor, gate_up: Tensor, ends: Tensor) -> Tensor:
            gate, up = F.grouped_mm(x, gate_up.mT, offs=ends.int()).chunk(2, -1)
            return F.silu(gate) * up

        return {"grouped_mm": Provider(grouped_mm)}

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        require_close(got, expected, _TOLERANCE)

    def flops(self, shape: Shape) -> int:
        return 2 * shape["P"] * 2 * shape["I"] * shape["H"]

    def bytes(self, shape: Shape) -> int:
        rows, width, hidden = shape["P"], shape["I"], shape["H"]
        return 2 * (rows * hidden + shape["E"] * 2 * width * hidden + rows * width)


OPERATORS = (Experts(), SwiGLU())
