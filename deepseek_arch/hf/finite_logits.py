"""Values that are not finite, in transformers' loading and generation as in the core's."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from ..checkpoint.finite_values import NonFinite
from ..generation.finite_check import FiniteCheck, selecting_tensor_not_finite

__all__ = ["FiniteLogits", "warn_of_values"]


class FiniteLogits(LogitsProcessor):
    """Raises ValueError where a row's logits have NaN or infinity; transformers would choose a token from them.

    It comes before all other processors, which may mask logits with -Inf: a largest one that is finite is enough.
    transformers waits for the device in every step anyway.
    """

    supports_continuous_batching = True

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        name = selecting_tensor_not_finite(model)
        if name is not None:
            raise ValueError(f"expected finite values, got NaN or infinity in {name}")
        self._check = FiniteCheck(model, device, immediate=True)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        finite = scores.amax(-1).isfinite()
        self._check(finite, torch.zeros_like(finite))
        return scores


def warn_of_values(model: nn.Module, source: Any) -> None:
    """Warns of the loaded tensors that hold NaN or infinity, FP8 codes among them; those on the meta device aside."""
    found = NonFinite()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            values = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            if isinstance(values, Tensor) and not values.is_meta:
                found.check(name, values)
    for message in found.warnings:
        warnings.warn(f"{source}: {message}", stacklevel=3)
