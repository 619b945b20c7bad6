"""The Triton kernels of grouped_gemm against a loop in float64; test_gemm.py has most of the reference's tests.

Tolerance, everywhere: one rounding of the result to its dtype, plus the error of a float32 sum of so many terms in any
order, `depth * eps * sum(|terms|)`.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek_kernels import BackendError, grouped_gemm, use_backend
from deepseek_kernels.moe.grouped_gemm import configs
from deepseek_kernels.testing.numeric import assert_bitwise

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAN = float("nan")

COUNTS = {
    "all to one": [0, 0, 37, 0],
    "all to the last": [0, 20],
    "one token": [0, 0, 1, 0],
    "one expert": [33],
    "a row each": [1] * 19,  # more row tiles than share a weight at a time, and not a multiple
    "no token": [0, 0, 0],
}


def slices(counts: list[int]) -> list[slice]:
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    return [slice(a, b) for a, b in pairwise(ends)]


def bound(dtype: torch.dtype, depth: int, exact: Tensor, terms: Tensor) -> Tensor:
    info = torch.finfo(dtype)
    return info.eps * exact.abs() + depth * torch.finfo(torch.float32).eps * terms + info.tiny


def assert_product(got: Tensor, a: Tensor, b: Tensor) -> None:
    a, b = a.detach().double(), b.detach().double()
    exact, terms = a @ b, a.abs() @ b.abs()
    worst = ((got.detach().double() - exact).abs() - bound(got.dtype, a.shape[-1], exact, terms)).max()
    assert worst <= 0, f"exceeds the bound by {worst:.3g}"  # also where it is NaN


def assert_grouped(y: Tensor, x: Tensor, weight: Tensor, grad: Tensor, counts: list[int]) -> None:
    """The product and both gradients, in `x.grad` and `weight.grad`; rows beyond the counts are unassigned."""
    assert (y.shape, x.grad.shape, weight.grad.shape) == ((x.shape[0], weight.shape[1]), x.shape, weight.shape)
    assert y.dtype == x.grad.dtype == weight.grad.dtype == x.dtype
    for expert, rows in enumerate(slices(counts)):
        if rows.start == rows.stop:
            assert torch.equal(weight.grad[expert], torch.zeros_like(weight[expert]))  # TRAPS C15
            continue
        assert_product(y[rows], x[rows], weight[expert].T)
        assert_product(x.grad[rows], grad[rows], weight[expert])
        assert_product(weight.grad[expert], grad[rows].T, x[rows])
    unassigned = slice(sum(counts), None)
    assert torch.equal(y[unassigned], torch.zeros_like(y[unassigned]))
    assert torch.equal(x.grad[unassigned], torch.zeros_like(x[unassigned]))


def run(x: Tensor, weight: Tensor, ends: Tensor, grad: Tensor) -> Tensor:
    """The product, its gradients left in `.grad`."""
    x.grad = weight.grad = None
    y = grouped_gemm(x, weight, ends)
    y.backward(grad)
    return y


def operands(counts: list[int], n: int, k: int, dtype: torch.dtype, device, unassigned: int = 0):
    """x, weight, ends, grad; NaN wherever nothing may be read that counts."""
    rows, experts = sum(counts) + unassigned, len(counts)
    x, grad = torch.randn(rows, k, dtype=dtype), torch.randn(rows, n, dtype=dtype)
    weight = torch.randn(experts, n, k, dtype=dtype)
    x[sum(counts) :], grad[sum(counts) :] = NAN, NAN
    weight[torch.tensor(counts) == 0] = NAN
    ends = torch.tensor(counts).cumsum(0)
    return x.to(device).requires_grad_(), weight.to(device).requires_grad_(), ends.to(device), grad.to(device)


@pytest.fixture
def launch(triton_backend):
    from deepseek_kernels.moe.grouped_gemm import launch

    with use_backend("triton"):
        yield launch


CONFIGS = {name.lower(): config for name, config in vars(configs).items() if isinstance(config, configs.Config)}


@pytest.fixture(params=CONFIGS)
def config(request, launch, device, monkeypatch) -> configs.Config:
    """Each configuration, whatever the size."""
    chosen = CONFIGS[request.param]
    if chosen.specialized and device.type == "cuda" and not launch.hopper(device):
        pytest.skip("needs a Hopper GPU")
    used = []

    def product_config(rows, experts, columns, aligned, specialized):
        assert aligned and specialized >= chosen.specialized, "the test's operands do not fit the configuration"
        used.append(chosen)
        return chosen

    monkeypatch.setattr(launch, "hopper", lambda device: chosen.specialized)
    monkeypatch.setattr(launch, "product_config", product_config)
    monkeypatch.setattr(configs, "_LONG", 0)
    yield chosen
    assert used


# The products.


def test_product_and_gradients_in_every_configuration(config, device):
    counts = [5, 0, config.rows + 2, 1]  # a full tile; partial ones; an expert without any
    # Columns: more than one tile, the last one partial. Depth: a whole and a partial step.
    x, weight, ends, grad = operands(
        counts, config.columns + 64, config.depth + 8, torch.bfloat16, device, unassigned=3
    )
    y = run(x, weight, ends, grad)
    assert_grouped(y, x, weight, grad, counts)
    first = y, x.grad, weight.grad
    for a, b in zip(first, (run(x, weight, ends, grad), x.grad, weight.grad), strict=True):
        assert_bitwise(a, b)  # TRAPS C14


@pytest.mark.parametrize(("dtype", "unassigned"), [(torch.bfloat16, 5), (torch.float16, 0)])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_product_and_gradients_by_rule(launch, device, counts, unassigned, dtype):
    x, weight, ends, grad = operands(counts, 72, 40, dtype, device, unassigned)
    y = run(x, weight, ends, grad)
    assert_grouped(y, x, weight, grad, counts)


@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    n=st.integers(1, 80),
    k=st.integers(1, 80),
    unassigned=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_size(launch, device, counts, n, k, unassigned, dtype):
    torch.manual_seed(n * 100 + k)
    x, weight, ends, grad = operands(counts, n, k, dtype, device, unassigned)
    y = run(x, weight, ends, grad)
    assert_grouped(y, x, weight, grad, counts)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, in the interpreter
def test_what_one_expert_has_stays_with_it(config, device):
    """Tiles copy rows and weights of the next expert: an infinity or a NaN there must not come through as 0 * NaN."""
    counts, n, k = [5, 20, 7], 64, 72
    x, weight, ends, grad = operands(counts, n, k, torch.bfloat16, device)
    with torch.no_grad():
        x[5:25], grad[5:25], weight[1] = float("inf"), NAN, NAN
    y = run(x, weight, ends, grad)
    for expert, rows in ((0, slice(0, 5)), (2, slice(25, 32))):
        assert_product(y[rows], x[rows], weight[expert].T)
        assert_product(x.grad[rows], grad[rows], weight[expert])
        assert_product(weight.grad[expert], grad[rows].T, x[rows])
    assert y[5:25].isnan().all() and x.grad[5:25].isnan().all() and weight.grad[1].isnan().all()


def test_descriptors_do_not_run_over_into_the_next_expert(launch, device, monkeypatch):
    """Backward they would: the depth of 72 ends within a step of 64, and the next rows are the next expert's."""
    monkeypatch.setattr(launch, "hopper", lambda device: True)
    monkeypatch.setattr(launch, "product_config", lambda *sizes: configs.WIDE if sizes[-1] else configs.PLAIN)
    x, weight, ends, grad = operands([5, 0], 72, 40, torch.bfloat16, device)  # expert 1 holds NaN
    y = run(x, weight, ends, grad)
    assert_grouped(y, x, weight, grad, [5, 0])


