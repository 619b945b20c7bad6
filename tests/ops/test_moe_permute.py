"""Permutation by expert and weighted combination: the definition, and the kernels against the reference."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from deepseek_kernels import BackendError, permute, sort_by_expert, unpermute, use_backend
from deepseek_kernels.testing.numeric import assert_bitwise
from support.cpu_operators import on_two_threads


def routing(tokens: int, experts: int, choices: int) -> torch.Tensor:
    return torch.stack([torch.randperm(experts)[:choices] for _ in range(tokens)])


@pytest.mark.parametrize(
    ("tokens", "experts", "choices"),
    [(1, 4, 2), (13, 7, 3), (5, 3, 3)],
    ids=["one token", "prime sizes", "every expert chosen"],
)
def test_sort_is_a_stable_permutation(tokens, experts, choices):
    ids = routing(tokens, experts, choices)
    order, inverse, ends = sort_by_expert(ids, experts)
    assert torch.equal(order.sort().values, torch.arange(tokens * choices))
    assert torch.equal(order[inverse.flatten()], torch.arange(tokens * choices))
    for expert in range(experts):
        start = int(ends[expert - 1]) if expert else 0
        mine = order[start : int(ends[expert])]
        assert (ids.flatten()[mine] == expert).all()
        assert torch.equal(mine, mine.sort().values), "ties must stay in token order"


def test_choices_of_nobody_come_last():
    ids = torch.tensor([[0, 2], [2, 1]])  # expert 2 of 2: served elsewhere
    order, _, ends = sort_by_expert(ids, 2)
    assert ends.tolist() == [1, 2]
    assert order[2:].tolist() == [1, 2]


def test_round_trip_and_gradients_equal_plain_indexing():
    tokens, experts, choices = 9, 5, 3
    ids = routing(tokens, experts, choices)
    order, inverse, _ = sort_by_expert(ids, experts)
    x = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(tokens, choices, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(experts, 6, dtype=torch.float64)  # expert e multiplies by scale[e]

    rows = permute(x, order, inverse)
    out = unpermute(rows * scale[ids.flatten()[order]], weights, order, inverse)
    expected = torch.stack(
        [sum(weights[t, k] * scale[ids[t, k]] * x[t] for k in range(choices)) for t in range(tokens)]
    )
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, (x, weights), grad)
    want = torch.autograd.grad(expected, (x, weights), grad)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_gradcheck():
    ids = routing(4, 5, 2)
    order, inverse, _ = sort_by_expert(ids, 5)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: unpermute(permute(x, order, inverse), w, order, inverse), (x, weights))


def test_combination_accumulates_in_float32_and_rounds_once():
    """TRAPS C9: summed in bfloat16, ones stall at 256, where the next representable number is 258."""
    choices = 512
    ids = torch.arange(choices)[None]
    order, inverse, _ = sort_by_expert(ids, choices)
    y = torch.ones(choices, 1, dtype=torch.bfloat16)
    weights = torch.ones(1, choices)
    out = unpermute(y, weights, order, inverse)
    assert out.dtype == torch.bfloat16
    assert out.item() == 512
    stepwise = torch.zeros(1, dtype=torch.bfloat16)
    for k in range(choices):
        stepwise = stepwise + y[k]
    assert stepwise.item() == 256


def test_repeats_are_bitwise_equal():
    """TRAPS C14: no atomics, so the same input gives the same bits."""
    ids = routing(64, 8, 4)
    order, inverse, _ = sort_by_expert(ids, 8)
    y, weights = torch.randn(256, 16).bfloat16(), torch.rand(64, 4)
    first = unpermute(y, weights, order, inverse)
    assert all(torch.equal(first, unpermute(y, weights, order, inverse)) for _ in range(5))


# The kernels against the reference, bit by bit.


@pytest.fixture
def launch(triton_backend):
    from deepseek_kernels.moe.moe_permute import launch

    with use_backend("triton"):
        yield launch


@pytest.fixture(params=["triton", "cpu"])
def kernels(request):
    """Triton's, and those in C++."""
    request.getfixturevalue(f"{request.param}_backend")
    with use_backend(request.param):
        yield request.param


