"""RMS norm against float64, and its kernels bit by bit, but for the reciprocal root, whose last bits are bounded."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deepseek_kernels import BackendError, use_backend
from deepseek_kernels.norm.rms_norm import add_rms_norm, rms_norm
from deepseek_kernels.testing.numeric import assert_bitwise

# numpy's, in the interpreter
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

EPS = 1e-6
UNIT = 2.0**-24  # half an ulp of float32, relative: what one rounding costs at most
PAIRS = [  # of x and of the weight
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),  # the product is float32
    (torch.float32, torch.float32),
    (torch.float16, torch.bfloat16),  # the product is float32
]


@pytest.fixture(params=["reference", "triton", "cpu"])
def backend(request):
    if request.param != "reference":
        request.getfixturevalue(f"{request.param}_backend")
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def launch(triton_backend):
    from deepseek_kernels.norm.rms_norm import launch

    with use_backend("triton"):
        yield launch


def operands(shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype, device) -> tuple[Tensor, ...]:
    """x and residual of very different size from row to row, and a weight."""
    x, residual = torch.randn(2, *shape) * 2.0 ** torch.randint(-6, 6, (*shape[:-1], 1))
    return x.to(device, dtype), residual.to(device, dtype), (0.5 + torch.rand(shape[-1])).to(device, weight_dtype)


def plain_loop(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula in float64, row by row."""
    rows, weight = x.double().reshape(-1, x.shape[-1]), weight.double()
    out = [weight * row / torch.sqrt((row * row).sum() / len(row) + eps) for row in rows]
    return torch.stack(out).reshape(x.shape)


def exact_rstd(x: Tensor, eps: float) -> Tensor:
    return 1 / (x.double().square().mean(-1) + eps).sqrt()


def rstd_error(additions: int) -> float:
    """Bound of float32's relative distance from `exact_rstd`, if no number goes through more additions than these.

    All terms are positive, so the sum errs by one rounding for each addition and one for the square. Two more for the
    mean, one for eps; the root halves all of it. A CPU's reciprocal root rounds twice, a GPU's errs by 2^-22.9.
    """
    return ((additions + 4) / 2 + 3) * UNIT


