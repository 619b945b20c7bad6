"""Declarations of operators to measure: shapes, inputs, contestants, a check, bytes and FLOPs, goals.

Each file in `benchmarks/operators/cases/` declares one operator with `OPERATORS`, a tuple of `Operator`s. `operators()`
collects them; `python -m benchmarks kernels` and `gpu` time and repeat them. A new operator needs nothing else.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from deepseek_kernels import use_backend

from .goals import Goal
from .operands import Random
from .scales import Scale

__all__ = [
    "CheckedByReference",
    "Operator",
    "Provider",
    "Shape",
    "compiled",
    "fits",
    "operators",
    "select",
    "swept",
]

# ------------------------------------------------------------------ shapes and contestants


@dataclass(frozen=True)
class Shape:
    """One size at which an operator is timed.

    Attributes:
        name: begins with the name of its scale: "v3 o_proj 4096x7168x16384".
        priority: shapes with smaller ones come first, in case the time runs out.
        sweep: name of the size that varies, if this is one of the shapes made by `swept`.
    """

    name: str
    sizes: Mapping[str, int]
    goal: Goal | None = None
    priority: int = 5
    sweep: str | None = None

    def __getitem__(self, name: str) -> int:
        return self.sizes[name]

    @property
    def scale(self) -> str:
        return self.name.partition(" ")[0]

    @property
    def curve(self) -> str:
        """The name without the size that a sweep varies."""
        return self.name.rpartition(", ")[0]


def swept(name: str, sizes: Mapping[str, int], over: str, low: int, high: int) -> Iterator[Shape]:
    """Yields the shapes of one curve: the size `over` at every power of two from `low` to `high`, the others fixed.

    Args:
        name: as a shape's, without the size: "v3 o_proj 7168x16384".
    """
    for power in range(max(low, 1).bit_length() - 1, max(high, 1).bit_length()):
        value = 2**power
        if low <= value <= high:
            yield Shape(f"{name}, {over}={value}", {**sizes, over: value}, priority=9, sweep=over)


@dataclass(frozen=True)
class Provider:
    """Another implementation of the operator.

    Attributes:
        call: takes the operator's inputs.
        built_in: "ours" is compared with the fastest of these. False, for example, for a product with other scales,
            which shows the limit of the hardware.
        checked: its result must be right before it is timed. False if it computes something simpler.
        devices: on which it runs unless asked for by name.
    """

    call: Callable[..., Any]
    built_in: bool = True
    checked: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")


def compiled(function: Callable[..., Any], shape: Shape) -> Provider:
    """Returns `function` under torch.compile, run on a GPU if the shape has a goal, elsewhere when asked for by name.

    It compiles when first called, which takes seconds per row and some more for importing the compiler.
    """

    @functools.cache
    def build() -> Callable[..., Any]:
        return torch.compile(function, dynamic=False)

    return Provider(lambda *inputs: build()(*inputs), devices=("cuda",) if shape.goal else ())


class Operator:
    """One operator, or one of several ways to call it; subclasses declare it.

    Attributes:
        name: as on the command line and in reports; "fp8_quantize.rows" is also found as "fp8_quantize".
        op: its name in `deepseek_kernels.dispatch`.
        product: the matrix product whose measured speed bounds it: "fp8", "bf16" or "fp32".
        in_place: True if it writes to its inputs.
    """

    name: ClassVar[str] = ""
    op: ClassVar[str] = ""
    product: ClassVar[str] = "bf16"
    in_place: ClassVar[bool] = False

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        """Returns the shapes to time for a model of this scale."""
        raise NotImplementedError

    def sweeps(self, scale: Scale) -> Iterable[Shape]:
        """Returns further shapes, made with `swept`, for curves over one size: timed with `--sweep` only."""
        return ()

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        """Returns the operands, normally distributed: with zeros a GPU would run at higher clocks."""
        raise NotImplementedError

    def ours(self, *inputs: Any) -> Any:
        """Calls our operator: this is measured."""
        raise NotImplementedError

    def expected(self, *inputs: Any) -> Any:
        """Returns the right result."""
        raise NotImplementedError

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        """Returns the other implementations, by name."""
        return {}

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        """Raises `Mismatch` if a result is wrong; `ours` may be held to a stricter rule, such as bitwise equality."""
        raise NotImplementedError

    def flops(self, shape: Shape) -> int:
        """Returns the floating-point operations of its products; 0 if it only reads and writes."""
        return 0

    def bytes(self, shape: Shape) -> int:
        """Returns the fewest bytes that it can move: each operand read once, each result written once."""
        raise NotImplementedError


class CheckedByReference(Operator):
    """An operator that is checked against its own reference, which is a contestant on a GPU, plain and compiled."""

    def expected(self, *inputs: Any) -> Any:
        with use_backend("reference"):
            return self.ours(*inputs)

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        return {"eager": Provider(self.expected, devices=("cuda",)), "compile": compiled(self.expected, shape)}


# ------------------------------------------------------------------ all operators


def operators() -> list[Operator]:
    """Returns every operator of every module in `benchmarks/operators/cases/`, sorted by name.

    Raises:
        ValueError: two have the same name.
    """
    from . import cases

    declared: list[Operator] = []
    for module in pkgutil.iter_modules(cases.__path__):
        declared += importlib.import_module(f"{cases.__name__}.{module.name}").OPERATORS
    declared.sort(key=lambda operator: operator.name)
    names = [operator.name for operator in declared]
    if len(set(names)) != len(names):
        raise ValueError(f"expected one operator of each name, got {names}")
    return declared


def select(names: Iterable[str]) -> list[Operator]:
    """Returns the operators of these names, or whose names begin with one and a dot; all if there are no names.

    Raises:
        ValueError: a name that fits none.
    """
    chosen, everything = list(names), operators()
    for name in chosen:
        if not any(fits(operator.name, name) for operator in everything):
            raise ValueError(f"expected operators among {', '.join(o.name for o in everything)}, got {name!r}")
    return [o for o in everything if not chosen or any(fits(o.name, name) for name in chosen)]


def fits(operator: str, name: str) -> bool:
    """Returns True if `name` is that of this operator or of its group."""
    return operator == name or operator.startswith(name + ".")
