"""Refuses to emit tokens from logits that are not finite, or chosen by parameters that are not.

NaN in most parameters shows in the logits as soon as a token uses them, and each step looks at those. It does not show
in what only selects: a router's biases choose experts, and an indexer's weights the keys of a query, and neither takes
part in what is computed of them. These are looked at once, before the first pass. NaN that no token reaches, in an
expert that none chose or the embedding of another token, changes nothing and is not looked for; `load`, `save` and
`from_pretrained` warn of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..attention.lightning_indexer import LightningIndexer
from ..checkpoint.finite_values import is_finite
from ..moe.moe import Router

__all__ = ["FiniteCheck", "finite_at", "selecting_tensor_not_finite"]

_EVERY = 32  # steps between two looks, where a look would wait for the device


def finite_at(values: Tensor, tokens: Tensor) -> Tensor:
    """Returns bool [...], False where a token was chosen from values that are not finite.

    Args:
        values: [..., vocab_size], logits whose largest one was chosen, or probabilities that were drawn from. NaN
            counts as the largest logit and makes all probabilities NaN, so that the chosen token shows it.
        tokens: int64 [...], the choices.
    """
    return values.gather(-1, tokens[..., None])[..., 0].isfinite()


def selecting_tensor_not_finite(model: nn.Module) -> str | None:
    """Returns the name of the first router bias or parameter of an indexer that is not finite, or None.

    A bias of -inf is taken for what it does: its expert is never chosen.
    """
    for path, module in model.named_modules():
        if isinstance(module, Router) and module.e_score_correction_bias is not None:
            bias = _local(module.e_score_correction_bias)
            if not (bias.is_meta or bool((bias < torch.inf).all())):
                return f"{path}.e_score_correction_bias"
        elif isinstance(module, LightningIndexer):
            for name, tensor in module.named_parameters():
                if not _is_finite(tensor):
                    return f"{path}.{name}"
    return None


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
        self._steps += 1
        if finite.device.type == "cpu" and bool(finite.all()):
            return
        self._failed = self._failed | ~(finite | ignored).all()
        if self.immediate or self._steps % _EVERY == 0:
            self.look()

    def look(self) -> None:
        """Raises ValueError if the logits of some step so far were not finite."""
        if bool(self._failed):
            raise ValueError(f"expected finite logits, got NaN or infinite ones: {_cause(self.model)}")


def _cause(model: nn.Module) -> str:
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and not _is_finite(tensor):
            return f"{name} is not finite"
    return f"every parameter is finite, so that a product overflowed or a hook made them ({_dtype_name(model)})"


def _dtype_name(model: nn.Module) -> str:
    """Returns the name of the dtype that the model computes in."""
    return str(getattr(model, "dtype", "unknown dtype")).removeprefix("torch.")


def _is_finite(tensor: Tensor) -> bool:
    """Returns False for NaN or infinity in this rank's part of a tensor; True on device meta, where there is none."""
    values = _local(tensor)
    return values.is_meta or is_finite(values)


def _local(tensor: Tensor) -> Tensor:
    values: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return values.detach()
