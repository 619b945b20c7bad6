"""The derivative of a product with a weight, which several operators have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import CustomOpDef

__all__ = ["connect_product", "join_gradients", "transformed", "transformed_product"]


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

    def input_gradient(grad: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
        return product(grad, weight.mT, *others)

    def product(x: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
        if transformed():
            return transformed_product(forward, input_gradient, backward, x, weight, *others)
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


def transformed() -> bool:
    """Returns True in forward-mode AD, where operators without a rule drop tangents in silence, and `torch.func`."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see dispatch: Dynamo guards both itself


def transformed_product(
    forward: Callable[..., Tensor],
    input_gradient: Callable[..., Tensor],
    backward: Callable[..., tuple[Tensor, Tensor]] | None,
    x: Tensor,
    weight: Tensor,
    *others: Any,
) -> Tensor:
    """Computes `forward(x, weight, *others)`, with tangents and derivatives for the transforms of `torch.func`.

    Args:
        forward: linear in x and in the weight.
        input_gradient: (grad, weight, *others) -> the gradient of x, differentiable itself.
        backward: as for `connect_product`, or None for a weight that has no gradient.
    """
    out: Tensor = _Transformed.apply(forward, input_gradient, backward, x, weight, *others)
    return out


class _Saving(torch.autograd.Function):
    """Keeps two operands, and whatever stands behind them, for both modes of differentiation."""

    generate_vmap_rule = True

    @staticmethod
    def keep(ctx: Any, first: Tensor, second: Tensor, others: tuple[Any, ...]) -> None:
        tensors = [one for one in others if isinstance(one, Tensor)]
        ctx.save_for_backward(first, second, *tensors)
        ctx.save_for_forward(first, second, *tensors)
        ctx.others = [None if isinstance(one, Tensor) else (one,) for one in others]
        ctx.set_materialize_grads(False)

    @staticmethod
    def kept(ctx: Any) -> tuple[Any, ...]:
        first, second, *tensors = ctx.saved_tensors
        return first, second, *(tensors.pop(0) if one is None else one[0] for one in ctx.others)

    @staticmethod
    def tangent(function: Callable[..., Tensor], kept: tuple[Any, ...], of: tuple[Tensor | None, ...]) -> Tensor | None:
        """Returns the tangent of a bilinear function of the first two operands."""
        first, second, *others = kept
        terms = [] if of[0] is None else [function(of[0], second, *others)]
        terms += [] if of[1] is None else [function(first, of[1], *others)]
        return sum(terms[1:], terms[0]) if terms else None


class _Transformed(_Saving):
    @staticmethod
    def forward(forward: Any, input_gradient: Any, backward: Any, x: Tensor, weight: Tensor, *others: Any) -> Tensor:
        # Detached: parameters that are constants of the transform would still be recorded by the operator's own rule.
        return forward(x.detach(), weight.detach(), *others)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.product, ctx.input_gradient, ctx.product_backward, x, weight, *others = inputs
        _Saving.keep(ctx, x, weight, tuple(others))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        def product(*operands: Any) -> Tensor:
            return transformed_product(ctx.product, ctx.input_gradient, ctx.product_backward, *operands)

        return _Saving.tangent(product, _Saving.kept(ctx), tangents[3:5])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, weight, *others = _Saving.kept(ctx)
        need_x, need_weight = ctx.needs_input_grad[3:5]
        grad_x = ctx.input_gradient(grads[0], weight, *others) if need_x else None
        grad_weight = None
        if need_weight and ctx.product_backward is not None:
            grad_weight = _TransformedWeightGradient.apply(ctx.product_backward, grads[0], x, weight.detach(), *others)
        return None, None, None, grad_x, grad_weight, *(None for _ in others)


class _TransformedWeightGradient(_Saving):
    """The gradient of the weight, which has tangents, and no gradient of its own: autograd says so."""

    @staticmethod
    def forward(backward: Any, grad: Tensor, x: Tensor, weight: Tensor, *others: Any) -> Tensor:
        return backward(grad.detach(), x.detach(), weight.detach(), *others, False, True)[1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.product_backward, grad, x, *others = inputs
        _Saving.keep(ctx, grad, x, tuple(others))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        def weight_gradient(*operands: Any) -> Tensor:
            gradient: Tensor = _TransformedWeightGradient.apply(ctx.product_backward, *operands)
            return gradient

        return _Saving.tangent(weight_gradient, _Saving.kept(ctx), tangents[1:3])


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
