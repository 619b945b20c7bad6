"""Refuses to emit tokens from logits that are not finite."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["FiniteCheck", "finite_at"]

_EVERY = 32  # steps between two looks, where a look would wait for the device


def finite_at(values: Tensor, tokens: Tensor) -> Tensor:
    """Returns bool [...], False where a token was chosen from values that are not finite.

    Args:
        values: [..., vocab_size], logits whose largest one was chosen, or probabilities that were drawn from. NaN
            counts as the largest logit and makes all probabilities NaN, so that the chosen token shows it.
        tokens: int64 [...], the choices.
    """
    return values.gather(-1, tokens[..., None])[..., 0].isfinite()


class FiniteCheck:
    """Raises ValueError when a row's logits are not finite.

    Args:
        model: searched for the first parameter that is not finite, to name it.
        immediate: looks in every step, before its tokens are handed out; otherwise, on an accelerator, once in a while
            and at the end, so that the host need not wait for the device.
    """

    def __init__(self, model: nn.Module, device: torch.device, immediate: bool) -> None:
        self.model, self.immediate = model, immediate or device.type == "cpu"
        self._failed = torch.zeros((), dtype=torch.bool, device=device)
        self._steps = 0

    def __call__(self, finite: Tensor, ignored: Tensor) -> None:
        """Takes in one step.

        Args:
            finite: bool, of `finite_at`.
            ignored: bool of the same shape, True for logits that give no token.
        """
        self._failed = self._failed | ~(finite | ignored).all()
        self._steps += 1
        if self.immediate or self._steps % _EVERY == 0:
            self.look()

    def look(self) -> None:
        """Raises ValueError if the logits of some step so far were not finite."""
        if bool(self._failed):
            raise ValueError(f"expected finite logits, got NaN or infinite ones: {_cause(self.model)}")


def _cause(model: nn.Module) -> str:
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or tensor.is_meta or not _is_finite(tensor):
            return f"{name} is not finite"
    return f"every parameter is finite, so that a product overflowed or a hook made them ({_dtype_name(model)})"


def _dtype_name(model: nn.Module) -> str:
    """Returns the name of the dtype that the model computes in."""
    return str(getattr(model, "dtype", "unknown dtype")).removeprefix("torch.")


def _is_finite(tensor: Tensor) -> bool:
    if tensor.dtype == torch.float8_e4m3fn:  # 0x7F and 0xFF are its NaN
        return not bool(((tensor.view(torch.uint8) & 0x7F) == 0x7F).any())
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())
