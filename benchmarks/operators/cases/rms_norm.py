"""`rms_norm`: the norm, its gradients, and the norm fused with a residual sum and quantization."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from deepseek_kernels.norm.rms_norm import add_rms_norm_quantize, rms_norm

from ..declare import CheckedByReference, Provider, Shape, compiled, swept
from ..fp8_operands import BF16_ROUNDING, CODES_OFF, group_bytes, wide
from ..goals import Goal
from ..operands import Random, with_gradients
from ..scales import Scale
from ..verify import require_close, require_equal

_EPS = 1e-6
# Reciprocal roots that differ in the last bits round some values to the other side, once in x's dtype and once after
# the weight: those differ by a unit each, and in the norm all of them by half a unit at most.
_TOLERANCE = 2 * BF16_ROUNDING


class Forward(CheckedByReference):
    """Operands: x, weight."""

    name, op = "rms_norm.forward", "rms_norm"

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        for label, width in _widths(scale).items():
            goal = Goal("62 us", "59 us") if (scale.name, label) == ("v3", "hidden") else None
            name = f"{scale.name} {label} {scale.tokens}x{width}"
            yield Shape(name, {"M": scale.tokens, "H": width}, goal, 1 if goal else 5)
        sizes = {"M": scale.decode, "H": scale.hidden}
        yield Shape(f"{scale.name} decode {scale.decode}x{scale.hidden}", sizes, priority=5)

    def sweeps(self, scale: Scale) -> Iterable[Shape]:
        return swept(f"{scale.name} tokens of {scale.hidden}", {"H": scale.hidden}, "M", 1, scale.tokens)

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        return random.normal(shape["M"], shape["H"]), random.normal(shape["H"])

    def ours(self, x: Tensor, weight: Tensor) -> Any:
        return rms_norm(x, weight, _EPS)

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        def built_in(x: Tensor, weight: Tensor) -> Tensor:
            return F.rms_norm(x, (x.shape[-1],), weight, _EPS)

        # It rounds only once, after the weight, which the tolerance allows.
        return {"rms_norm": Provider(built_in), "compile": compiled(self.expected, shape)}

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        require_close(got, expected, _TOLERANCE)

    def bytes(self, shape: Shape) -> int:
        return 2 * shape["H"] * (2 * shape["M"] + 1)


class Training(Forward):
    """The norm and both gradients, through autograd. Operands: x, weight, the gradient of the result."""

    name = "rms_norm.training"

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        for label, width in _widths(scale).items():
            name = f"{scale.name} {label} {scale.prompt}x{width}"
            yield Shape(name, {"M": scale.prompt, "H": width}, priority=3 if label == "hidden" else 5)

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        x, weight = super().inputs(shape, random)
        return x.requires_grad_(), weight.requires_grad_(), random.normal(shape["M"], shape["H"])

    def ours(self, x: Tensor, weight: Tensor, grad: Tensor) -> Any:
        return with_gradients(rms_norm(x, weight, _EPS), (x, weight), grad)

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        def built_in(x: Tensor, weight: Tensor, grad: Tensor) -> Any:
            return with_gradients(F.rms_norm(x, (x.shape[-1],), weight, _EPS), (x, weight), grad)

        return {"rms_norm": Provider(built_in), "eager": Provider(self.expected, devices=("cuda",))}

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        for mine, right, what in zip(got, expected, ("norm", "gradient of x", "gradient of weight"), strict=True):
            # The reference rounds intermediate values of the gradient of x, and all terms of that of the weight.
            require_close(mine, right, 2 * _TOLERANCE, what)

    def bytes(self, shape: Shape) -> int:
        """Counts x and the norm in the forward pass; x, the norm's gradient and that of x in the backward pass."""
        return 2 * shape["H"] * (5 * shape["M"] + 3)


class AddQuantize(CheckedByReference):
    """Operands: x, residual, weight."""

    name, op = "rms_norm.add_quantize", "rms_norm_quantize"

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        for label, rows, goal in (
            ("hidden", scale.tokens, Goal("110 us", "104 us") if scale.name == "v3" else None),
            ("decode", scale.decode, None),
        ):
            name = f"{scale.name} {label} {rows}x{scale.hidden}"
            yield Shape(name, {"M": rows, "H": scale.hidden}, goal, 1 if goal else 5)

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        return *(random.normal(shape["M"], shape["H"]) for _ in range(2)), random.normal(shape["H"])

    def ours(self, x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        return add_rms_norm_quantize(x, residual, weight, _EPS)

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        # Not bit by bit: a value that is rounded to the other side in bfloat16 may be in e4m3 as well.
        require_close(got[1], expected[1], _TOLERANCE, "scales")
        require_close(wide(*got[:2]), wide(*expected[:2]), _TOLERANCE + CODES_OFF, "quantized values")
        require_equal(got[2], expected[2], "sum")

    def bytes(self, shape: Shape) -> int:
        return 2 * shape["H"] * (3 * shape["M"] + 1) + group_bytes(shape["M"], shape["H"])


def _widths(scale: Scale) -> dict[str, int]:
    """Widths of the norms in a model of this scale: hidden states, latents of queries (if any) and of keys."""
    widths = {"hidden": scale.hidden, "q_a": scale.config.q_lora_rank, "kv_a": scale.config.kv_lora_rank}
    return {name: width for name, width in widths.items() if width}


OPERATORS = (Forward(), Training(), AddQuantize())
