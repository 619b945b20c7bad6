"""The derivative of a product with a weight, which several operators have in common."""

from __future__ import annotations

from torch import Tensor
from torch.library import CustomOpDef

__all__ = ["connect_product"]


def connect_product(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Makes `backward` the derivative of `forward`, and gives both their shapes for torch.compile.

    Args:
        forward: (x [M, K], weight [(E,) N, K], *others) -> [M, N].
        backward: (grad [M, N], x, weight, *others, need_x, need_weight) -> gradients of x and weight, contiguous; an
            empty tensor in place of one that is not needed.
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
