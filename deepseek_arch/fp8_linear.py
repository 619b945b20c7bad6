"""Layers whose weights stay what a published checkpoint holds: e4m3 codes beside the scales of their blocks.

No product of a layer expands its weight as a whole (absorbed attention, which multiplies with a part of kv_b_proj for
each head, does). There are two, chosen by a layer's `activations`:

- W8A8: the activations become FP8 too, in groups of 1 x 128, and the product is one of FP8 with FP8, as DeepSeek's own
  inference has it (`fp8_gemm`). "auto" takes it where the device multiplies FP8.
- W8A16: the activations stay what they are and the weight is expanded tile by tile inside the product
  (`fp8_weight_gemm`): exact against the dequantized weight, on every device. "auto" takes it everywhere else.

Gradients of the activations, which adapters need, see the dequantized weight in both products.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

import torch
from torch import Tensor, nn

from deepseek_kernels import (
    dense_gemm,
    dispatch,
    fp8_gemm,
    fp8_grouped_gemm,
    fp8_weight_gemm,
    fp8_weight_grouped_gemm,
    grouped_gemm,
    permute,
    quantize_rows,
    sort_by_expert,
    swiglu_quantize,
    unpermute,
)

from .config import DeepseekConfig
from .fp8 import FP8_QUANTIZATION, scale_format_of
from .fp8_layer import GROUP, FP8Layer, QuantizedProduct, QuantizedRows
from .linear import Linear
from .mlp import swiglu
from .moe import Experts
from .state_dict import layout

__all__ = ["FP8Experts", "FP8Linear", "dequantize", "fp8_layers", "keep_fp8"]


class FP8Linear(FP8Layer, Linear):
    """A linear layer whose weight stays in FP8.

    Parameters:
        weight: [out_features, in_features] float8_e4m3fn.
        weight_scale_inv: [ceil(out_features / block_rows), ceil(in_features / block_columns)] float32; despite its name
            what the codes are multiplied by (TRAPS E1).
        bias: [out_features] in `dtype`, if there is one.
    """

    held: ClassVar = {"weight": 1}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        block_size: tuple[int, int] = GROUP,
        *,
        scale_format: str | None = None,
        device=None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._hold({"weight": (out_features, in_features)}, block_size, scale_format, device, dtype)
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))

    @classmethod
    def quantize(
        cls, linear: nn.Linear, block_size: tuple[int, int] = GROUP, scale_format: str | None = None
    ) -> FP8Linear:
        """The same layer with its weight in FP8, and the same bias; on the meta device only the shapes.

        Raises:
            ValueError: a weight is not finite.
        """
        sizes, dtype = (linear.in_features, linear.out_features), linear.weight.dtype
        made = cls(*sizes, False, block_size, scale_format=scale_format, device="meta", dtype=dtype)
        made.quantize_(weight=linear.weight)
        made.bias = linear.bias
        return made.train(linear.training)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix that the layer multiplies by, [out_features, in_features] in `dtype` (default `compute_dtype`)."""
        return self.values("weight", dtype or self.compute_dtype)

    def reads_fp8(self, device: torch.device) -> bool:
        """Whether activations on this device become FP8 for the product."""
        return not hasattr(self, "parametrizations") and self._quantizes("fp8_gemm", device)

    def forward(self, x: Tensor | QuantizedRows) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if isinstance(x, QuantizedRows):
            out = fp8_gemm(x.codes, x.scale, self.weight, self.weight_scale_inv, x.dtype)
            out = out.reshape(*x.shape[:-1], self.out_features)
            return out if self.bias is None else out + self.bias
        (x,) = dispatch.autocast(x)
        if hasattr(self, "parametrizations"):
            out = dense_gemm(x, self.dequantize(x.dtype))
        elif self.reads_fp8(x.device):
            rows = x.reshape(-1, self.in_features)
            out = QuantizedProduct.apply(rows, self.weight, self.weight_scale_inv, None, 1, self.scale_format, x.dtype)
            out = out.reshape(*x.shape[:-1], self.out_features)
        else:
            out = fp8_weight_gemm(x, self.weight, self.weight_scale_inv, self.block_size)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._describe()}"