def on_reference(function, *arguments):
    with use_backend("reference"):
        return function(*arguments)


def assert_all_bitwise(got: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert_bitwise(a.detach(), b.detach(), strides=False)


HOSTILE_IDS = {
    "one token": (lambda: routing(1, 4, 2), 4),
    "one expert": (lambda: torch.zeros(5, 1, dtype=torch.int64), 1),
    "all to the last expert": (lambda: torch.full((9, 3), 6), 7),  # a router never does; a caller may
    "all unassigned": (lambda: torch.full((9, 3), 7), 7),
    "half unassigned": (lambda: routing(50, 8, 4).clamp(max=4), 4),
    "no token": (lambda: torch.zeros(0, 4, dtype=torch.int64), 5),
    "no choice": (lambda: torch.zeros(4, 0, dtype=torch.int64), 5),
    "no expert": (lambda: torch.zeros(3, 2, dtype=torch.int64), 0),
    "as many bins as a power of two": (lambda: routing(20, 14, 5), 14),
    "a column of a wider matrix": (lambda: routing(33, 9, 6)[:, 1::2], 9),
    "several blocks": (lambda: routing(700, 11, 3), 11),  # of 1024 pairs; the last one partial
}


@pytest.mark.parametrize("name", HOSTILE_IDS)
def test_sort_kernel_is_bitwise(launch, device, name):
    make, experts = HOSTILE_IDS[name]
    ids = make().to(device)
    assert_all_bitwise(sort_by_expert(ids, experts), on_reference(sort_by_expert, ids, experts))


def test_ids_of_no_expert_at_all_are_nobodys(launch, device):
    """They cannot be refused without waiting for the device; they must not reach other memory."""
    ids, tame = torch.tensor([[0, -1], [1000, 1]], device=device), torch.tensor([[0, 2], [2, 1]], device=device)
    assert_all_bitwise(sort_by_expert(ids, 2), sort_by_expert(tame, 2))


def there_and_back(x: Tensor, y: Tensor, weights: Tensor, grad: Tensor, ids: Tensor, experts: int) -> list[Tensor]:
    """Both movements and all of their gradients."""
    order, inverse, _ = sort_by_expert(ids, experts)
    x, y, weights = (t.detach().requires_grad_() for t in (x, y, weights))
    rows = permute(x, order, inverse)
    out = unpermute(y, weights, order, inverse)
    rows.backward(y.detach())
    out.backward(grad)
    return [rows, out, x.grad, y.grad, weights.grad]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "experts", "choices", "width"),
    [
        (1, 4, 2, 1),
        (13, 7, 3, 6),  # prime sizes
        (3, 20, 10, 1030),  # two tiles of columns, the last one partial; more choices than are unrolled
        (0, 4, 2, 8),
        (4, 4, 2, 0),
    ],
)
def test_movements_and_gradients_are_bitwise(kernels, device, tokens, experts, choices, width, dtype):
    ids = routing(tokens, experts + 1, choices).to(device) if tokens else torch.zeros(0, choices, dtype=torch.int64)
    x, grad = torch.randn(2, tokens, width, dtype=dtype, device=device)
    y = torch.randn(tokens * choices, width, dtype=dtype, device=device)
    weights = torch.rand(tokens, choices, device=device)
    arguments = (x, y, weights, grad, ids.to(device), experts)
    got, expected = there_and_back(*arguments), on_reference(there_and_back, *arguments)
    assert_all_bitwise(got[:4], expected[:4])
    # The weights' gradient is a sum over the width in another order: either errs by `width` roundings of the sum of the
    # terms' sizes at most, which is the same gradient of absolute values.
    sizes = on_reference(there_and_back, x, y.abs(), weights, grad.abs(), ids.to(device), experts)[4]
    assert got[4].dtype == torch.float32 and got[4].shape == weights.shape
    assert ((got[4] - expected[4]).abs() <= 2 * width * torch.finfo(torch.float32).eps * sizes).all()
    assert_all_bitwise(there_and_back(*arguments), got)  # TRAPS C14


