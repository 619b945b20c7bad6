"""`linear_cross_entropy`: the head and its loss without whole logits, forward and with both gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from deepseek_kernels import linear_cross_entropy, use_backend

from ..declare import Operator, Provider, Shape, compiled, swept
from ..fp8_operands import BF16_ROUNDING
from ..goals import Goal
from ..operands import Random, widened, with_gradients
from ..scales import Scale
from ..verify import require_close

# Logits, their gradients and the results are rounded to bfloat16, each by half a unit of 8 bits at most; the expected
# ones are not rounded. Errors of single elements average out in the norm.
_TOLERANCE = 4 * BF16_ROUNDING


class Forward(Operator):
    """The loss alone, as in evaluation. Operands: hidden, weight, targets."""

    name, op = "linear_cross_entropy.forward", "linear_cross_entropy"
    trains = False

    def shapes(self, scale: Scale) -> Iterable[Shape]:
        sizes = {"T": scale.tokens, "H": scale.hidden, "V": scale.config.vocab_size}
        goal = Goal("620 TF", "680 TF") if scale.name == "v3" and self.trains else None
        name = "x".join(map(str, sizes.values()))
        yield Shape(f"{scale.name} head {name}", sizes, goal, 2 if goal else 5)

    def sweeps(self, scale: Scale) -> Iterable[Shape]:
        sizes = {"H": scale.hidden, "V": scale.config.vocab_size}
        name = f"{scale.name} head {sizes['H']}x{sizes['V']}"
        return swept(name, sizes, "T", min(64, scale.tokens // 4), scale.tokens)

    def inputs(self, shape: Shape, random: Random) -> tuple[Any, ...]:
        hidden = random.normal(shape["T"], shape["H"])
        weight = random.normal(shape["V"], shape["H"]) / shape["H"] ** 0.5
        targets = random.integers(0, shape["V"], shape["T"])
        return hidden.requires_grad_(self.trains), weight.requires_grad_(self.trains), targets

    def ours(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
        return (linear_cross_entropy(hidden, weight, targets, reduction="mean").loss,)

    def theirs(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
        return (F.cross_entropy(F.linear(hidden, weight).float(), targets),)

    def expected(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
        """Computes the reference on float32 operands, without rounding."""
        with use_backend("reference"):
            return self.ours(widened(hidden), widened(weight), targets)

    def providers(self, shape: Shape) -> Mapping[str, Provider]:
        # These hold all logits in float32 several times; a CPU without bfloat16 products takes minutes.
        return {"eager": Provider(self.theirs, devices=("cuda",)), "compile": compiled(self.theirs, shape)}

    def verify(self, got: Any, expected: Any, *, ours: bool = True) -> None:
        for mine, right, what in zip(got, expected, ("loss", "gradient of hidden", "gradient of weight"), strict=False):
            require_close(mine, right, _TOLERANCE, what)

    def flops(self, shape: Shape) -> int:
        return 2 * shape["T"] * shape["H"] * shape["V"]

    def bytes(self, shape: Shape) -> int:
        return 2 * (shape["T"] + shape["V"]) * shape["H"]


class Training(Forward):
    """The loss and both gradients, through autograd."""

    name = "linear_cross_entropy.training"
    trains = True

    def ours(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
        return with_gradients(*super().ours(hidden, weight, targets), (hidden, weight))

    def theirs(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
        return with_gradients(*super().theirs(hidden, weight, targets), (hidden, weight))

    def flops(self, shape: Shape) -> int:
        return 3 * super().flops(shape)

    def bytes(self, shape: Shape) -> int:
        return 2 * super().bytes(shape)


OPERATORS = (Forward(), Training())
