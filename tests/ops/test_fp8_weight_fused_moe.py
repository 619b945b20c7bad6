"""fp8_weight_fused_moe: the definition as a loop in float64 over dequantized experts, the reference, and the C++."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepseek_kernels import dequantize_blocks, fp8_weight_fused_moe, quantize_blocks, use_backend
from deepseek_kernels.testing.numeric import assert_bitwise
from support.cpu_operators import cpu_instructions
from support.expert_bounds import EPS, assert_within, experts_loop

DTYPES = [torch.bfloat16, torch.float32]
BLOCKS = [(128, 128), (16, 24)]  # the second one ends within gate, and is no multiple of what a vector holds


@pytest.fixture(params=["reference", "native", "portable"])
def backend(request):
    """The C++ with and without AVX512-BF16."""
    if request.param == "reference":
        with use_backend("reference"):
            yield request.param
        return
    request.getfixturevalue("cpu_backend")
    with cpu_instructions(request.param):
        yield request.param


def operands(ids: Tensor, dtype: torch.dtype, blocks: tuple[int, int], hidden: int = 150, width: int = 40):
    """Operands of the operator; experts that no token chose are NaN."""
    experts = 7
    gate_up = torch.randn(experts, 2 * width, hidden) / hidden**0.5 * 2
    down = torch.randn(experts, hidden, width) / width**0.5
    pairs = [*quantize_blocks(gate_up, blocks, parts=2), *quantize_blocks(down, blocks)]
    idle = torch.bincount(ids.flatten(), minlength=experts + 1)[:experts] == 0
    for codes, scale in (pairs[:2], pairs[2:]):
        codes.view(torch.uint8)[idle] = 0x7F
        scale[idle] = torch.nan
    return torch.randn(len(ids), hidden).to(dtype), *pairs, ids, torch.rand(ids.shape) + 0.1, blocks


def dequantized(codes: Tensor, scale: Tensor, blocks: tuple[int, int], parts: int) -> Tensor:
    return dequantize_blocks(codes, scale, blocks, torch.float32, parts)


IDS = {
    "few of many experts": torch.tensor([[0, 4], [4, 2], [6, 0]]),
    "one token": torch.tensor([[5, 1, 3]]),
    "all to one": torch.full((21, 1), 3),
    "some served elsewhere": torch.tensor([[7, 0], [7, 7], [2, 7], [6, 2]]),
    "more tokens than are few": torch.arange(40).remainder(7)[:, None],
}


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", IDS)
def test_is_the_weighted_sum_of_experts(backend, name, dtype, blocks):
    given = operands(IDS[name], dtype, blocks)
    x, gate_up, gate_up_scale, down, down_scale, ids, weights, _ = given
    got = fp8_weight_fused_moe(*given)
    assert (got.shape, got.dtype) == (x.shape, dtype)
    wide = dequantized(gate_up, gate_up_scale, blocks, 2), dequantized(down, down_scale, blocks, 1)
    fused = backend != "reference" and len(ids) <= 32
    exact, bound = experts_loop(x, *wide, ids, weights, dtype, fused)
    if not fused and dtype == torch.bfloat16:
        # For many rows, where a CPU multiplies bfloat16, the reference rounds the weights of each product to it.
        bound = (
            bound + 3 * torch.finfo(dtype).eps * experts_loop(x.abs(), *(w.abs() for w in wide), ids, weights, dtype)[0]
        )
    assert_within(got, exact, bound + 4 * EPS * exact.abs())  # the products with scales


def test_gradients_are_those_of_the_sequence(backend):
    given = operands(IDS["few of many experts"], torch.float32, (128, 128))
    x, weights = given[0].clone().requires_grad_(), given[6].clone().requires_grad_()
    out = fp8_weight_fused_moe(x, *given[1:6], weights, given[7])
    got = torch.autograd.grad(out, (x, weights), torch.ones_like(out))
    with use_backend("reference"):
        expected = torch.autograd.grad(
            fp8_weight_fused_moe(x, *given[1:6], weights, given[7]), (x, weights), torch.ones_like(out)
        )
    assert_bitwise(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-5)  # each a sum over H, in another order


def test_compiled_gives_the_same(backend):
    torch.compiler.reset()
    given = operands(IDS["few of many experts"], torch.bfloat16, (128, 128))
    compiled = torch.compile(fp8_weight_fused_moe, fullgraph=True, backend="aot_eager")
    assert_bitwise(compiled(*given), fp8_weight_fused_moe(*given))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3, 149)}, r"expected x \[..., 150\]"),
        ({1: torch.zeros(7, 80, 150)}, "expected a float8_e4m3fn weight, got torch.float32"),
        ({2: torch.zeros(7, 1, 2)}, r"expected float32 scales \[7, 2, 2\]"),
        ({3: torch.zeros(7, 40, 150)}, r"expected down \[7, 150, 40\], got \[7, 40, 150\]"),
        ({4: torch.zeros(7, 2, 2)}, r"expected float32 scales \[7, 2, 1\]"),
        ({5: torch.zeros(2, 2, dtype=torch.int64)}, r"expected expert_ids \[3, K\], got \[2, 2\]"),
        ({6: torch.zeros(3, 1)}, r"expected weights \[3, 2\], got \[3, 1\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = dict(enumerate(operands(IDS["few of many experts"], torch.float32, (128, 128)))) | change
    with pytest.raises(ValueError, match=message):
        fp8_weight_fused_moe(*(given[i] for i in range(8)))
