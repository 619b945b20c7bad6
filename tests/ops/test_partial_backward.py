"""Backward passes that ask for one gradient of a product alone, as zero-bubble pipeline schedules do (TRAPS C15)."""

from __future__ import annotations

import pytest
import torch

from deepseek_kernels import dense_gemm, grouped_gemm, use_native_half_matmul
from support.small_models import error

OPS = torch.ops.deepseek_kernels


def products(kind):
    """Returns operands, the product, and the number of gradients that its backward operator has computed so far."""
    if kind == "grouped":
        x, weight = torch.randn(7, 6, requires_grad=True), torch.randn(3, 5, 6, requires_grad=True)
        ends = torch.tensor([2, 2, 6])
        return x, weight, lambda a, b: grouped_gemm(a, b, ends), "grouped_gemm_backward"
    x, weight = torch.randn(20, 6).bfloat16().requires_grad_(), torch.randn(5, 6).bfloat16().requires_grad_()
    return x, weight, dense_gemm, "dense_gemm_expanded_backward"


class Counter(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the gradients, of activations and of weights, that an operator is asked for."""

    def __init__(self, name):
        super().__init__()
        self.name, self.asked = name, [0, 0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.name in str(func):
            self.asked = [count + need for count, need in zip(self.asked, args[-2:], strict=True)]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["grouped", "dense"])
def test_each_gradient_is_computed_once(kind):
    with use_native_half_matmul(False):
        x, weight, product, name = products(kind)
        inner = x * 1  # a pass for a leaf's gradient alone would be noticed even by one node
        out = product(inner, weight)
        with Counter(name) as counter:
            (grad_x,) = torch.autograd.grad(out.float().sin().sum(), inner, retain_graph=True)
            assert counter.asked == [1, 0]
            (grad_weight,) = torch.autograd.grad(out.float().sin().sum(), weight)
            assert counter.asked == [1, 1]
        both = torch.autograd.grad(product(inner, weight).float().sin().sum(), (inner, weight))
    assert torch.equal(both[0], grad_x) and torch.equal(both[1], grad_weight)


def test_gradients_are_those_of_the_plain_product():
    x, weight, product, _ = products("grouped")
    grads = torch.autograd.grad(product(x, weight).sin().sum(), (x, weight))
    rows = [x[:2] @ weight[0].T, x[2:2] @ weight[1].T, x[2:6] @ weight[2].T]
    expected = torch.autograd.grad(torch.cat(rows).sin().sum(), (x, weight))
    assert all(error(got, want) < 1e-6 for got, want in zip(grads, expected, strict=True))


@pytest.mark.parametrize("which", ["x", "weight"])
def test_one_operand_without_a_gradient(which):
    x, weight, product, name = products("grouped")
    (x if which == "x" else weight).requires_grad_(False)
    with Counter(name) as counter:
        product(x, weight).sum().backward()
    assert counter.asked == ([0, 1] if which == "x" else [1, 0])
