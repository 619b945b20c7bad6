"""`fp8_quantize`: activations by groups, weights by blocks (KERNELS rows 1 and 2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from deepseek_kernels import use_backend
from deepseek_kernels.quant import fp8_quantize

from ..declare import Goal, Operator, Provider, Random, Shape, compiled, require_close, require_equal, swept
from ..fp8_operands import block_bytes, group_bytes, weights
from ..scales import Scale


class _Quantizer(Operator):
    """One function; everybody else computes its reference.

    `function` is looked up when it is called, so that the name is all that differs between the classes.
    """

    op = "fp8_quantize"
    function = ""

    def ours(self, *inputs: Any) -> Any:
        return getattr(fp8_quantize, self.function)(*inputs)

    def expected(self, *inputs: Any) -> Any:
        with use_backend("reference"):
            return self.ours(*inputs)

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        return {"eager": Provider(self.expected, devices=("cuda",)), "compile": compiled(self.expected, shape)}

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        for mine, theirs in zip(_several(got), _several(expected), strict=True):
            if ours:
                require_equal(mine, theirs)
            else:  # a compiler may divide by multiplication: codes at a tie then move by one step
                require_close(mine, theirs, 2.0**-6)

    def result_bytes(self, shape: Shape) -> int:
        raise NotImplementedError

    def bytes(self, shape: Shape) -> int:
        return 2 * shape["M"] * shape["K"] + self.result_bytes(shape)


def _several(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


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
        return group_bytes(shape["K"], shape["M"])  # without what pads each expert


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
