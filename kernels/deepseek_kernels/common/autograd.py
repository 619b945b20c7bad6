"""The derivative of a product with a weight, which several operators have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

__all__ = ["connect_product", "join_gradients"]


def connect_product(forward: CustomOpDef, backward: CustomOpDef) -> Callable[..., Tensor]:
    """Makes `backward` the derivative of `forward`, and gives both their shapes for torch.compile.

    Args:
        forward: (x [M, K], weight [(E,) N, K], *others) -> [M, N].
        backward: (grad [M, N], x, weight, *others, need_x, need_weight) -> gradients of x and weight, contiguous; an
            empty tensor in place of one that is not needed.

    Returns:
        The product to call: the same numbers, and a gradient for each operand in a node of its own. A backward pass
        that asks for one of them alone (zero-bubble pipeline schedules ask for that of the activations first) then
        computes one alone; a single node computes both each time, since it is not told which is asked for.
    """

    def forward_shape(x: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], weight.shape[-2])

    def backward_shapes(grad: Tensor, x: Tensor, weight: Tensor, *others) -> tuple[Tensor, Tensor]:
        need_x, need_weight = others[-2:]
        return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)

    def save(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    def differentiate(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_weight, *others = ctx.needs_input_grad
        grad_x, grad_weight = backward(grad, *ctx.saved_tensors, need_x, need_weight)
        return grad_x if need_x else None, grad_weight if need_weight else None, *(None for _ in others)

    forward.register_fake(forward_shape)
    backward.register_fake(backward_shapes)
    forward.register_autograd(differentiate, setup_context=save)

    def product(x: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad and weight.requires_grad):
            return forward(x, weight, *others)
        value = forward(x, weight.detach(), *others)
        return join_gradients(value, _WeightGradient.apply(weight, x.detach(), backward, *others))

    return product


def join_gradients(value: Tensor, stand_in: Tensor) -> Tensor:
    """Returns a product, whose gradient goes to two nodes.

    Args:
        value: the product, connected to the activations alone.
        stand_in: like it in shape and dtype, connected to the weight alone; its values are not read.
    """
    return _Join.apply(value, stand_in)


class _WeightGradient(torch.autograd.Function):
    """Stands for a product with a tensor of its shape that takes no memory; its gradient is the weight's."""

    @staticmethod
    def forward(weight: Tensor, x: Tensor, backward: CustomOpDef, *others: Tensor) -> Tensor:
        return x.new_zeros(()).expand(x.shape[0], weight.shape[-2])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, x, ctx.product_backward, *others = inputs
        ctx.save_for_backward(weight, x, *others)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, x, *others = ctx.saved_tensors
        _, grad_weight = ctx.product_backward(grads[0], x, weight, *others, False, True)
        return grad_weight, None, None, *(None for _ in others)


class _Join(torch.autograd.Function):
    """Returns the product; its gradient goes to both nodes."""

    @staticmethod
    def forward(value: Tensor, weight_gradient: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Saves nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]
