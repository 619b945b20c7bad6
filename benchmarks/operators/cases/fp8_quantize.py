"""`fp8_quantize`: activations in groups of 128, weights in blocks of 128 x 128, and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from deepseek_kernels.quant import fp8_quantize

from ..declare import CheckedByReference, Shape, swept
from ..fp8_operands import block_bytes, group_bytes, weights
from ..goals import Goal
from ..operands import Random, as_tuple
from ..scales import Scale
from ..verify import require_close, require_equal


class _Quantizer(CheckedByReference):
    """Base of the operators, each of which is one function of `fp8_quantize`, looked up when it is called."""

    op = "fp8_quantize"
    function = ""

    def ours(self, *inputs: Any) -> Any:
        return getattr(fp8_quantize, self.function)(*inputs)

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        for mine, right in zip(as_tuple(got), as_tuple(expected), strict=True):
            if ours:
                require_equal(mine, right)
            else:  # a compiler may divide by multiplication: codes at a tie then move by one step
                require_close(mine, right, 2.0**-6)

    def result_bytes(self, shape: Shape) -> int:
        raise NotImplementedError

    def bytes(self, shape: Shape) -> int:
        return 2 * shape["M"] * shape["K"] + self.result_bytes(shape)


class _Activations(_Quantizer):
    goal: Goal | None = None
    priority = 5

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        for label, rows in (("tokens", scale.tokens), ("tokens of a decode", scale.decode)):
            goal = self.goal if scale.name == "v3" and rows == scale.tokens else None
            yield Shape(
                f"{scale.name} {label} {rows}x{scale.hidden}",
                {"M": rows, "K": scale.hidden},
                goal,
                self.priority if rows == scale.tokens else 5,
            )

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        return (random.normal(shape["M"], shape["K"]),)


class Rows(_Activations):
    name, function = "fp8_quantize.rows", "quantize_rows"
    goal, priority = Goal("48 us", "45 us"), 0

    def sweeps(self, scale: Scale) -> Iterable[Shape]:
        return swept(f"{scale.name} tokens of {scale.hidden}", {"K": scale.hidden}, "M", 1, scale.tokens)

    def result_bytes(self, shape: Shape) -> int:
        return group_bytes(shape["M"], shape["K"])


class Transposed(_Activations):
    name, function, priority = "fp8_quantize.transposed", "quantize_transposed", 3

    def result_bytes(self, shape: Shape) -> int:
        return group_bytes(shape["K"], shape["M"])


class Both(_Activations):
    name, function, priority = "fp8_quantize.both", "quantize_both", 2

    def result_bytes(self, shape: Shape) -> int:
        return group_bytes(shape["M"], shape["K"]) + group_bytes(shape["K"], shape["M"])


class GroupedTransposed(_Quantizer):
    name, function = "fp8_quantize.grouped_transposed", "quantize_grouped_transposed"

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        sizes = {"M": scale.routed, "K": scale.hidden, "E": scale.experts}
        yield Shape(f"{scale.name} expert rows {scale.routed}x{scale.hidden}, {scale.experts} experts", sizes, None, 4)

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        return random.normal(shape["M"], shape["K"]), random.ends(shape["M"], shape["E"])

    def result_bytes(self, shape: Shape) -> int:
        return group_bytes(shape["K"], shape["M"])  # without the padding of each expert


class _Weights(_Quantizer):
    def shapes(self, scale: Scale) -> Iterable[Shape]:
        rows, columns = scale.hidden, scale.intermediate
        goal = Goal("107 us", "100 us") if scale.name == "v3" else None
        yield Shape(f"{scale.name} down_proj {rows}x{columns}", {"M": rows, "K": columns}, goal, 2)
        rows, columns = scale.latent, scale.hidden
        yield Shape(f"{scale.name} kv_a_proj {rows}x{columns}", {"M": rows, "K": columns})

    def result_bytes(self, shape: Shape) -> int:
        return block_bytes(shape["M"], shape["K"])


class Blocks(_Weights):
    name, function = "fp8_quantize.blocks", "quantize_blocks"

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        return (random.normal(shape["M"], shape["K"]),)


class Dequantize(_Weights):
    name, function = "fp8_quantize.dequantize", "dequantize_blocks"

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        return weights(random, shape["M"], shape["K"])


OPERATORS = (Rows(), Transposed(), Both(), GroupedTransposed(), Blocks(), Dequantize())