class FP8Experts(FP8Layer, Experts):
    """E SwiGLU experts whose weights stay in FP8.

    Parameters:
        gate_up_proj: [E, 2 I, H] float8_e4m3fn, each expert's gate rows above its up rows.
        gate_up_proj_scale_inv: [E, 2 ceil(I / block_rows), ceil(H / block_columns)] float32: gate and up are two
            matrices with a grid each, as they are published, also where a block would reach from one into the other.
        down_proj: [E, H, I] float8_e4m3fn.
        down_proj_scale_inv: [E, ceil(H / block_rows), ceil(I / block_columns)] float32.
    """

    held: ClassVar = {"gate_up_proj": 2, "down_proj": 1}

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        block_size: tuple[int, int] = GROUP,
        *,
        scale_format: str | None = None,
        device=None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.hidden_dim, self.intermediate_dim = num_experts, hidden_size, intermediate_size
        shapes = {
            "gate_up_proj": (num_experts, 2 * intermediate_size, hidden_size),
            "down_proj": (num_experts, hidden_size, intermediate_size),
        }
        self._hold(shapes, block_size, scale_format, device, dtype)

    @classmethod
    def quantize(
        cls, experts: Experts, block_size: tuple[int, int] = GROUP, scale_format: str | None = None
    ) -> FP8Experts:
        """The same experts with their weights in FP8; on the meta device only the shapes.

        Raises:
            ValueError: a weight is not finite.
        """
        sizes, dtype = (experts.num_experts, experts.hidden_dim, experts.intermediate_dim), experts.gate_up_proj.dtype
        made = cls(*sizes, block_size, scale_format=scale_format, device="meta", dtype=dtype)
        made.quantize_(gate_up_proj=experts.gate_up_proj, down_proj=experts.down_proj)
        return made.train(experts.training)

    def dequantize(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """gate_up_proj [E, 2 I, H] and down_proj [E, H, I] in `dtype` (default `compute_dtype`)."""
        dtype = dtype or self.compute_dtype
        return self.values("gate_up_proj", dtype), self.values("down_proj", dtype)

    def forward(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """As `Experts.forward`."""
        (x,) = dispatch.autocast(x)
        order, inverse, ends = sort_by_expert(expert_ids, self.pair("gate_up_proj")[0].shape[0])
        if not hasattr(self, "parametrizations") and self._quantizes("fp8_grouped_gemm", x.device):
            out = self._quantized(x, order, inverse, ends)
        else:
            rows = permute(x, order, inverse)  # [T K, H]
            gate, up = self._product(rows, "gate_up_proj", ends).chunk(2, dim=-1)  # [T K, I] each
            out = self._product(swiglu(gate, up), "down_proj", ends)  # [T K, H]
        return unpermute(out, weights, order, inverse)

    def _product(self, rows: Tensor, name: str, ends: Tensor) -> Tensor:
        if name in getattr(self, "parametrizations", ()):
            return grouped_gemm(rows, self.values(name, rows.dtype), ends)
        return fp8_weight_grouped_gemm(rows, *self.pair(name), ends, self.block_size, self.held[name])

    def _quantized(self, x: Tensor, order: Tensor, inverse: Tensor, ends: Tensor) -> Tensor:
        """The W8A8 products. With gradients they are two functions of high-precision rows, with the same numbers."""
        up, down, form = self.pair("gate_up_proj"), self.pair("down_proj"), self.scale_format
        if torch.is_grad_enabled() and x.requires_grad:
            rows = permute(x, order, inverse)
            gate_up = QuantizedProduct.apply(rows, *up, ends, 2, form, x.dtype)
            hidden = swiglu(*gate_up.float().chunk(2, dim=-1))  # not rounded, as in `swiglu_quantize`
            return QuantizedProduct.apply(hidden, *down, ends, 1, form, x.dtype)
        # A token is quantized once, not once for each of its experts.
        codes, scale = quantize_rows(x, form)
        codes = permute(codes.view(torch.uint8), order, inverse).view(torch.float8_e4m3fn)
        gate_up = fp8_grouped_gemm(codes, permute(scale, order, inverse), *up, ends, x.dtype, 2)
        return fp8_grouped_gemm(*swiglu_quantize(gate_up, form), *down, ends, x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._describe()}"


def fp8_layers(model: nn.Module) -> dict[str, FP8Layer]:
    """The layers of a model that hold FP8 weights, by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FP8Layer)}


def keep_fp8(
    model: nn.Module,
    block_size: tuple[int, int] = GROUP,
    parameters: Collection[str] | None = None,
    scale_format: str | None = None,
) -> nn.Module:
    """Replaces the layers that the published FP8 checkpoints store in FP8, in place and one at a time.

    These are attention's projections, MLPs and experts, in prediction layers too; never the embedding, head, router,
    norms and eh_proj (TRAPS E7).

    Args:
        model: with memory, where weights are rounded to FP8, or on the meta device, where only the layers change.
        parameters: names of weights to keep in FP8 instead of all of those; both of a layer's experts or neither.
        scale_format: None or "ue8m0", of the scales, those of quantized activations included.

    Returns:
        `model`. The config of a `DeepseekLM` says that it is FP8.

    Raises:
        ValueError: a weight is not finite, or a parameter belongs to no linear layer and no experts.
    """
    config = getattr(model, "config", None)
    if parameters is None:
        if not isinstance(config, DeepseekConfig):
            raise ValueError(f"expected a DeepseekLM or the names of parameters, got {type(model).__name__}")
        parameters = [slot.parameter for slot in layout(config) if slot.fp8]
    paths = list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
    todo = [path for path in paths if _to_quantize(model, path, block_size)]
    for path in todo:
        layer = model.get_submodule(path)
        kind = FP8Experts if isinstance(layer, Experts) else FP8Linear
        _replace(model, path, kind.quantize(layer, block_size, scale_format))
    if not isinstance(config, DeepseekConfig):
        return model
    said = scale_format_of(config.quantization_config)
    if config.weight_block_size != tuple(block_size) or (todo and said != scale_format):
        formats = {"scale_fmt": scale_format} if scale_format else {}
        _describe_as(model, {**FP8_QUANTIZATION, "weight_block_size": list(block_size), **formats})
    return model


def _to_quantize(model: nn.Module, path: str, block_size: tuple[int, int]) -> bool:
    """Whether a layer is yet to become FP8; raises ValueError where it cannot, before any other one has."""
    layer = model.get_submodule(path)
    if isinstance(layer, FP8Layer):
        if tuple(layer.block_size) != tuple(block_size):
            raise ValueError(
                f"expected {path} to have FP8 blocks of {list(block_size)}, got {list(layer.block_size)} already"
            )
        return False
    if not isinstance(layer, Experts | nn.Linear):
        raise ValueError(f"expected {path} to be a linear layer or experts, got {type(layer).__name__}")
    for name, parameter in layer.named_parameters(recurse=False):
        if not parameter.is_meta and not bool(parameter.isfinite().all()):
            raise ValueError(f"expected finite weights in {path}.{name}, got NaN or infinity")
    return True


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replaces FP8 layers by ordinary ones with the values that they mean, in place and one at a time.

    Args:
        dtype: of the weights; default each layer's `compute_dtype`.

    Returns:
        `model`, trainable, with nothing in its config that says FP8 (TRAPS E12).
    """
    for path in list(fp8_layers(model)):
        layer = model.get_submodule(path)
        _replace(model, path, _ordinary(layer, dtype or layer.compute_dtype))
    _describe_as(model, None)
    return model


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


def _ordinary(layer: FP8Layer, dtype: torch.dtype) -> nn.Module:
    """On the meta device first, so that no weights are drawn only to be replaced."""
    if isinstance(layer, FP8Experts):
        sizes = layer.num_experts, layer.hidden_dim, layer.intermediate_dim
        plain: nn.Module = Experts(*sizes, device="meta", dtype=dtype)
    else:
        plain = Linear(layer.in_features, layer.out_features, bias=False, device="meta", dtype=dtype)
        plain.bias = layer.bias
    for name in layer.held:
        codes, _ = layer.pair(name)
        values = torch.empty(codes.shape, dtype=dtype, device="meta") if codes.is_meta else layer.values(name, dtype)
        setattr(plain, name, nn.Parameter(values))
    return plain.train(layer.training)


def _describe_as(model: nn.Module, quantization: dict | None) -> None:
    for part in model.modules():
        if isinstance(getattr(part, "config", None), DeepseekConfig):
            part.config = part.config.replace(quantization_config=quantization)
