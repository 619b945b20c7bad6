"""The kernels of hadamard and hadamard_quantize against their reference, bit by bit."""

from __future__ import annotations

import pytest
import torch

from deepseek_kernels import BackendError, hadamard, hadamard_quantize, use_backend
from deepseek_kernels.quant.hadamard_quantize import configs
from deepseek_kernels.testing.numeric import assert_bitwise


@pytest.fixture(autouse=True)
def kernels(triton_backend):
    with use_backend("triton"):
        yield


@pytest.fixture(params=["one row", "many rows"])
def tiles(request, monkeypatch):
    """Either kind of program, whatever the size."""
    monkeypatch.setattr(configs, "ENOUGH_PROGRAMS", 0 if request.param == "many rows" else 10**9)
    monkeypatch.setattr(configs, "_VALUES", 256)


def assert_same(x: torch.Tensor) -> None:
    with use_backend("reference"):
        want = hadamard(x), *(hadamard_quantize(x, kind) for kind in (None, "ue8m0"))
    got = hadamard(x), *(hadamard_quantize(x, kind) for kind in (None, "ue8m0"))
    assert_bitwise(
        got[0].nan_to_num(nan=-1.0), want[0].nan_to_num(nan=-1.0), strides=False
    )  # a NaN may have any payload
    assert torch.equal(got[0].isnan(), want[0].isnan())
    for mine, theirs in zip(got[1:], want[1:], strict=True):
        assert_bitwise(mine[0], theirs[0])
        assert_bitwise(mine[1], theirs[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 2), (3, 16), (9, 64), (7, 128), (3, 512), (1, 1024)])
def test_equals_the_reference(tiles, device, dtype, rows, width):
    x = torch.randn(rows, width).to(dtype)
    x[0] = 0
    x[-1] *= 1000
    assert_same(x.to(device))


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN slice) encountered:RuntimeWarning")  # by numpy
@pytest.mark.parametrize("width", [64, 256])
def test_nan_and_infinity(tiles, device, width):
    x = torch.randn(6, width)
    x[0, 3], x[1, 5], x[2, 1], x[3, :2] = torch.nan, torch.inf, -torch.inf, torch.inf
    x[4], x[5] = 1e-42, -0.0
    assert_same(x.to(device))


def test_is_bit_by_bit_the_same_in_any_layout(device):
    x = torch.randn(3, 4, 64).bfloat16().to(device)
    for other in (
        torch.cat([x, x], -1)[..., :64],
        torch.stack([x, x], -1)[..., 0],
        x.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert_bitwise(hadamard(other), hadamard(x))
        rows = other.reshape(-1, 64)
        for mine, theirs in zip(hadamard_quantize(rows), hadamard_quantize(x.reshape(-1, 64)), strict=True):
            assert_bitwise(mine, theirs)


def test_gradient_is_the_rotation_of_the_gradient(device):
    x, grad = torch.randn(3, 16, device=device, requires_grad=True), torch.randn(3, 16, device=device)
    (got,) = torch.autograd.grad(hadamard(x), x, grad)
    assert_bitwise(got, hadamard(grad))
    (second,) = torch.autograd.grad(
        torch.autograd.grad(hadamard(x), x, grad.requires_grad_(), create_graph=True), grad, x
    )
    assert_bitwise(second.detach(), hadamard(x).detach())


def test_nothing_to_do_and_what_runs_on_the_reference(device):
    assert hadamard(torch.zeros(0, 8, device=device)).shape == (0, 8)
    codes, scales = hadamard_quantize(torch.zeros(0, 256, device=device))
    assert codes.shape == (0, 256) and scales.shape == (0, 2)
    with pytest.raises(BackendError, match="at most 1024 values, got 2048"):
        hadamard(torch.zeros(1, 2048, device=device))
    with pytest.raises(BackendError, match=r"rows are float32, bfloat16 or float16, got torch.float64"):
        hadamard(torch.zeros(1, 8, device=device, dtype=torch.float64))
    with use_backend("auto"):
        assert hadamard(torch.zeros(1, 2048, device=device)).shape == (1, 2048)


def test_rules_of_tiles():
    assert configs.rows_for(2**19, 128) == 32 and configs.rows_for(64, 128) == 1
    assert configs.options_for(32, 128)["num_warps"] == 4 and configs.options_for(1, 128)["num_warps"] == 1


def test_compiled_gives_the_same(device):
    torch.compiler.reset()
    x = torch.randn(5, 64, device=device)
    assert_bitwise(torch.compile(hadamard, fullgraph=True, backend="aot_eager")(x), hadamard(x))
    compiled = torch.compile(hadamard_quantize, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(compiled(x), hadamard_quantize(x), strict=True):
        assert_bitwise(mine, theirs)


def test_custom_operators_are_registered_properly(device):
    from deepseek_kernels.quant.hadamard_quantize import launch

    x = torch.randn(5, 64, device=device)
    torch.library.opcheck(launch.hadamard, (x.clone().requires_grad_(),))
    torch.library.opcheck(launch.hadamard_quantize, (x, True))
