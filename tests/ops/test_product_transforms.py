"""Forward-mode AD and the transforms of `torch.func` on products that are custom operators: none loses a tangent."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from deepseek_kernels import (
    dequantize_blocks,
    fp8_weight_gemm,
    fp8_weight_grouped_gemm,
    grouped_gemm,
    quantize_blocks,
    use_backend,
)
from deepseek_kernels.gemm.dense_gemm.reference import dense_gemm_expanded

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop.*:UserWarning")

SEEDED = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(3, 6, 8, generator=SEEDED)
CODES, SCALE = quantize_blocks(WEIGHT, (4, 4))
EXACT = dequantize_blocks(CODES, SCALE, (4, 4), torch.float32)
ENDS = torch.tensor([2, 2, 4])  # of 5 rows: the last is unassigned
EXPERT = torch.tensor([0, 0, 2, 2])
HALF = WEIGHT[0].bfloat16()


def by_expert(x: Tensor, weight: Tensor) -> Tensor:
    rows = torch.einsum("pk,pnk->pn", x[:4], weight[EXPERT])
    return torch.cat((rows, torch.zeros_like(rows[:1])))


# Functions of x [5, 8], and the same in PyTorch's own operators.
PRODUCTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "grouped_gemm": (lambda x: grouped_gemm(x, WEIGHT, ENDS), lambda x: by_expert(x, WEIGHT)),
    "its weight": (
        lambda x: grouped_gemm(torch.ones(5, 8), x[0] * WEIGHT, ENDS),
        lambda x: by_expert(torch.ones(5, 8), x[0] * WEIGHT),
    ),
    "both": (lambda x: grouped_gemm(x, x[0] * WEIGHT, ENDS), lambda x: by_expert(x, x[0] * WEIGHT)),
    "fp8_weight_gemm": (lambda x: fp8_weight_gemm(x, CODES[0], SCALE[0], (4, 4)), lambda x: x @ EXACT[0].T),
    "fp8_weight_grouped_gemm": (
        lambda x: fp8_weight_grouped_gemm(x, CODES, SCALE, ENDS, (4, 4)),
        lambda x: by_expert(x, EXACT),
    ),
}


@pytest.fixture(autouse=True)
def backend() -> Iterator[None]:
    with use_backend("reference"):
        yield


def square(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x).square().sum()


def close(found: Tensor, right: Tensor) -> None:
    assert right.any()
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4 * float(right.detach().abs().max()))


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", PRODUCTS)
def test_tangents(name, recorded):
    function, right = PRODUCTS[name]
    x, direction = torch.randn(5, 8, requires_grad=recorded), torch.randn(5, 8)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))).tangent
    assert found is not None
    close(found, torch.func.jvp(right, (x,), (direction,))[1])


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]] = {
    "jvp": lambda function, x, direction: torch.func.jvp(function, (x,), (direction,))[1],
    "jacfwd": lambda function, x, direction: torch.func.jacfwd(function)(x),
    "grad": lambda function, x, direction: torch.func.grad(square(function))(x),
    "jvp of grad": lambda function, x, direction: torch.func.jvp(torch.func.grad(square(function)), (x,), (direction,))[
        1
    ],
    "grad of jvp": lambda function, x, direction: torch.func.grad(
        lambda x: torch.func.jvp(square(function), (x,), (direction,))[1]
    )(x),
    "hessian": lambda function, x, direction: torch.func.hessian(square(function))(x),
    "vmap": lambda function, x, direction: torch.func.vmap(function)(torch.stack((x, direction))),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_transforms(name, transform):
    (function, right), run = PRODUCTS[name], TRANSFORMS[transform]
    x, direction = torch.randn(5, 8), torch.randn(5, 8)
    close(run(function, x, direction), run(right, x, direction))


@pytest.mark.parametrize("name", ["grouped_gemm", "both"])
def test_parameters_are_constants_of_a_transform(name, monkeypatch):
    """Those of a model require gradients, which no transform asks for."""
    x, direction = torch.randn(5, 8), torch.randn(5, 8)
    expected = torch.func.jvp(PRODUCTS[name][1], (x,), (direction,))[1]
    monkeypatch.setitem(globals(), "WEIGHT", nn.Parameter(WEIGHT))
    close(torch.func.jvp(PRODUCTS[name][0], (x,), (direction,))[1], expected)


def test_the_expanded_product():
    """A product is linear, so that its tangent is the product of the tangent, to the bit."""
    x, direction = torch.randn(20, 8).bfloat16(), torch.randn(20, 8).bfloat16()
    found = torch.func.jvp(lambda x: dense_gemm_expanded(x, HALF), (x,), (direction,))[1]
    assert found.any() and torch.equal(found, dense_gemm_expanded(direction, HALF))
    turned = torch.randn(6, 8).bfloat16()
    found = torch.func.jvp(lambda weight: dense_gemm_expanded(x, weight), (HALF,), (turned,))[1]
    assert found.any() and torch.equal(found, dense_gemm_expanded(x, turned))


def test_compiled_gradients_stay():
    """Compiled code sees operators, not the rules of transforms."""
    torch.compiler.reset()
    x, weight = torch.randn(5, 8, requires_grad=True), WEIGHT.clone().requires_grad_()
    compiled = torch.compile(lambda x, w: grouped_gemm(x, w, ENDS).square().sum(), backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x, weight), (x, weight))
    right = torch.autograd.grad(by_expert(x, weight).square().sum(), (x, weight))
    for one, other in zip(found, right, strict=True):
        close(one, other)
