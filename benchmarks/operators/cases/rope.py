"""`rope`: queries and keys turned by their positions, in place or into a new tensor (KERNELS row 8c)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from deepseek_kernels import use_backend
from deepseek_kernels.attention.rope import rope, rope_

from ..declare import Goal, Operator, Provider, Random, Shape, compiled, require_equal
from ..scales import Scale


class New(Operator):
    """Operands: x [B, T, N, D], cos, sin. D columns are read and written, the last R of them turned."""

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

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        return {"eager": Provider(self.expected, devices=("cuda",)), "compile": compiled(self.expected, shape)}

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        require_equal(got, expected)

    def bytes(self, shape: Shape) -> int:
        return self._moved(shape, shape["D"])

    @staticmethod
    def _moved(shape: Shape, columns: int) -> int:
        """bfloat16 read and written, and both float32 angles of each pair read."""
        tokens = shape["B"] * shape["T"]
        return 2 * 2 * tokens * shape["N"] * columns + 2 * 4 * tokens * shape["R"] // 2


class InPlace(New):
    """As `New`, but only the last R columns are read and written, where they are.

    Each call turns x further, which changes no length. The others are therefore not checked: what they are given is no
    longer what was expected to be turned. `New` checks the same arithmetic.
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

        found = {"eager": Provider(in_place, devices=("cuda",)), "compile": compiled(in_place, shape)}
        return {name: dataclasses.replace(one, checked=False) for name, one in found.items()}

    def bytes(self, shape: Shape) -> int:
        return self._moved(shape, shape["R"])


OPERATORS = (New(), InPlace())
