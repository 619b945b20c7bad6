"""Linear layers and experts that multiply in FP8 and keep their master weights: same parameters, different forward.

A module becomes one of these by a change of its class, so that it stays the same object with the same parameters,
hooks and state_dict, and becomes what it was by changing it back.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_kernels import grouped_gemm, permute, quantize_blocks, sort_by_expert, unpermute
from deepseek_kernels.common.activations import SILU, gated

from ...layers.linear import Linear
from ...moe.moe import Experts
from .operands import Quantized
from .policy import FP8Precision
from .products import product, swiglu_product

__all__ = ["FP8TrainingExperts", "FP8TrainingLinear", "WeightCodes", "check_restorable", "convert", "restore"]


class WeightCodes:
    """FP8 values of one weight, quantized once for the micro-batches of an optimizer step.

    They are reused while the weight is the same object at the same address with the same version, and holds a
    gradient. The version counts in-place changes (an optimizer's step, `load_state_dict`); the address changes when
    `.data` is replaced. Neither shows a write through `.data` in place, nor FSDP's gathering of shards: both
    happen between steps, when a gradient is about to be zeroed. Without a gradient (after `zero_grad`, in
    evaluation, for frozen weights, which adapters merge into through `.data`) the weight is quantized each time.
    So one thing goes unnoticed: a write through `.data` in place between the micro-batches of one step, or after
    `zero_grad(set_to_none=False)`.
    """

    def __init__(self) -> None:
        self._weight: weakref.ref[Tensor] | None = None
        self._address = self._version = 0
        self._quantized: Quantized | None = None

    def of(self, weight: Tensor, precision: FP8Precision, parts: int = 1) -> Quantized | None:
        """Returns FP8 values and scales of `weight` in blocks of 128 x 128; None if no GEMM needs them."""
        if not precision.needs_weight_codes:
            return None
        # Compiled code quantizes every time: it cannot look at an address.
        compiling = torch.compiler.is_compiling()
        if not compiling and self._made_of(weight):
            return self._quantized
        quantized = Quantized(*quantize_blocks(weight, scale_format=precision.weight_scale, parts=parts))
        # Only a parameter is the same tensor the next time; the result of an adapter is not.
        if not compiling and weight.is_leaf and weight.requires_grad and torch.is_grad_enabled():
            self._quantized, self._weight = quantized, weakref.ref(weight)
            self._address, self._version = weight.data_ptr(), weight._version
        return quantized

    def _made_of(self, weight: Tensor) -> bool:
        if self._weight is None or self._weight() is not weight or weight.grad is None:
            return False
        if not torch.is_grad_enabled():  # in evaluation, perhaps with other values put in through `.data`
            return False
        return (self._address, self._version) == (weight.data_ptr(), weight._version)

    def __deepcopy__(self, memo: Any) -> WeightCodes:
        return WeightCodes()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return WeightCodes, ()


class _FP8Training(nn.Module):
    """Attributes of both kinds of module.

    Attributes:
        fp8_precision: by parameter name; a parameter that is not there is multiplied in high precision.
        fp8_codes: FP8 values for the same names.
        fp8_origin: the class before conversion.
    """

    fp8_precision: Mapping[str, FP8Precision]
    fp8_codes: Mapping[str, WeightCodes]
    fp8_origin: type[nn.Module]

    def extra_repr(self) -> str:
        in_fp8 = {
            name: "+".join(kind for kind in ("fprop", "dgrad", "wgrad") if getattr(p, kind) == "fp8")
            for name, p in self.fp8_precision.items()
        }
        return ", ".join([super().extra_repr(), *(f"{name} fp8={kinds}" for name, kinds in in_fp8.items())])


class FP8TrainingLinear(_FP8Training, Linear):
    """`Linear` whose GEMMs are in FP8, as `fp8_precision["weight"]` says."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies [..., in_features] in float32, bfloat16 or float16 -> [..., out_features]."""
        precision, weight = self.fp8_precision["weight"], self.weight
        codes = self.fp8_codes["weight"].of(weight, precision)
        out = product(x, weight, codes, precision)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class FP8TrainingExperts(_FP8Training, Experts):
    """`Experts` whose GEMMs are in FP8, as `fp8_precision` says for `gate_up_proj` and `down_proj`."""

    def forward(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Computes `Experts.forward`."""
        order, inverse, ends = sort_by_expert(expert_ids, self.gate_up_proj.shape[0])
        rows = permute(x, order, inverse)  # [T K, H]
        gate_up = self._gate_up(rows, ends)  # [T K, 2 I]
        return unpermute(self._down(gate_up, ends), weights, order, inverse)

    def _gate_up(self, rows: Tensor, ends: Tensor) -> Tensor:
        precision, weight = self.fp8_precision.get("gate_up_proj"), self.gate_up_proj
        if precision is None:
            return grouped_gemm(rows, weight, ends)
        codes = self.fp8_codes["gate_up_proj"].of(weight, precision, parts=2)
        return product(rows, weight, codes, precision, ends, parts=2)

    def _down(self, gate_up: Tensor, ends: Tensor) -> Tensor:
        precision, weight = self.fp8_precision.get("down_proj"), self.down_proj
        if precision is None:
            return grouped_gemm(gated(self.activation, *gate_up.chunk(2, dim=-1)), weight, ends)
        codes = self.fp8_codes["down_proj"].of(weight, precision)
        if self.activation in SILU:
            return swiglu_product(gate_up, weight, codes, precision, ends)
        return product(gated(self.activation, *gate_up.chunk(2, dim=-1)), weight, codes, precision, ends)


def convert(module: nn.Module, precisions: Mapping[str, FP8Precision]) -> None:
    """Makes `module` multiply the named parameters in FP8; a second conversion replaces the first."""
    restore(module)
    origin = type(module)
    module.__class__ = FP8TrainingExperts if isinstance(module, Experts) else FP8TrainingLinear
    assert isinstance(module, _FP8Training)
    module.fp8_origin = origin
    module.fp8_precision = dict(precisions)
    module.fp8_codes = {name: WeightCodes() for name in precisions}


def restore(module: nn.Module) -> None:
    """Undoes `convert`; other modules stay as they are."""
    if isinstance(module, _FP8Training):
        module.__class__ = module.fp8_origin  # type: ignore[assignment]
        del module.fp8_origin, module.fp8_precision, module.fp8_codes


def check_restorable(module: nn.Module) -> None:
    """Checks that nothing which relies on the module's class has been put over it since `convert`.

    Raises:
        ValueError: a parametrization, a device hook or the like has.
    """
    if isinstance(module, _FP8Training) and (
        type(module) not in (FP8TrainingLinear, FP8TrainingExperts) or "forward" in vars(module)
    ):
        raise ValueError(
            f"expected a module as fp8_training left it, got one with something put over it since, a parametrization "
            f"or a device hook: remove that first ({type(module).__name__})"
        )