@pytest.mark.parametrize("width", [3, 5000])
def test_codes_move_as_bytes(kernels, device, width):
    """Quantized rows, whose bytes nothing is computed with."""
    order, inverse, _ = sort_by_expert(routing(6, 5, 2).to(device), 5)
    codes = torch.randint(0, 256, (6, width), dtype=torch.uint8, device=device)
    assert_bitwise(permute(codes, order, inverse), codes[order // 2])


@pytest.mark.parametrize("layout", ["columns apart", "wider", "transposed", "one row repeated"])
def test_other_layouts_give_the_same(kernels, device, layout):
    def lay(t: Tensor) -> Tensor:
        return {
            "columns apart": lambda: torch.stack([t, t], -1).flatten(1)[:, ::2],
            "wider": lambda: torch.cat([t, t], 1)[:, : t.shape[1]],
            "transposed": lambda: t.T.contiguous().T,
            "one row repeated": lambda: t[:1].expand_as(t),
        }[layout]()

    ids = routing(5, 6, 2).to(device)
    x, grad = torch.randn(2, 5, 10, device=device).bfloat16()
    y, weights = torch.randn(10, 10, device=device).bfloat16(), torch.rand(5, 2, device=device)
    moved = [lay(t) for t in (x, y, weights, grad)]
    plain = [t.contiguous() for t in moved]
    assert_all_bitwise(there_and_back(*moved, ids, 6), there_and_back(*plain, ids, 6))


def test_weights_may_be_as_narrow_as_rows(launch, device):
    ids = routing(5, 6, 2).to(device)
    x, grad = torch.randn(2, 5, 10, device=device).bfloat16()
    y, weights = torch.randn(10, 10, device=device).bfloat16(), torch.rand(5, 2, device=device).bfloat16()
    order, inverse, _ = sort_by_expert(ids, 6)
    out = unpermute(y, weights, order, inverse)
    assert_bitwise(out, on_reference(unpermute, y, weights, order, inverse))
    got, wide = (there_and_back(x, y, w, grad, ids, 6) for w in (weights, weights.float()))
    assert_bitwise(got[3], wide[3])
    assert_bitwise(got[4], wide[4].bfloat16())


def test_only_the_gradients_that_are_needed(kernels, device):
    ids = routing(5, 6, 2).to(device)
    order, inverse, _ = sort_by_expert(ids, 6)
    y, weights, grad = torch.randn(10, 8), torch.rand(5, 2), torch.randn(5, 8)
    y, weights, grad = y.to(device), weights.to(device), grad.to(device)
    both = there_and_back(grad, y, weights, grad, ids, 6)
    for need in (0, 1):
        leaves = [y.detach().requires_grad_(need == 0), weights.detach().requires_grad_(need == 1)]
        unpermute(*leaves, order, inverse).backward(grad)
        assert leaves[1 - need].grad is None
        assert_bitwise(leaves[need].grad, both[3 + need])


def test_what_is_not_finite_stays_in_its_rows(kernels, device):
    ids = routing(4, 5, 2).to(device)
    order, inverse, _ = sort_by_expert(ids, 5)
    y, weights = torch.ones(8, 6, device=device).bfloat16(), torch.ones(4, 2, device=device)
    y[inverse[1, 0]], y[inverse[2, 1]], weights[3] = float("nan"), float("inf"), 0
    out = unpermute(y, weights, order, inverse).float()
    assert out.isnan().any(1).tolist() == [False, True, False, False]
    assert out[:, 0].nan_to_num(nan=-1, posinf=-2).tolist() == [2, -1, -2, 0]
    assert_bitwise(permute(out, order, inverse)[inverse[2, 0]], out[2])


def test_compiled_gives_the_same(kernels, device):
    torch.compiler.reset()
    ids = routing(5, 6, 2).to(device)
    x, grad = torch.randn(2, 5, 10, device=device).bfloat16()
    weights = torch.rand(5, 2, device=device)

    def step(x: Tensor, weights: Tensor) -> Tensor:
        order, inverse, _ = sort_by_expert(ids, 6)
        return unpermute(permute(x, order, inverse) * 2, weights, order, inverse)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = x.detach().requires_grad_(), weights.detach().requires_grad_()
        out = function(*leaves)
        out.backward(grad)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert_all_bitwise(*results)


def test_custom_operators_are_registered_properly(launch, device):
    ids = routing(5, 6, 2).to(device)
    _, inverse, _ = launch.sort_by_expert(ids, 6)
    x, y = torch.randn(5, 8, device=device), torch.randn(10, 8, device=device)
    weights = torch.rand(5, 2, device=device)
    x, y, weights = (t.requires_grad_() for t in (x, y, weights))
    torch.library.opcheck(launch.sort_by_expert, (ids, 6))
    torch.library.opcheck(launch.spread, (x, inverse))
    torch.library.opcheck(launch.combine, (y, weights, inverse))
    torch.library.opcheck(launch.combine, (y, None, inverse))


def test_cpp_operators_are_registered_properly(cpu_backend):
    library = torch.ops.deepseek_kernels_cpu
    _, inverse, _ = sort_by_expert(routing(5, 6, 2), 6)
    grad, y, weights = torch.randn(5, 8), torch.randn(10, 8), torch.rand(5, 2)
    for one in (weights, None):
        torch.library.opcheck(library.combine.default, (y, one, inverse))
    torch.library.opcheck(library.combine_backward.default, (grad, y, weights, inverse))


def test_cpp_gives_the_same_on_two_threads(cpu_backend):
    ids = routing(90, 7, 3)
    operands = (*torch.randn(2, 90, 1000).bfloat16(), torch.randn(270, 1000).bfloat16(), torch.rand(90, 3))
    x, grad, y, weights = operands
    with use_backend("cpu"):
        once = there_and_back(x, y, weights, grad, ids, 7)
        assert_all_bitwise(on_two_threads(lambda: there_and_back(x, y, weights, grad, ids, 7)), once)


def test_cpp_refuses_rows_that_are_not_there(cpu_backend):
    y, weights = torch.ones(4, 3), torch.ones(2, 2)
    for wrong in (4, -1):
        inverse = torch.tensor([[0, 1], [2, wrong]])
        with use_backend("cpu"), pytest.raises(IndexError, match=f"rows from 0 to 3, got {wrong}"):
            unpermute(y, weights, torch.arange(4), inverse)


# What users do wrong.


def test_float64_runs_on_the_reference(launch, device):
    order, inverse, _ = sort_by_expert(torch.tensor([[0, 1]], device=device), 2)
    x, weights = torch.ones(1, 3, device=device), torch.ones(1, 2, device=device)
    with use_backend("auto"):
        assert permute(x.double(), order, inverse).dtype == torch.float64
    with pytest.raises(BackendError, match=r"bfloat16, float16, float32, uint8, got torch.float64"):
        permute(x.double(), order, inverse)
    with pytest.raises(BackendError, match=r"bfloat16, float16, float32, got torch.float64"):
        unpermute(permute(x, order, inverse), weights.double(), order, inverse)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda order, inverse: sort_by_expert(order, 4), r"int64 expert_ids \[T, K\], got torch.int64 \[6\]"),
        (lambda order, inverse: sort_by_expert(inverse.int(), 4), r"got torch.int32 \[3, 2\]"),
        (lambda order, inverse: permute(torch.ones(4, 5), order, inverse), r"rows \[3, H\].* got \[4, 5\]"),
        (lambda order, inverse: permute(torch.ones(3, 5), order[1:], inverse), r"got \[3, 5\], \[5\], \[3, 2\]"),
        (
            lambda order, inverse: unpermute(torch.ones(3, 5), torch.ones(3, 2), order, inverse),
            r"rows \[6, H\].* got \[3, 5\]",
        ),
        (
            lambda order, inverse: unpermute(torch.ones(6, 5), torch.ones(2, 3), order, inverse),
            r"weights \[3, 2\], got \[2, 3\]",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    order, inverse, _ = sort_by_expert(torch.tensor([[0, 1], [1, 2], [3, 0]]), 4)
    with pytest.raises(ValueError, match=message):
        call(order, inverse)
