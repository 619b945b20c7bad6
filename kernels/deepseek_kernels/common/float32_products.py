"""Products of float32 on a CPU by oneDNN, where the built-in ones (MKL's) do not use all of its instructions.

MKL leaves AVX-512 to processors of its own maker: on an AMD one with AVX-512 (measured on Zen 5) oneDNN takes half its
time from a few rows on, for all three products of a layer. Small products lose: a call of oneDNN costs ten
microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

__all__ = ["by_onednn", "prefers_onednn", "product", "use_onednn"]

# Below, the built-in product is as fast: measured at weights of [64, 128] to [10944, 2048] and 1 to 1024 rows.
_LEAST_ROWS, _LEAST_PRODUCTS = 2, 1 << 21
_TENSORS = (Tensor, nn.Parameter)  # a subclass knows by itself what its product is


def _processor_prefers_onednn() -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # another system than Linux
        return False


_preferred: bool = _processor_prefers_onednn()  # a plain global, as dispatch's


def prefers_onednn() -> bool:
    """Tells if large float32 products run on oneDNN: `use_onednn`'s choice, else the processor's."""
    return _preferred


@contextmanager
def use_onednn(wanted: bool) -> Iterator[None]:
    """Runs large float32 products inside the block on oneDNN, or on the built-in; for tests and benchmarks."""
    global _preferred
    previous, _preferred = _preferred, wanted and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    try:
        yield
    finally:
        _preferred = previous


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Returns True if `product` of these operands runs on oneDNN. A user who turns oneDNN off in torch does it here.

    Whatever traces or transforms operators gets the built-in product: it knows its shapes, batches and derivatives.
    """
    if not _preferred or x.dtype != torch.float32 or weight.dtype != torch.float32 or weight.ndim != 2 or x.ndim < 2:
        return False
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if type(x) not in _TENSORS or type(weight) not in _TENSORS:
        return False
    rows, (outputs, depth) = x.numel() // max(1, x.shape[-1]), weight.shape
    if x.shape[-1] != depth or rows < _LEAST_ROWS or rows * outputs * depth < _LEAST_PRODUCTS:
        return False
    return not _observed() and torch._C._get_mkldnn_enabled()


def _observed() -> bool:
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.jit.is_tracing() or forward_ad._current_level >= 0


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Computes `x @ weight.T` in float32, differentiable as often as the built-in product.

    Args:
        x: [..., K], of any strides.
        weight: [N, K], likewise.

    Returns:
        [..., N].
    """
    # The first three are asked again: they end the many small products of a decode step with few calls.
    small = not _preferred or torch.compiler.is_dynamo_compiling() or x.numel() * weight.shape[0] < _LEAST_PRODUCTS
    if small or not by_onednn(x, weight):
        return F.linear(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out: Tensor = _Product.apply(x.flatten(0, -2), weight)
    else:
        out = _multiply(x.flatten(0, -2), weight)
    return out if x.ndim == 2 else out.unflatten(0, x.shape[:-1])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad
        grad_x = product(grad, weight.T) if need_x else None
        return grad_x, product(grad.T, x.T) if need_weight else None


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(weight), None, "none", [], "")


def _dense(x: Tensor) -> Tensor:
    """Returns the matrix, copied if its strides are neither those of rows nor of columns (an expanded gradient's)."""
    rows, columns = x.stride()
    by_rows, by_columns = columns == 1 and rows >= x.shape[1], rows == 1 and columns >= x.shape[0]
    return x if by_rows or by_columns else x.contiguous()
