"""`rope`: rotary embedding of queries and keys, in place or into a new tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from deepseek_kernels import use_backend
from deepseek_kernels.attention.rope import rope, rope_

from ..declare import CheckedByReference, Provider, Shape, compiled
from ..goals import Goal
from ..operands import Random
from ..scales import Scale
from ..verify import require_equal


class New(CheckedByReference):
    """Operands: x [B, T, N, D], cos, sin. All D columns are read and written, the last R of them rotated."""

    name, op = "rope.new", "rope"

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        yield self.queries(scale, "q", 1, scale.tokens)
        config = scale.config
        name = f"{scale.name} k {scale.tokens}x{config.qk_rope_head_dim}"
        sizes = {"B": 1, "T": scale.tokens, "N": 1, "D": config.qk_rope_head_dim, "R": config.qk_rope_head_dim}
        yield Shape(name, sizes)

    def queries(
        self, scale: Scale, label: str, batch: int, tokens: int, goal: Goal | None = None, priority: int = 5
    ) -> Shape:
        config = scale.config
        heads, rotary, width = config.num_attention_heads, config.qk_rope_head_dim, config.qk_head_dim
        sizes = {"B": batch, "T": tokens, "N": heads, "D": width, "R": rotary}
        name = f"{scale.name} {label} {batch * tokens}x{heads}x{rotary} of {width} columns"
        return Shape(name, sizes, goal, priority)

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        angles = random.normal(shape["B"], shape["T"], shape["R"] // 2).float()
        return random.normal(*(shape[size] for size in "BTND")), angles.cos(), angles.sin()

    def ours(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rope(x, cos, sin)

    def expected(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        with use_backend("reference"):
            return rope(x, cos, sin)

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        require_equal(got, expected)

    def bytes(self, shape: Shape) -> int:
        return self._moved(shape, shape["D"])

    @staticmethod
    def _moved(shape: Shape, columns: int) -> int:
        """Counts bfloat16 values, which are read and written, and both float32 angles of each pair, which are read."""
        tokens = shape["B"] * shape["T"]
        return 2 * 2 * tokens * shape["N"] * columns + 2 * 4 * tokens * shape["R"] // 2


class InPlace(New):
    """As `New`, but in place: only the last R columns are read and written.

    Each call rotates x further, which changes no length. Other providers are therefore not checked: their input is no
    longer the one of the expected result. `New` checks the same arithmetic.
    """

    name, in_place = "rope.in_place", True

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        goal = Goal("72 us") if scale.name == "v3" else None
        yield self.queries(scale, "q", 1, scale.tokens, goal, 2 if goal else 5)
        yield self.queries(scale, "q of a decode", scale.decode, 1)

    def ours(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rope_(x, cos, sin)

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        def in_place(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            with use_backend("reference"):
                return rope_(x, cos, sin)

        eager, compiled_one = Provider(in_place, devices=("cuda",)), compiled(in_place, shape)
        return {name: replace(one, checked=False) for name, one in (("eager", eager), ("compile", compiled_one))}

    def bytes(self, shape: Shape) -> int:
        return self._moved(shape, shape["R"])


OPERATORS = (New(), InPlace())