LAYOUTS = {
    "x: every other column": (lambda t: torch.stack([t, t], -1).flatten(1)[:, ::2], lambda w: w),
    "x: columns of a wider matrix": (lambda t: torch.cat([t, t], 1)[:, : t.shape[1]], lambda w: w),
    "x: transposed": (lambda t: t.T.contiguous().T, lambda w: w),
    "x: one row repeated": (lambda t: t[:1].expand_as(t), lambda w: w),
    "x: off by two bytes": (lambda t: torch.cat([t[:1, 0], t.flatten()])[1:].view_as(t), lambda w: w),
    "weight: transposed": (lambda t: t, lambda w: w.mT.contiguous().mT),
    "weight: every other expert": (lambda t: t, lambda w: torch.cat([w, w], 1).view(2 * len(w), *w.shape[1:])[::2]),
    "weight: a slice": (lambda t: t, lambda w: torch.cat([w, w], 2)[:, :, : w.shape[2]]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(launch, device, name):
    counts = [7, 0, 18]
    x, weight, ends, grad = operands(counts, 24, 40, torch.bfloat16, device)
    of_x, of_weight = LAYOUTS[name]
    x, weight = of_x(x.detach()).requires_grad_(), of_weight(weight.detach()).requires_grad_()
    grad = of_x(grad)
    y = run(x, weight, ends, grad)
    assert_grouped(y, x, weight, grad, counts)


def test_gradient_of_a_sum_is_read_in_place(launch, device):
    """Its gradient is one number, expanded."""
    x, weight, ends, _ = operands([3, 4], 24, 40, torch.bfloat16, device)
    y = grouped_gemm(x, weight, ends)
    y.sum().backward()
    assert_grouped(y, x, weight, torch.ones_like(y), [3, 4])


@pytest.mark.parametrize(("n", "k"), [(0, 8), (8, 0), (0, 0)])
@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0]])
def test_matrices_without_rows_or_columns(launch, device, counts, n, k):
    x, weight, ends, grad = operands(counts, n, k, torch.bfloat16, device)
    y = run(x, weight, ends, grad)
    for got, like in ((y, grad), (x.grad, x), (weight.grad, weight)):
        assert torch.equal(got, torch.zeros_like(like))  # of a sum without terms


