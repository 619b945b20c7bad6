"""Activations of gated MLPs, by the names that transformers has for them in `hidden_act`.

The fused kernels know SiLU alone; the operators that take another name compute it with PyTorch's functions. Left out
are the two of transformers' names with parameters of their own (prelu, xielu), which published files have no tensors
for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "SILU", "gated"]

SILU = ("silu", "swish")
"""Names of the activation that the kernels fuse."""

_gelu_tanh = partial(F.gelu, approximate="tanh")


def _laplace(x: Tensor) -> Tensor:
    """Computes the Laplace function of arXiv 2209.10655, equation 4."""
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * 2**0.5)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(SILU, F.silu),
    **dict.fromkeys(("gelu", "gelu_python"), F.gelu),
    **dict.fromkeys(("gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh", "gelu_pytorch_tanh"), _gelu_tanh),
    "gelu_10": lambda x: F.gelu(x).clamp(-10, 10),
    "hardswish": F.hardswish,
    "laplace": _laplace,
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "tanh": torch.tanh,
}


def gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """Returns `activation(gate) * up`, elementwise.

    Raises:
        ValueError: the activation is unknown.
    """
    function = ACTIVATIONS.get(activation)
    if function is None:
        raise ValueError(f"expected an activation out of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return function(gate) * up
