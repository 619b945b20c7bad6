"""Layers under FP8 training: how tests make and run them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepseek_arch.layers.linear import Linear
from deepseek_arch.quant.fp8_training import FP8, FP8Policy, FP8Rule, fp8_training
from support.small_models import config

EPS32 = torch.finfo(torch.float32).eps
ALL = FP8Policy((FP8Rule("*", FP8),))
# A dense layer, one with experts, and a prediction layer: every kind of weight once or twice.
SMALL = config(
    "v3",
    num_hidden_layers=2,
    num_nextn_predict_layers=1,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
)


def linear(inputs: int, outputs: int, policy: FP8Policy = ALL, bias: bool = False, dtype=torch.float32) -> Linear:
    layer = Linear(inputs, outputs, bias=bias, dtype=dtype)
    fp8_training(layer, policy)
    return layer


def wide(quantized: tuple[Tensor, Tensor], rows: int = 1) -> Tensor:
    """Returns codes times scales in float64, for groups of `rows` by 128."""
    codes, scale = quantized
    scale = scale.double().repeat_interleave(rows, 0)[: codes.shape[0]].repeat_interleave(128, 1)
    return codes.double() * scale[:, : codes.shape[1]]


def run(module: nn.Module, x: Tensor, grad: Tensor, *others: Tensor) -> list[Tensor]:
    """Returns the output and all gradients, the input's first."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    out = module(x, *others)
    out.backward(grad)
    return [out.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