@pytest.mark.parametrize(("need_x", "need_weight"), [(True, False), (False, True)])
def test_only_the_gradient_that_is_needed(launch, device, need_x, need_weight):
    x, weight, ends, grad = operands([3, 4], 24, 40, torch.bfloat16, device)
    x, weight = x.detach().requires_grad_(need_x), weight.detach().requires_grad_(need_weight)
    run(x, weight, ends, grad)
    assert (x.grad is not None, weight.grad is not None) == (need_x, need_weight)


def test_reads_no_more_of_ends_than_it_owns(launch, device):
    """Ends beyond the rows cannot be refused without waiting for the device; they must not reach other memory."""
    x, weight, _, grad = operands([4, 4], 24, 40, torch.bfloat16, device)
    y = run(x, weight, torch.tensor([4, 2**33], device=device), grad)
    assert_grouped(y, x, weight, grad, [4, 4])


@pytest.mark.parametrize("counts", [[3, 0, 20], [0, 0], [4]])
def test_the_reference_leaves_nothing_unwritten(device, counts, native):
    """It zeroes only what no product writes; `torch.empty` is full of NaN here."""
    x, weight, ends, grad = operands(counts, 24, 40, torch.bfloat16, device, unassigned=3)
    with use_backend("reference"):
        y = run(x, weight, ends, grad)
    assert_grouped(y, x, weight, grad, counts)


# The table of tiles.


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize(
    "counts",
    [*COUNTS.values(), [1] * 40, [0] * 300 + [5], list(range(30))],
    ids=[*COUNTS, "a row each", "more experts than rows", "rising"],
)
def test_tile_table(launch, device, counts, block):
    rows = sum(counts) + 20
    ends = torch.tensor(counts).cumsum(0).to(device)
    expected = [
        [expert, first, own.stop]
        for expert, own in enumerate([*slices(counts), slice(sum(counts), rows)])
        for first in range(own.start, own.stop, block)
    ]
    from deepseek_kernels.common import tiles as common

    table = common.tile_table(ends, rows, block)
    assert table.dtype == torch.int32 and table.shape == (1 + common.tile_capacity(rows, len(counts), block), 3)
    (used, *_), *tiles = table.tolist()
    assert used == len(expected) and tiles[:used] == expected
    assert all(tile == [-1, 0, 0] for tile in tiles[used:])