def unfused(x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """The steps after the statistics, each rounded as PyTorch does."""
    return weight * (x.float() * rstd[..., None]).to(x.dtype)


SHAPES = [
    (1, 1),
    (3, 5, 200),  # one width of two that a tile has
    (2, 1100),  # of several warps
    (9, 3),
]


@pytest.mark.parametrize(("dtype", "weight_dtype"), PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_is_between_the_bounds_that_float64_gives(backend, device, shape, dtype, weight_dtype):
    x, residual, weight = operands(shape, dtype, weight_dtype, device)
    out, total = add_rms_norm(x, residual, weight, EPS)
    assert_bitwise(total, x + residual)
    assert_bitwise(rms_norm(total, weight, EPS), out)  # a rounded sum is normed
    assert out.dtype == torch.promote_types(dtype, weight_dtype)
    rstd, error = exact_rstd(total, EPS), rstd_error(shape[-1]) + UNIT  # the bounds are rounded to float32 too
    # Rounding keeps the order of numbers, so what lies between the bounds before it does so after it.
    ends = [unfused(total, weight, (rstd * factor).float()) for factor in (1 - error, 1 + error)]
    assert ((torch.minimum(*ends) <= out) & (out <= torch.maximum(*ends))).all()
    if dtype == torch.bfloat16:  # most of it is decided: a bound in the order of a code's step would test nothing
        assert (ends[0] == ends[1]).float().mean() > 0.95


@pytest.mark.parametrize(("dtype", "weight_dtype"), PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_is_bitwise_what_its_reciprocal_root_gives(launch, device, shape, dtype, weight_dtype):
    x, residual, weight = operands(shape, dtype, weight_dtype, device)
    out, total, rstd = launch.rms_norm(x, residual, weight, EPS)
    assert_bitwise(out, unfused(total, weight, rstd))
    additions = max(1, shape[-1] - 1).bit_length()  # a tree of pairs
    exact = exact_rstd(total, EPS)
    assert ((rstd - exact).abs() <= rstd_error(additions) * exact).all()


@pytest.mark.parametrize("width", [128, 4096])
def test_powers_of_two_are_exact(backend, device, width):
    """Squares, mean and root of them are powers of two again; and the rounding comes before the weight (TRAPS B2)."""
    x = torch.where(torch.rand(4, width) < 0.5, -1.0, 1.0) * torch.tensor([[1.0], [0.25], [2.0**20], [2.0**-40]])
    weight = 1 + torch.arange(width) * 2.0**-20
    out = rms_norm(x.bfloat16().to(device), weight.to(device), 0.0)
    assert_bitwise(out, x.sign().to(device) * weight.to(device))


def test_rounding_comes_before_the_weight(backend, device):
    """TRAPS B2: in the other order, quotients by the weight would not be bfloat16 numbers."""
    x = torch.randn(3, 256, device=device).bfloat16()
    normed = rms_norm(x, torch.full((256,), 4.0, device=device), EPS) / 4
    assert_bitwise(normed.bfloat16().float(), normed)


def test_eps_is_added_to_the_mean(backend, device):
    x = torch.full((2, 300), 3.0, device=device)
    x[1] = 0
    out = rms_norm(x, torch.ones(300, device=device), 16.0)
    torch.testing.assert_close(out[0], torch.full_like(out[0], 3 / 5), rtol=2 * rstd_error(300), atol=0)
    assert (out[1] == 0).all()


def test_what_is_not_finite_stays_in_its_row(backend, device):
    x = torch.ones(5, 130, device=device).bfloat16()
    x[1, 3], x[2, 129], x[3] = math.nan, math.inf, 0
    out = rms_norm(x, torch.ones(130, device=device).bfloat16(), 0.0)
    assert (out[[0, 4]] == 1).all() and out[[1, 3]].isnan().all()
    assert out[2, 129].isnan() and (out[2, :129] == 0).all()


# Gradients.


def differentiate(function, tensors: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    outputs = function(*leaves)
    return list(torch.autograd.grad(outputs, leaves, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]))


def sizes(total: Tensor, weight: Tensor, grad: Tensor, grad_total: Tensor) -> tuple[Tensor, Tensor]:
    """The sums that the gradients are, all terms with their magnitudes: what roundings are relative to."""
    total, weight, grad = total.double(), weight.double(), grad.double()
    rstd = exact_rstd(total, EPS)[..., None]
    normed, slope = (total * rstd).abs(), (grad * weight).abs()
    of_total = rstd * (slope + normed * (slope * normed).mean(-1, keepdim=True)) + grad_total.double().abs()
    return of_total, (grad.abs() * normed).reshape(-1, total.shape[-1]).sum(0)


@pytest.mark.parametrize(("dtype", "weight_dtype"), PAIRS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 200), (2, 1100)])
def test_gradients_against_autograd_of_float64(backend, device, shape, dtype, weight_dtype):
    x, residual, weight = operands(shape, dtype, weight_dtype, device)
    grad, grad_total = torch.randn(2, *shape, device=device).to(dtype)
    total = x + residual

    def exact(total: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return plain_loop(total, weight, EPS), total * 1

    expected_total, expected_weight = differentiate(exact, (total.double(), weight.double()), (grad, grad_total))

    def fused(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, weight, EPS)

    got = differentiate(fused, (x, residual, weight), (grad, grad_total))
    assert [g.dtype for g in got] == [dtype, dtype, weight_dtype]
    assert_bitwise(got[0], got[1])
    # Narrow roundings of the total's gradient: once by the kernel, but PyTorch rounds its product with the weight (to
    # the product's dtype, then to x's), what comes from the norm, and its sum with what comes from the stream.
    # Of the weight's: the norm, then PyTorch's products, and the result. In float32: the sums, in any order, the
    # reciprocal root thrice, and some ten single operations.
    rows, columns = math.prod(shape[:-1]), shape[-1]
    narrow = torch.finfo(dtype).eps / 2
    wide = (rows + columns + 10) * UNIT + 3 * rstd_error(columns)
    of_total, of_weight = sizes(total, weight, grad, grad_total)
    roundings = 1 if backend == "triton" else 4
    assert ((got[0] - expected_total).abs() <= (roundings * narrow + wide) * of_total).all()
    of_result = torch.finfo(weight_dtype).eps / 2
    assert ((got[2] - expected_weight).abs() <= (2 * narrow + of_result + wide) * of_weight).all()


@pytest.mark.parametrize("programs", [1, 2])
def test_programs_of_the_backward_pass_share_rows_in_any_way(launch, device, monkeypatch, programs):
    """Several tiles for each program, the last ones partial; all rows count once."""
    monkeypatch.setattr(launch, "BACKWARD_PROGRAMS", programs)
    x, _, weight = operands((43, 300), torch.float32, torch.float32, device)
    grad, grad_total = torch.randn(2, 43, 300, device=device)

    def both(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(x, weight, EPS), x * 1

    got = differentiate(both, (x, weight), (grad, grad_total))
    expected = differentiate(
        lambda x, w: (plain_loop(x, w, EPS), x * 1), (x.double(), weight.double()), (grad, grad_total)
    )
    for mine, right, size in zip(got, expected, sizes(x, weight, grad, grad_total), strict=True):
        assert ((mine - right).abs() <= ((43 + 300 + 10) * UNIT + 3 * rstd_error(300)) * size).all()


def test_only_the_gradients_that_are_needed(backend, device):
    x, residual, weight = operands((6, 130), torch.bfloat16, torch.bfloat16, device)
    grad, grad_total = torch.randn(2, 6, 130, device=device).bfloat16()
    all_of_them = differentiate(lambda *t: add_rms_norm(*t, EPS), (x, residual, weight), (grad, grad_total))
    frozen = x.clone().requires_grad_()
    torch.autograd.backward(add_rms_norm(frozen, residual, weight, EPS), (grad, grad_total))
    assert_bitwise(frozen.grad, all_of_them[0])
    trained = weight.clone().requires_grad_()
    add_rms_norm(x, residual, trained, EPS)[0].backward(grad)
    assert_bitwise(trained.grad, all_of_them[2])
    # The stream alone: its gradient passes unchanged, and the norm's does not take part.
    leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
    add_rms_norm(*leaves, EPS)[1].backward(grad_total)
    assert_bitwise(leaves[0].grad, grad_total)
    assert_bitwise(leaves[1].grad, grad_total)
    assert leaves[2].grad is None


def test_a_gradient_of_one_number_repeated(backend, device):
    """The gradient that `sum` sends back has strides of zero."""
    x, _, weight = operands((6, 130), torch.float32, torch.float32, device)
    leaf = x.clone().requires_grad_()
    rms_norm(leaf, weight, EPS).sum().backward()
    (expected,) = differentiate(lambda x: (rms_norm(x, weight, EPS),), (x,), (torch.ones_like(x),))
    assert_bitwise(leaf.grad, expected)


def test_x_and_residual_of_different_dtypes(backend, device):
    """Under autocast a block's output is narrow, the stream is not: the sum is what PyTorch's is."""
    x, residual, weight = operands((5, 130), torch.bfloat16, torch.float32, device)
    residual = residual.float()
    leaves = [t.clone().requires_grad_() for t in (x, residual)]
    out, total = add_rms_norm(*leaves, weight, EPS)
    assert_bitwise(total.detach(), x + residual)
    # Of a leaf, too: where a gradient is needed another implementation may run.
    assert_bitwise(out.detach(), rms_norm((x + residual).requires_grad_(), weight, EPS).detach())
    out.backward(torch.ones_like(out))
    assert leaves[0].grad.dtype == torch.bfloat16
    assert_bitwise(leaves[0].grad, leaves[1].grad.bfloat16())


# Every kernel finds the same for a row.


@pytest.mark.parametrize("width", [1, 130, 2100])
def test_a_row_does_not_depend_on_its_company(launch, device, monkeypatch, width):
    """Nor on the tile, nor on what else the kernel does."""
    from deepseek_kernels.norm.rms_norm import configs

    x, _, weight = operands((19, width), torch.float32, torch.float32, device)
    results = []
    for enough in (0, math.inf):  # many rows to a program, one row to a program
        monkeypatch.setattr(configs, "ENOUGH_PROGRAMS", enough)
        results += [launch.rms_norm(x, None, weight, EPS)[2], launch.rms_norm(x, -0.0 * x, weight, EPS)[2]]
        for row in (0, 18):
            assert_bitwise(launch.rms_norm(x[row], None, weight, EPS)[2], results[0][row])
    for other in results[1:]:
        assert_bitwise(other, results[0])


def test_repeats_are_bitwise_equal(launch, device):
    x, residual, weight = operands((20, 130), torch.bfloat16, torch.bfloat16, device)
    grads = tuple(torch.randn(2, 20, 130, device=device).bfloat16())
    first = differentiate(lambda *t: add_rms_norm(*t, EPS), (x, residual, weight), grads)
    for _ in range(2):
        again = differentiate(lambda *t: add_rms_norm(*t, EPS), (x, residual, weight), grads)
        for mine, other in zip(again, first, strict=True):
            assert_bitwise(mine, other)


@pytest.mark.parametrize(
    "layout", ["columns apart", "part of a wider row", "outer dimensions swapped", "one row repeated"]
)
def test_other_layouts_give_the_same(launch, device, layout):
    def lay(t: Tensor) -> Tensor:
        return {
            "columns apart": lambda: torch.stack([t, t], -1).flatten(-2)[..., ::2],
            "part of a wider row": lambda: torch.cat([t, t], -1)[..., : t.shape[-1]],
            "outer dimensions swapped": lambda: t.transpose(0, 1).contiguous().transpose(0, 1),
            "one row repeated": lambda: t[:1, :1].expand_as(t),
        }[layout]()

    x, residual, weight = operands((4, 3, 130), torch.bfloat16, torch.bfloat16, device)
    moved = [lay(x), lay(residual), torch.stack([weight, weight], -1)[:, 0]]
    grads = [lay(t) for t in torch.randn(2, 4, 3, 130, device=device).bfloat16()]
    plain = [t.contiguous() for t in moved]
    for mine, other in zip(add_rms_norm(*moved, EPS), add_rms_norm(*plain, EPS), strict=True):
        assert_bitwise(mine, other)
    got = differentiate(lambda *t: add_rms_norm(lay(t[0]), lay(t[1]), t[2], EPS), plain, grads)
    expected = differentiate(
        lambda *t: add_rms_norm(lay(t[0]).contiguous(), lay(t[1]).contiguous(), t[2], EPS), plain, grads
    )
    for mine, other in zip(got, expected, strict=True):
        assert_bitwise(mine, other)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (4, 0), (0,)])
def test_nothing_in_nothing_out(backend, device, shape):
    x, residual = torch.zeros(2, *shape, device=device).requires_grad_()
    weight = torch.ones(shape[-1], device=device).requires_grad_()
    out, total = add_rms_norm(x, residual, weight, EPS)
    assert out.shape == total.shape == shape
    gradients = torch.autograd.grad(out.sum(), (x, weight))
    assert gradients[0].shape == shape and (gradients[1] == 0).all()


def test_one_row_without_outer_dimensions(backend, device):
    x, residual, weight = operands((130,), torch.bfloat16, torch.bfloat16, device)
    for one, of_many in zip(
        add_rms_norm(x, residual, weight, EPS), add_rms_norm(x[None], residual[None], weight, EPS), strict=True
    ):
        assert_bitwise(one, of_many[0])


def test_compiled_gives_the_same(backend, device):
    torch.compiler.reset()
    x, residual, weight = operands((2, 3, 130), torch.bfloat16, torch.bfloat16, device)
    grads = tuple(torch.randn(2, 2, 3, 130, device=device).bfloat16())

    def layer(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        normed, total = add_rms_norm(x * 2, residual, weight, EPS)
        return rms_norm(normed, weight, EPS), total

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for mine, other in zip(compiled(x, residual, weight), layer(x, residual, weight), strict=True):
        assert_bitwise(mine, other)
    got, expected = (differentiate(f, (x, residual, weight), grads) for f in (compiled, layer))
    for mine, other in zip(got, expected, strict=True):
        assert_bitwise(mine, other)


def test_custom_operators_are_registered_properly(launch, device):
    x, residual, weight = operands((4, 3, 20), torch.float32, torch.float32, device)
    for added in (None, residual):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (x, added, weight)]
        torch.library.opcheck(launch.rms_norm, (*leaves, EPS))


# What users do wrong, and what kernels do not take.


def test_kernels_say_what_they_do_not_take(launch, device):
    x, weight = torch.ones(2, 8, device=device), torch.ones(8, device=device)
    with use_backend("auto"):
        assert rms_norm(x.double(), weight, EPS).dtype == torch.float64
    with pytest.raises(BackendError, match=r"bfloat16, float16 or float32, got torch.float64"):
        rms_norm(x.double(), weight, EPS)
    with pytest.raises(BackendError, match=r"bfloat16, float16 or float32, got torch.float64"):
        add_rms_norm(x, x, weight.double(), EPS)
    with pytest.raises(BackendError, match=r"16384 features at most, got 16385"):
        rms_norm(torch.ones(1, 16385, device=device), torch.ones(16385, device=device), EPS)


def test_float64_keeps_its_precision(device):
    x, _, weight = operands((3, 130), torch.float64, torch.float64, device)
    with use_backend("reference"):
        torch.testing.assert_close(rms_norm(x, weight, EPS), plain_loop(x, weight, EPS), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: rms_norm(x, w[1:], EPS), r"x \[..., H\] and weight \[H\], got \[2, 8\] and \[7\]"),
        (lambda x, w: rms_norm(x, x, EPS), r"got \[2, 8\] and \[2, 8\]"),
        (lambda x, w: rms_norm(x[0, 0], w, EPS), r"got \[\] and \[8\]"),
        (lambda x, w: add_rms_norm(x, x[:1], w, EPS), r"a residual \[2, 8\], as x, got \[1, 8\]"),
        (lambda x, w: rms_norm(x.long(), w, EPS), r"x in a floating dtype, got torch.int64"),
        (lambda x, w: add_rms_norm(x, x.int(), w, EPS), r"residual in a floating dtype, got torch.int32"),
        (lambda x, w: rms_norm(x, w.int(), EPS), r"weight in a floating dtype, got torch.int32"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 8), torch.ones(8))
