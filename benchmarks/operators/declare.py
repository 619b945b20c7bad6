"""Declarations of operators to measure: shapes, inputs, contestants, a check, bytes and FLOPs, goals.

One file in `benchmarks/operators/cases/` per operator, with `OPERATORS`, a tuple of `Operator`s; `operators()` finds it
there, and `python -m benchmarks kernels` and `gpu` time it and repeat it. Nothing else has to change.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .scales import Scale

__all__ = [
    "Goal",
    "Mismatch",
    "Operator",
    "Provider",
    "Random",
    "Shape",
    "compiled",
    "fits",
    "operators",
    "require_close",
    "require_equal",
    "select",
    "swept",
]


# ------------------------------------------------------------------ goals

# Unit -> how much of it one second, one FLOP/s or one byte/s is.
_TIMES = {"us": 1e6, "ms": 1e3, "s": 1.0}
_RATES = {"TF": 1e-12, "GB/s": 1e-9, "TB/s": 1e-12}


@dataclass(frozen=True)
class Goal:
    """What an operator is to reach at one shape, as a table would say it: "48 us", "850 TF", "3.2 TB/s".

    Raises:
        ValueError: `must` or `stretch` is no number with a unit.
    """

    must: str
    stretch: str = ""

    def __post_init__(self) -> None:
        for text in filter(None, (self.must, self.stretch)):
            _parse(text)

    def describe(self) -> str:
        return self.must + (f", stretch {self.stretch}" if self.stretch else "")

    def reached(self, seconds: float, flops: float, moved: float) -> str:
        """ "stretch", "must" or "" for a run of `seconds` that computes `flops` and moves `moved` bytes."""
        for name in ("stretch", "must"):
            text = getattr(self, name)
            if text and _achieved(text, seconds, flops, moved) >= 1:
                return name
        return ""


def _parse(text: str) -> tuple[float, str]:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) (\S+)", text)
    if not found or found[2] not in _TIMES | _RATES or float(found[1]) == 0:
        raise ValueError(f"expected a goal such as '48 us', '850 TF' or '3.2 TB/s', got {text!r}")
    return float(found[1]), found[2]


def _achieved(text: str, seconds: float, flops: float, moved: float) -> float:
    """How many times the goal `text` is reached."""
    value, unit = _parse(text)
    if unit in _TIMES:
        return value / (seconds * _TIMES[unit])
    return (flops if unit == "TF" else moved) / seconds * _RATES[unit] / value


# ------------------------------------------------------------------ shapes and contestants


@dataclass(frozen=True)
class Shape:
    """One size at which an operator is timed.

    Attributes:
        name: begins with the name of its scale: "v3 o_proj 4096x7168x16384".
        priority: shapes with smaller ones come first, in case the time runs out.
        sweep: the size that differs from shape to shape, where this is one of several that `swept` made.
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
    """The shapes of one curve: the size `over` at every power of two from `low` to `high`, the others fixed.

    Args:
        name: as a shape's, without the size: "v3 o_proj 7168x16384".
    """
    for power in range(max(low, 1).bit_length() - 1, max(high, 1).bit_length()):
        value = 2**power
        if low <= value <= high:
            yield Shape(f"{name}, {over}={value}", {**sizes, over: value}, priority=9, sweep=over)


@dataclass(frozen=True)
class Provider:
    """Someone else who computes the operator.

    Attributes:
        call: takes the operator's inputs.
        built_in: "ours" is measured against the fastest of these; not, for example, a product with other scales,
            which shows what the hardware could do.
        checked: its result must be right before it is timed; not where it computes something simpler.
        devices: where it runs unless asked for by name.
    """

    call: Callable[..., Any]
    built_in: bool = True
    checked: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")


def compiled(function: Callable[..., Any], shape: Shape) -> Provider:
    """What torch.compile makes of `function`: on a GPU where there is a goal, elsewhere when asked for by name.

    It compiles when first called: a row costs seconds, and importing the compiler some more.
    """

    @functools.cache
    def build() -> Callable[..., Any]:
        return torch.compile(function, dynamic=False)

    return Provider(lambda *inputs: build()(*inputs), devices=("cuda",) if shape.goal else ())


