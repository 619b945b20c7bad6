"""Linear layers and the MLP made of them, and what a block may know of a layer without calling it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as _torch

from deepseek_kernels import dense_gemm
from deepseek_kernels.common.activations import gated

from ..config.argument_types import Size, check_types

__all__ = [
    "MLP",
    "Embedding",
    "Linear",
    "QuantizedRows",
    "declares",
    "dense_weight",
    "fp8_weight",
    "is_plain_linear",
    "is_plain_module",
]


@dataclass(frozen=True)
class QuantizedRows:
    """Activations that are FP8 already.

    Attributes:
        codes: [M, K] float8_e4m3fn.
        scale: [M, ceil(K / 128)] float32, as of `quantize_rows`.
        shape: [..., K], M rows in all.
        dtype: of the values that were quantized, and of the products.
    """

    codes: Tensor
    scale: Tensor
    shape: torch.Size
    dtype: torch.dtype


class Linear(nn.Linear):
    """`nn.Linear` on `deepseek_kernels.dense_gemm`: the same parameters and result, fast on any CPU.

    A subclass, so that everything that looks for `nn.Linear` (LoRA, quantizers, hooks) finds it. A class that overrides
    `forward` states again what `dense_weight` and `takes_fp8` are: `declares` does not believe what it inherits.

    Attributes:
        scale_format: of the scales of activations, where the layer takes FP8: None for float32, or "ue8m0".
    """

    scale_format: str | None = None

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # where a draw would only make PyTorch import its compiler, for seconds
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies [..., in_features] by the weight -> [..., out_features]."""
        if type(self.weight) not in (nn.Parameter, Tensor):  # quantized (torchao) or sharded: torch knows what to do
            return F.linear(x, self.weight, self.bias)
        out = dense_gemm(x, self.weight)
        return out if self.bias is None else out + self.bias

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """Returns the matrix that the layer multiplies by, [out_features, in_features] in `dtype`."""
        return self.weight.to(dtype)

    def norm_consumers(self) -> tuple[nn.Module, ...]:
        """Returns the linear layers that alone read the input: this one."""
        return (self,)

    def takes_fp8(self, device: torch.device) -> bool:
        """Returns True if activations on this device become FP8 for the product, so that `QuantizedRows` may come."""
        return False

    @property
    def qconfig(self) -> Any:
        """Nothing: the setting by which torch.ao.quantization converts a layer.

        It finds layers by their exact class, sets None for all others, and would leave this one as it is in silence.
        """
        raise AttributeError(f"{type(self).__name__!r} has no 'qconfig'")

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        instead = "use torchao's quantize_, bitsandbytes, or this package's FP8"
        if value is not None:
            raise ValueError(f"expected no qconfig, got {value}: torch.ao.quantization cannot convert it; {instead}")
        warnings.warn(
            f"torch.ao.quantization converts no {type(self).__name__} of deepseek_arch, which is left as it is: "
            f"{instead}",
            stacklevel=2,
        )


class Embedding(nn.Embedding):
    """`nn.Embedding` that draws nothing on the meta device."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


@check_types
class MLP(nn.Module):
    """SwiGLU block of a dense layer, or the shared experts of a MoE layer (arXiv 2002.05202).

    Computes `down_proj(activation(gate_proj(x)) * up_proj(x))`; the activation of every published model is SiLU.
    """

    def __init__(
        self,
        hidden_size: Size,
        intermediate_size: Size,
        activation: str = "silu",
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        factory: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.gate_proj = Linear(hidden_size, intermediate_size, **factory)
        self.up_proj = Linear(hidden_size, intermediate_size, **factory)
        self.down_proj = Linear(intermediate_size, hidden_size, **factory)

    def norm_consumers(self) -> tuple[nn.Module, ...]:
        """Returns the linear layers that alone read the input."""
        return self.gate_proj, self.up_proj

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., hidden_size] to the same shape."""
        return self.down_proj(gated(self.activation, self.gate_proj(x), self.up_proj(x)))

    def extra_repr(self) -> str:
        return self.activation


def is_plain_module(module: nn.Module, *types: type[nn.Module]) -> bool:
    """Returns True if `module` is exactly of one of `types`, without hooks, offloading or a patched `forward`.

    Only then may its forward be bypassed. It is asked before each bypass, since hooks and patches come at any time, and
    reads attributes only: a cached answer would take the same reads to trust.
    """
    own = module.__dict__
    return type(module) in types and not (
        "forward" in own
        or "_hf_hook" in own  # accelerate's offloading
        or own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
        or _torch._global_forward_pre_hooks
        or _torch._global_forward_hooks
        or _torch._global_backward_pre_hooks
        or _torch._global_backward_hooks
    )


def declares(module: nn.Module, method: str) -> bool:
    """Returns True if `module` is a plain one of a class that defines `method` itself.

    What a subclass computes is not known to its base class, so an inherited answer does not count.
    """
    kind = type(module)
    return method in kind.__dict__ and is_plain_module(module, kind)


def is_plain_linear(module: nn.Module) -> bool:
    """Returns True if `module` is a plain linear layer, torch's or one that says what its matrix is."""
    return declares(module, "dense_weight") or is_plain_module(module, nn.Linear)


def dense_weight(module: nn.Module, dtype: torch.dtype) -> Tensor | None:
    """Returns the matrix [N, K] that is all of what a layer does, in `dtype`, or None if only its forward knows.

    None for a bias, a hook, an adapter, an offloaded layer or a sharded parameter.
    """
    if not is_plain_linear(module) or type(module.weight) not in (nn.Parameter, Tensor) or module.bias is not None:
        return None
    return module.weight.to(dtype) if type(module) is nn.Linear else module.dense_weight(dtype)


def fp8_weight(module: nn.Module) -> tuple[Tensor, Tensor, tuple[int, int]] | None:
    """Returns the FP8 values [N, K], the scales and the block size of the matrix that is all of what a layer does.

    None for a layer of another kind, and where `dense_weight` returns None.
    """
    if not declares(module, "fp8_weight") or type(module.weight) not in (nn.Parameter, Tensor):
        return None
    return module.fp8_weight() if module.bias is None else None
