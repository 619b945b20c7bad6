"""`fp8_training`: conversion of a model's linear layers and experts to FP8 GEMMs and back, and its report."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from deepseek_kernels.common.activations import SILU
from deepseek_kernels.quant.fp8_quantize import HIGH_PRECISION

from ...config.argument_types import check_types
from ...layers.linear import Linear
from ...moe.moe import Experts
from .layers import FP8TrainingExperts, FP8TrainingLinear, check_restorable, convert, restore
from .policy import HIGH, V3_RECIPE, FP8Policy, FP8Precision

__all__ = ["FP8Report", "ReportRow", "assign", "fp8_training", "install", "remove_fp8_training", "weights_of"]

_CONVERTIBLE = (nn.Linear, Linear, Experts, FP8TrainingLinear, FP8TrainingExperts)
_COLUMNS = ("weight", "shape", "fprop", "dgrad", "wgrad", "input scale", "grad scale", "rule")


@dataclass(frozen=True)
class ReportRow:
    """Precision of one weight, and the pattern of the rule that decided; None where none matched."""

    name: str
    shape: tuple[int, ...]
    precision: FP8Precision
    rule: str | None

    def cells(self) -> tuple[str, ...]:
        p = self.precision
        scales = ("-", "-") if p.is_high else (p.input_scale or "float32", p.grad_scale or "float32")
        shape = "x".join(map(str, self.shape))
        return self.name, shape, p.fprop, p.dgrad, p.wgrad, *scales, self.rule or "no rule"


@dataclass(frozen=True)
class FP8Report:
    """One row for each weight of a linear layer or of stacked experts, in the model's order.

    As text it is a table, in which rows that differ only in a layer's number are one line with a count.
    """

    rows: tuple[ReportRow, ...]

    @property
    def fp8(self) -> tuple[str, ...]:
        """Names of the weights with a GEMM in FP8."""
        return tuple(row.name for row in self.rows if not row.precision.is_high)

    def __str__(self) -> str:
        lines: dict[tuple[str, ...], int] = {}
        for row in self.rows:
            name, *rest = row.cells()
            key = (re.sub(r"(?<=\.)\d+(?=\.)", "*", name) or "(the module itself)", *rest)
            lines[key] = lines.get(key, 0) + 1
        cells = [(*_COLUMNS, "count"), *((*key, str(count)) for key, count in lines.items())]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


@dataclass(frozen=True)
class _Weight:
    """A weight that a rule can name: `parameter` of `module`, called `name` in policies."""

    name: str
    module: nn.Module
    parameter: str

    @property
    def tensor(self) -> Tensor:
        """The parameter itself, or the result of its parametrization."""
        return getattr(self.module, self.parameter)


@check_types
def fp8_training(model: nn.Module, policy: FP8Policy | None = None) -> FP8Report:
    """Turns linear layers and experts into the V3 recipe (V3 report, 3.3): FP8 products, high-precision master weights.

    In place and reversible (`remove_fp8_training`): modules, parameters, their names and the state_dict stay the same
    objects, so an optimizer, hooks and checkpoints made before go on working. Calling it again replaces the policy.
    Where the device multiplies FP8 the kernels run; elsewhere the same numbers come from an emulation.

    Args:
        model: a `DeepseekLM`, one of the transformers classes, or any module with linear layers or `Experts` inside.
            Before `torch.compile`, PEFT and device hooks are put on it.
        policy: default `V3_RECIPE`.

    Returns:
        The precision of each weight; printable.

    Raises:
        ValueError: a rule matches nothing, or asks for FP8 where it is impossible; nothing is changed.
    """
    policy = V3_RECIPE if policy is None else policy
    weights = weights_of(model)
    rules = policy.assign(weights)
    rows = []
    for name, weight in weights.items():
        rule = rules[name]
        precision = HIGH if rule is None else rule.precision
        rows.append(ReportRow(name, tuple(weight.tensor.shape), precision, None if rule is None else rule.pattern))
    install(model, {row.name: row.precision for row in rows})
    return FP8Report(tuple(rows))


@check_types
def remove_fp8_training(model: nn.Module) -> None:
    """Undoes `fp8_training`: every module is again of the class it had. Weights keep the values they have now.

    Raises:
        ValueError: something was put over a module since, which has to go first; nothing is changed.
    """
    for module in model.modules():
        check_restorable(module)
    for module in model.modules():
        restore(module)


def install(model: nn.Module, precisions: Mapping[str, FP8Precision]) -> None:
    """Gives the model's weights these precisions, and high precision to those that are not named.

    Raises:
        ValueError: a weight cannot have the precision asked for; nothing is changed.
    """
    requested: dict[nn.Module, dict[str, FP8Precision]] = {}
    for name, weight in weights_of(model).items():
        precision = precisions.get(name, HIGH)
        if not precision.is_high:
            _check(weight, precision)
            requested.setdefault(weight.module, {})[weight.parameter] = precision
    remove_fp8_training(model)
    for module, own in requested.items():
        convert(module, own)


def assign(model: nn.Module) -> dict[str, FP8Precision]:
    """Returns the precisions with which `install` would bring the model to its present state."""
    current = {}
    for name, weight in weights_of(model).items():
        if isinstance(weight.module, FP8TrainingLinear | FP8TrainingExperts):
            current[name] = weight.module.fp8_precision.get(weight.parameter, HIGH)
    return current


def weights_of(model: nn.Module) -> dict[str, _Weight]:
    """Returns the weights that a policy can name, in the model's order."""
    return {weight.name: weight for weight in _weights(model)}


def _weights(model: nn.Module) -> Iterator[_Weight]:
    for name, module in model.named_modules():
        if isinstance(module, Experts) or hasattr(module, "gate_up_proj_scale_inv"):
            for parameter in ("gate_up_proj", "down_proj"):
                yield _Weight(f"{name}.{parameter}" if name else parameter, module, parameter)
        elif isinstance(module, nn.Linear) or hasattr(module, "weight_scale_inv"):
            yield _Weight(name, module, "weight")


def _check(weight: _Weight, precision: FP8Precision) -> None:
    module, what = weight.module, f"{weight.name or 'the module'} ({type(weight.module).__name__})"
    if getattr(weight.tensor, "dtype", None) not in HIGH_PRECISION or hasattr(module, f"{weight.parameter}_scale_inv"):
        dtype = getattr(weight.tensor, "dtype", type(weight.tensor).__name__)
        raise ValueError(
            f"expected master weights in float32, bfloat16 or float16 for FP8 training, got {dtype} in {what}; "
            'load the model with fp8="dequantize", or call deepseek_arch.dequantize on it'
        )
    if type(module) not in _CONVERTIBLE:
        raise ValueError(f"expected torch.nn.Linear, deepseek_arch.Linear or Experts for FP8 training, got {what}")
    if "forward" in vars(module):
        raise ValueError(
            f"expected {what} to have the forward of its class, got one put over it (a device hook?): "
            "call fp8_training before whatever replaced it"
        )
    if precision.swiglu_cache == "fp8" and not (isinstance(module, Experts) and weight.parameter == "down_proj"):
        raise ValueError(f"expected swiglu_cache='fp8' for down_proj of experts only, got it for {what}")
    if precision.swiglu_cache == "fp8" and module.activation not in SILU:
        raise ValueError(
            f"expected experts with silu for swiglu_cache='fp8', whose backward pass recomputes SwiGLU, got "
            f"{module.activation} in {what}; a rule with swiglu_cache='high' trains them"
        )