class Operator:
    """One operator, or one of several ways to call it.

    Attributes:
        name: as on the command line and in reports; "fp8_quantize.rows" is also found as "fp8_quantize".
        op: the name it is registered under in `deepseek_kernels.dispatch`.
        product: the matrix product whose measured speed bounds it: "fp8", "bf16" or "fp32".
        in_place: whether it writes to its inputs.
    """

    name: ClassVar[str] = ""
    op: ClassVar[str] = ""
    product: ClassVar[str] = "bf16"
    in_place: ClassVar[bool] = False

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        """What to time for a model of this scale."""
        raise NotImplementedError

    def sweeps(self, scale: Scale) -> Iterable[Shape]:
        """More shapes, made with `swept`, for a curve over one size: timed with `--sweep` only."""
        return ()

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        """Operands, normally distributed: zeros would raise the clocks."""
        raise NotImplementedError

    def ours(self, *inputs: Any) -> Any:
        """The call that is measured."""
        raise NotImplementedError

    def expected(self, *inputs: Any) -> Any:
        """What it is checked against."""
        raise NotImplementedError

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        """Everybody else, by name."""
        return {}

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        """Raises `Mismatch` if a result is not right. `ours` may be held to more than the others, bitwise equality."""
        raise NotImplementedError

    def flops(self, shape: Shape) -> int:
        """Floating-point operations of its products; 0 if reading and writing is all it does."""
        return 0

    def bytes(self, shape: Shape) -> int:
        """The fewest bytes it can move: each operand read once, each result written once."""
        raise NotImplementedError


@dataclass
class Random:
    """Normal and integer tensors on a device, the same in every run of one operator and shape."""

    device: torch.device
    generator: torch.Generator = field(init=False)
    key: str = ""

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(zlib.crc32(self.key.encode()))

    def normal(self, *size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*size, generator=self.generator, device=self.device, dtype=dtype)

    def integers(self, low: int, high: int, *size: int) -> Tensor:
        """int64 in [low, high)."""
        return torch.randint(low, high, size, generator=self.generator, device=self.device)

    def ends(self, rows: int, experts: int, multiple: int = 16) -> Tensor:
        """[experts] int64: `rows` rows over the experts as a router would spread them.

        Counts are multiples of `multiple` where there are enough rows: torch's grouped products need that.
        """
        step = multiple if rows >= multiple * experts else 1
        choices = self.integers(0, experts, rows // step)
        counts = torch.bincount(choices.cpu(), minlength=experts) * step
        counts[-1] += rows - counts.sum()
        return counts.cumsum(0).to(self.device)


# ------------------------------------------------------------------ checks


class Mismatch(ValueError):
    """A result that is not right, and therefore not timed."""


def require_equal(got: Tensor, expected: Tensor, what: str = "result") -> None:
    """Raises `Mismatch` unless both have one shape, one dtype and the same bits."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise Mismatch(f"expected {what} {expected.dtype} {list(expected.shape)}, got {got.dtype} {list(got.shape)}")
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    different = int((got.contiguous().view(bits) != expected.contiguous().view(bits)).sum())
    if different:
        raise Mismatch(f"expected {what} bit by bit, got {different} of {got.numel()} elements that differ")


def require_close(got: Tensor, expected: Tensor, tolerance: float, what: str = "result") -> None:
    """Raises `Mismatch` unless |got - expected| <= tolerance * |expected|, Euclidean norms; never for NaN."""
    if got.shape != expected.shape:
        raise Mismatch(f"expected {what} {list(expected.shape)}, got {list(got.shape)}")
    # Row bands: a float32 copy of both would not fit beside what is measured.
    error = norm = 0.0
    for mine, theirs in zip(_bands(got.detach()), _bands(expected.detach()), strict=True):
        wide = theirs.float()
        error += float((mine.float() - wide).square().sum(dtype=torch.float64))
        norm += float(wide.square().sum(dtype=torch.float64))
    relative = (error / norm) ** 0.5 if norm else error**0.5
    if not relative <= tolerance:
        raise Mismatch(f"expected {what} within {tolerance:.2g} (relative), got {relative:.3g}")


def _bands(x: Tensor) -> Sequence[Tensor]:
    return x.reshape(-1, x.shape[-1] if x.ndim else 1).split(4096)


# ------------------------------------------------------------------ the operators there are


def operators() -> list[Operator]:
    """Every operator of every module in `benchmarks/operators/cases/`, by name.

    Raises:
        ValueError: two of one name.
    """
    from . import cases as ops

    found: list[Operator] = []
    for module in pkgutil.iter_modules(ops.__path__):
        found += importlib.import_module(f"{ops.__name__}.{module.name}").OPERATORS
    found.sort(key=lambda operator: operator.name)
    names = [operator.name for operator in found]
    if len(set(names)) != len(names):
        raise ValueError(f"expected one operator of each name, got {names}")
    return found


def select(names: Iterable[str]) -> list[Operator]:
    """The operators of these names, or whose names begin with one and a dot; all for no names.

    Raises:
        ValueError: a name that fits none.
    """
    wanted, everything = list(names), operators()
    for name in wanted:
        if not any(fits(operator.name, name) for operator in everything):
            raise ValueError(f"expected operators among {', '.join(o.name for o in everything)}, got {name!r}")
    return [o for o in everything if not wanted or any(fits(o.name, name) for name in wanted)]


def fits(operator: str, name: str) -> bool:
    """Whether `name` names this operator or its group."""
    return operator == name or operator.startswith(name + ".")