def test_tile_capacity_is_what_the_worst_case_needs(launch):
    from deepseek_kernels.common.tiles import tile_capacity

    for rows, experts, block in [(1, 1, 16), (17, 3, 16), (100, 300, 16), (1000, 7, 128)]:
        owners = min(experts + 1, rows)
        # Every expert has one row more than whole tiles, as far as the rows go.
        counts = [1] * (owners - 1) + [rows - owners + 1]
        assert sum(-(-count // block) for count in counts) == tile_capacity(rows, experts, block)


# Choosing.


def test_rule_of_products():
    def rule(rows, experts, columns=4096, aligned=True, specialized=True):
        return configs.product_config(rows, experts, columns, aligned, specialized)

    assert rule(32768, 8) is configs.WIDE
    assert rule(65536, 256, 7168) is configs.WIDE  # V3 with 8192 tokens: 256 rows each
    assert rule(512, 2, 2048) is configs.SQUARE  # 32 wide tiles would leave 100 processors idle
    assert rule(32768, 8, specialized=False) is configs.PLAIN
    assert rule(8192, 256) is configs.MEDIUM
    assert rule(512, 256) is rule(8, 256) is rule(1, 1) is configs.FEW  # decoding
    assert rule(32768, 8, aligned=False) is configs.UNALIGNED
    assert rule(0, 0) is configs.FEW


def test_rule_of_weight_gradients():
    def rule(rows, experts, half=True, specialized=True):
        return configs.gradient_config(rows, experts, half, specialized)

    assert rule(32768, 8) is configs.WIDE
    assert rule(32768, 8, specialized=False) is configs.PLAIN
    assert rule(65536, 256) is rule(0, 4) is configs.PLAIN
    assert rule(32768, 8, half=False, specialized=False) is configs.UNALIGNED


@pytest.mark.parametrize(
    ("view", "aligned"),
    [
        (lambda t: t, True),
        (lambda t: t[:, :24], True),
        (lambda t: t[:, 8:], True),
        (lambda t: t[:, 1:], False),  # address
        (lambda t: t[:, ::2], False),  # columns apart
        (lambda t: t.flatten()[:60].view(6, 10), False),  # 20-byte rows
        (lambda t: t[:1].expand(6, 40), False),  # rows on top of each other
        (lambda t: t[:0], False),
    ],
)
def test_alignment(view, aligned):
    assert configs.rows_aligned(view(torch.zeros(6, 40, dtype=torch.bfloat16))) is aligned


def test_float64_runs_on_the_reference(device, triton_backend):
    dtype = torch.float64
    x, weight = torch.randn(3, 8, dtype=dtype, device=device), torch.randn(1, 4, 8, dtype=dtype, device=device)
    ends = torch.tensor([3], device=device)
    with use_backend("auto"):
        assert grouped_gemm(x, weight, ends).dtype == dtype
    with use_backend("triton"), pytest.raises(BackendError, match=r"float16 or float32, got torch.float64"):
        grouped_gemm(x, weight, ends)


# Around the kernels.


def test_follows_autocast(launch, device):
    x, weight, ends, grad = operands([3, 0, 4], 24, 40, torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = run(x, weight, ends, grad.bfloat16())
    assert y.dtype == torch.bfloat16 and x.grad.dtype == weight.grad.dtype == torch.float32
    assert_product(y[:3], x[:3].bfloat16(), weight[0].bfloat16().T)


def test_compiled_gives_the_same(launch, device):
    torch.compiler.reset()
    x, weight, ends, grad = operands([3, 0, 4], 24, 40, torch.bfloat16, device)
    eager = run(x, weight, ends, grad), x.grad, weight.grad
    x.grad = weight.grad = None
    y = torch.compile(grouped_gemm, fullgraph=True, backend="aot_eager")(x, weight, ends)
    y.backward(grad)
    for a, b in zip((y, x.grad, weight.grad), eager, strict=True):
        assert_bitwise(a, b)


def test_custom_operator_is_registered_properly(launch, device):
    x, weight, ends, _ = operands([3, 0, 4], 24, 40, torch.bfloat16, device)
    operator = torch.ops.deepseek_kernels.grouped_gemm_triton.default
    torch.library.opcheck(operator, (x, weight.detach().nan_to_num().requires_grad_(), ends))
