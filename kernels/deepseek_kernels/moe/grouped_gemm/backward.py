"""What the two implementations of `grouped_gemm` share: shapes for torch.compile, and which product is a gradient."""

from __future__ import annotations

from torch import Tensor
from torch.library import CustomOpDef

__all__ = ["connect"]


def connect(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Makes `backward` the derivative of `forward`, and gives both their fakes.

    Args:
        forward: (x [P, K], weight [E, N, K], ends [E]) -> [P, N].
        backward: (grad [P, N], x, weight, ends, need_x, need_weight) -> gradients of x and weight, contiguous; of what
            is not needed, an empty tensor.
    """

    def fake_forward(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], weight.shape[1])

    def fake_backward(
        grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor, need_x: bool, need_weight: bool
    ) -> tuple[Tensor, Tensor]:
        return (
            x.new_empty(x.shape if need_x else 0),
            weight.new_empty(weight.shape if need_weight else 0),
        )

    def remember(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    def differentiate(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        grad_x, grad_weight = backward(grad, x, weight, ends, need_x, need_weight)
        return grad_x if need_x else None, grad_weight if need_weight else None, None

    forward.register_fake(fake_forward)
    backward.register_fake(fake_backward)
    forward.register_autograd(differentiate, setup_context=remember)
