"""fused_moe and grouped_gemm_swiglu: the definition as a loop in float64, the reference, and the kernels.

`support.expert_bounds` has the definition and the tolerances.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from deepseek_kernels import BackendError, grouped_gemm, permute, sort_by_expert, unpermute, use_backend
from deepseek_kernels.common.host import hopper
from deepseek_kernels.moe.fused_moe import configs, fused_moe, grouped_gemm_swiglu
from deepseek_kernels.moe.grouped_gemm import configs as grouped_configs
from deepseek_kernels.testing.numeric import assert_bitwise
from support.expert_bounds import assert_within, experts_loop, swiglu_rows

NAN = float("nan")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


# ------------------------------------------------------------------ the definition


def assert_experts(got: Tensor, operands: tuple[Tensor, ...], fused: bool = True) -> None:
    assert (got.shape, got.dtype) == (operands[0].shape, operands[0].dtype)
    assert_within(got, *experts_loop(*operands, got.dtype, fused))


# ------------------------------------------------------------------ operands

ROUTINGS = {
    "few of many experts": torch.tensor([[0, 4], [4, 2], [6, 0]]),
    "one token": torch.tensor([[5, 1, 3]]),
    "one choice": torch.tensor([[1], [0], [6], [1]]),
    "all to one": torch.full((21, 1), 3),
    "some served elsewhere": torch.tensor([[7, 0], [7, 7], [2, 7], [6, 2]]),
    "all served elsewhere": torch.full((3, 2), 7),
    "one expert twice": torch.tensor([[2, 2], [2, 0]]),
}


def operands(ids: Tensor, experts: int, hidden: int, width: int, dtype: torch.dtype, device) -> tuple[Tensor, ...]:
    """x, gate_up, down, ids, weights; NaN wherever nothing may be read that counts."""
    x = torch.randn(ids.shape[0], hidden)
    gate_up = torch.randn(experts, 2 * width, hidden) / max(hidden, 1) ** 0.5 * 2
    down = torch.randn(experts, hidden, width) / max(width, 1) ** 0.5
    idle = torch.bincount(ids.flatten(), minlength=experts + 1)[:experts] == 0
    gate_up[idle], down[idle] = NAN, NAN
    if ids.numel():
        x[(ids == experts).all(1)] = NAN  # a token that no expert here serves
    weights = torch.rand(ids.shape) + 0.1
    wide = (x.to(dtype), gate_up.to(dtype), down.to(dtype), ids, weights)
    return tuple(one.to(device) for one in wide)


def spread(tokens: int, experts: int, choices: int) -> Tensor:
    return torch.stack([torch.randperm(experts)[:choices] for _ in range(tokens)])


@pytest.fixture
def launch(triton_backend):
    from deepseek_kernels.moe.fused_moe import launch

    with use_backend("triton"):
        yield launch


@pytest.fixture(params=["triton", "cpu"])
def kernels(request):
    request.getfixturevalue(f"{request.param}_backend")
    with use_backend(request.param):
        yield request.param


CONFIGS = {name.lower(): config for name, config in vars(configs).items() if isinstance(config, configs.Config)}
GATHERING = [name for name, config in CONFIGS.items() if not config.specialized]


@pytest.fixture(params=CONFIGS)
def config(request, launch, device, monkeypatch) -> configs.Config:
    """Each configuration, whatever the size."""
    chosen = CONFIGS[request.param]
    if chosen.specialized and device.type == "cuda" and not hopper(device):
        pytest.skip("needs a Hopper GPU")
    used = []

    def swiglu_config(rows, experts, aligned, gathered, generation):
        assert aligned and not (gathered and chosen.specialized), "the test's operands do not fit the configuration"
        used.append(chosen)
        return chosen

    monkeypatch.setattr(launch, "swiglu_config", swiglu_config)
    yield chosen
    assert used


# ------------------------------------------------------------------ the reference


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reference_is_the_weighted_sum_of_experts(name, dtype):
    given = operands(ROUTINGS[name], 7, 24, 20, dtype, "cpu")
    with use_backend("reference"):
        assert_experts(fused_moe(*given), given, fused=False)


def test_reference_is_the_sequence_of_operators():
    """Bit by bit, so that a model's numbers on a CPU do not depend on how its experts are called."""
    x, gate_up, down, ids, weights = given = operands(spread(9, 5, 3), 5, 24, 20, torch.bfloat16, "cpu")
    with use_backend("reference"):
        order, inverse, ends = sort_by_expert(ids, 5)
        gate, up = grouped_gemm(permute(x, order, inverse), gate_up, ends).chunk(2, dim=-1)
        expected = unpermute(grouped_gemm(F.silu(gate) * up, down, ends), weights, order, inverse)
        assert_bitwise(fused_moe(*given), expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_gradients(backend, device, request):
    """With a gradient, both backends run the sequence: on Triton that of its own differentiable operators."""
    dtype = torch.float64 if backend == "reference" else torch.bfloat16
    if backend == "triton":
        request.getfixturevalue("triton_backend")
    ids = torch.tensor([[0, 2], [3, 1], [2, 0]])  # of experts 0 to 2; 3 is served elsewhere
    given = operands(ids, 3, 16, 8, dtype, device)
    leaves = [given[i].double().to(given[i].dtype).requires_grad_() for i in (0, 1, 2, 4)]
    grad = torch.randn(3, 16, dtype=dtype, device=device)
    with use_backend(backend):
        out = fused_moe(*leaves[:3], given[3], leaves[3])
        got = torch.autograd.grad(out, leaves, grad)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(plain(*wide[:3], ids, wide[3]), wide, grad.double())
    for mine, right in zip(got, expected, strict=True):
        # Half-precision products of a handful of roundings each, in the norm; float32 weights and their accumulation.
        tolerance = 8 * torch.finfo(torch.bfloat16).eps if backend == "triton" else 1e-6
        assert mine.shape == right.shape
        assert (mine.double() - right).norm() <= tolerance * right.norm()


def plain(x, gate_up, down, ids, weights) -> Tensor:
    rows = []
    for token, choices in enumerate(ids.tolist()):
        total = torch.zeros_like(x[token])
        for choice, expert in enumerate(choices):
            if expert < len(gate_up):
                gate, up = (gate_up[expert] @ x[token]).chunk(2)
                total = total + weights[token, choice] * (down[expert] @ (gate * gate.sigmoid() * up))
        rows.append(total)
    return torch.stack(rows)


# ------------------------------------------------------------------ the kernels


@pytest.mark.parametrize("name", ROUTINGS)
def test_experts_by_rule(kernels, device, name):
    for dtype in DTYPES if name == "some served elsewhere" else DTYPES[:1]:
        given = operands(ROUTINGS[name], 7, 40, 24, dtype, device)
        assert_experts(fused_moe(*given), given, fused=_fused(kernels, dtype))


def _fused(kernels: str, dtype: torch.dtype) -> bool:
    return kernels == "triton" or dtype != torch.float16  # which the C++ leaves to the reference


@pytest.mark.parametrize("config", GATHERING, indirect=True)
def test_experts_in_every_configuration(config, device):
    # Expert 0: a full tile and a partial one; expert 1: nothing. More than one tile of columns, the last one partial.
    ids = torch.cat([torch.zeros(config.rows + 2, 1, dtype=torch.int64), torch.tensor([[2], [3], [2]])])
    given = operands(ids, 3, config.depth + 8, config.columns + 8, torch.bfloat16, device)
    out = fused_moe(*given)
    assert_experts(out, given)
    assert_bitwise(fused_moe(*given), out)  # TRAPS C14


def test_swiglu_in_every_configuration(config, device):
    counts = [5, 0, config.rows + 2, 1]
    x, gate_up, ends = in_place(counts, config.columns + 8, config.depth + 8, torch.bfloat16, device, unassigned=3)
    out = grouped_gemm_swiglu(x, gate_up, ends)
    assert_swiglu(out, x, gate_up, counts)
    assert_bitwise(grouped_gemm_swiglu(x, gate_up, ends), out)


def in_place(counts: list[int], width: int, hidden: int, dtype: torch.dtype, device, unassigned: int = 0):
    """x, gate_up, ends; NaN wherever nothing may be read that counts."""
    x, gate_up = (
        torch.randn(sum(counts) + unassigned, hidden),
        torch.randn(len(counts), 2 * width, hidden) / hidden**0.5,
    )
    x[sum(counts) :] = NAN
    gate_up[torch.tensor(counts) == 0] = NAN
    return x.to(device, dtype), gate_up.to(device, dtype), torch.tensor(counts).cumsum(0).to(device)


def assert_swiglu(got: Tensor, x: Tensor, gate_up: Tensor, counts: list[int], fused: bool = True) -> None:
    assert (got.shape, got.dtype) == ((x.shape[0], gate_up.shape[1] // 2), x.dtype)
    start = 0
    for expert, count in enumerate(counts):
        rows, start = slice(start, start + count), start + count
        exact = swiglu_rows(x[rows].double().cpu(), gate_up[expert].double().cpu(), x.dtype, fused)
        assert_within(got[rows], *exact)
    assert torch.equal(got[start:], torch.zeros_like(got[start:]))


@pytest.mark.parametrize(
    ("counts", "dtype"),
    [([0, 37, 0], DTYPES[0]), ([0, 0, 1], DTYPES[1]), ([0, 0, 0], DTYPES[0]), ([1] * 19, DTYPES[0]), ([3], DTYPES[2])],
)
def test_swiglu_by_rule(launch, device, counts, dtype):
    x, gate_up, ends = in_place(counts, 24, 40, dtype, device, unassigned=2)
    assert_swiglu(grouped_gemm_swiglu(x, gate_up, ends), x, gate_up, counts)
    with use_backend("reference"):
        assert_swiglu(grouped_gemm_swiglu(x, gate_up, ends), x, gate_up, counts, fused=False)


def test_prefill_shares_one_table_between_both_products(launch, device, monkeypatch):
    """Rows are gathered by pointers for the first product, copied in bulk for the second; one choice is not ours."""
    from deepseek_kernels.moe.grouped_gemm import launch as second

    monkeypatch.setattr(second, "hopper", lambda device: True)
    monkeypatch.setattr(second, "product_config", lambda *sizes: grouped_configs.SQUARE)
    monkeypatch.setattr(launch, "swiglu_config", lambda *sizes: configs.MANY)
    tables, make = [], launch.tile_table
    monkeypatch.setattr(launch, "tile_table", lambda *a, **more: tables.append(make(*a, **more)) or tables[-1])
    given = operands(torch.tensor([[0, 3], [2, 0], [3, 3], [0, 2]]), 3, 136, 72, torch.bfloat16, device)
    assert_experts(fused_moe(*given), given)
    assert len(tables) == 1
    assert tables[0][0].tolist() == [2] * 3, "one tile each for experts 0 and 2, none for unassigned choices"


def test_integers_come_out_exactly(config, device):
    """silu(gate) is gate in float32 from 24 on: every number here is an integer that bfloat16 holds."""
    hidden, width, tokens, experts = 2 * config.depth, config.columns + 16, config.rows + 3, 2
    x = torch.randint(1, 3, (tokens, hidden)).double()
    gate_up = torch.zeros(experts, 2 * width, hidden, dtype=torch.float64)
    for expert, row in ((e, r) for e in range(experts) for r in range(width)):
        gate_up[expert, row, torch.randperm(hidden)[:24]] = 1  # sums of 24 to 48
        gate_up[expert, width + row, torch.randint(hidden, (1,))] = 1 - 2 * float(torch.randint(2, (1,)))
    down = torch.zeros(experts, hidden, width, dtype=torch.float64)
    down[:, torch.arange(hidden), torch.randint(width, (hidden,))] = 2
    ids, weights = spread(tokens, experts, 2), torch.randint(1, 4, (tokens, 2)).float()
    half = [one.to(device, torch.bfloat16) for one in (x, gate_up, down)]
    gates, ups = torch.einsum("th,eih->tei", x, gate_up).chunk(2, -1)
    if config.specialized:
        swiglu = grouped_gemm_swiglu(*half[:2], torch.tensor([tokens - 2, tokens], device=device))
        owner = (torch.arange(tokens) >= tokens - 2).long()
        assert torch.equal(swiglu.cpu().double(), (gates * ups)[torch.arange(tokens), owner])
        return
    y = torch.einsum("tei,ehi->teh", gates * ups, down)
    exact = (y[torch.arange(tokens)[:, None], ids] * weights[:, :, None]).sum(1)
    assert_bitwise(fused_moe(*half, ids.to(device), weights.to(device)).cpu(), exact.bfloat16())


@given(
    tokens=st.integers(1, 12),
    experts=st.integers(1, 6),
    choices=st.integers(1, 4),
    hidden=st.integers(1, 70),
    width=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_size(kernels, device, tokens, experts, choices, hidden, width, dtype, seed):
    torch.manual_seed(seed)
    ids = torch.randint(experts + 1, (tokens, choices))
    given = operands(ids, experts, hidden, width, dtype, device)
    assert_experts(fused_moe(*given), given, fused=_fused(kernels, dtype))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")  # numpy's, in the interpreter
def test_what_one_expert_has_stays_with_it(config, device):
    """Tiles copy rows and weights of their neighbours: an infinity or a NaN there must not come through as 0 * NaN."""
    counts = [5, 20, 7]
    x, gate_up, ends = in_place(counts, 24, 72, torch.bfloat16, device)
    x[5:25], gate_up[1] = float("inf"), NAN
    out = grouped_gemm_swiglu(x, gate_up, ends)
    assert out[5:25].isnan().all()
    for expert, rows in ((0, slice(0, 5)), (2, slice(25, 32))):
        assert_swiglu(out[rows], x[rows], gate_up[expert : expert + 1], [rows.stop - rows.start])


LAYOUTS = {
    "x: every other column": (0, lambda t: torch.stack([t, t], -1).flatten(1)[:, ::2]),
    "x: columns of a wider matrix": (0, lambda t: torch.cat([t, t], 1)[:, : t.shape[1]]),
    "x: off by two bytes": (0, lambda t: torch.cat([t[:1, 0], t.flatten()])[1:].view_as(t)),
    "x: one row repeated": (0, lambda t: t[:1].expand_as(t)),
    "gate_up: transposed": (1, lambda t: t.mT.contiguous().mT),
    "gate_up: every other expert": (1, lambda t: torch.cat([t, t], 1).view(2 * len(t), *t.shape[1:])[::2]),
    "down: transposed": (2, lambda t: t.mT.contiguous().mT),
    "ids: transposed": (3, lambda t: t.T.contiguous().T),
    "weights: columns of a wider matrix": (4, lambda t: torch.cat([t, t], 1)[:, : t.shape[1]]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(kernels, device, name):
    given = list(operands(torch.tensor([[0, 2], [2, 1], [1, 3]]), 3, 40, 24, torch.bfloat16, device))
    index, view = LAYOUTS[name]
    given[index] = view(given[index])
    assert_experts(fused_moe(*given), tuple(given), fused=kernels == "triton" or index in (0, 3, 4))


@pytest.mark.parametrize("sizes", [(0, 2, 3, 8, 8), (2, 0, 3, 8, 8), (2, 2, 3, 0, 8), (2, 2, 3, 8, 0), (2, 2, 0, 8, 8)])
def test_nothing_adds_up_to_zeros(kernels, device, sizes):
    """No tokens, choices, hidden features, columns, experts."""
    tokens, choices, experts, hidden, width = sizes
    ids = torch.zeros(tokens, choices, dtype=torch.int64)
    given = operands(ids, experts, hidden, width, torch.bfloat16, device)
    for backend in (kernels, "reference"):
        with use_backend(backend):
            assert torch.equal(fused_moe(*given), torch.zeros(tokens, hidden, dtype=torch.bfloat16, device=device))


# ------------------------------------------------------------------ choosing


def test_rule():
    def rule(rows, experts, aligned=True, gathered=True, generation=9):
        return configs.swiglu_config(rows, experts, aligned, gathered, generation)

    assert rule(32768, 32) is rule(32768, 32, generation=10) is configs.MANY  # 4096 tokens, top-8
    assert rule(32768, 32, gathered=False) is configs.WIDE
    assert rule(32768, 32, gathered=False, generation=0) is configs.MANY
    assert rule(32768, 32, generation=8) is rule(32768, 32, generation=12) is configs.MEDIUM
    assert rule(2048, 32) is configs.MEDIUM
    assert rule(512, 32) is rule(8, 256) is rule(1, 1) is rule(0, 0) is configs.FEW  # decoding
    assert rule(32768, 32, aligned=False) is configs.UNALIGNED


def test_kernels_run_only_without_a_gradient(launch, device, monkeypatch):
    calls, kernels = [], launch.fused_moe
    monkeypatch.setattr(launch, "fused_moe", lambda *given: calls.append(1) or kernels(*given))
    x, *rest = operands(spread(4, 3, 2), 3, 16, 8, torch.bfloat16, device)
    x.requires_grad_()
    assert fused_moe(x, *rest).requires_grad and not calls
    with torch.no_grad():
        assert not fused_moe(x, *rest).requires_grad
    assert fused_moe(x.detach(), *rest).isfinite().all() and len(calls) == 2


def test_what_the_kernels_cannot_do_has_a_reason(device, triton_backend):
    given = operands(spread(4, 3, 2), 3, 16, 8, torch.float64, device)
    with use_backend("auto"):
        assert fused_moe(*given).dtype == torch.float64
    with use_backend("triton"), pytest.raises(BackendError, match=r"float16 or float32, got torch\.float64"):
        fused_moe(*given)
    narrow = operands(spread(4, 3, 2), 3, 16, 8, torch.float32, device)
    with use_backend("auto"):
        assert not torch.equal(fused_moe(*narrow, "relu"), fused_moe(*narrow))
    with use_backend("triton"), pytest.raises(BackendError, match="its activation is silu, got relu"):
        fused_moe(*narrow, "relu")
    x, gate_up, ends = in_place([3, 2], 8, 16, torch.bfloat16, device)
    with use_backend("auto"):
        assert grouped_gemm_swiglu(x.requires_grad_(), gate_up, ends).requires_grad
    with use_backend("triton"), pytest.raises(BackendError, match="its fused SwiGLU has no gradient"):
        grouped_gemm_swiglu(x, gate_up, ends)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(4, 15)}, r"expected x \[T, 16\] beside gate_up \[3, 16, 16\], got \[4, 15\]"),
        ({0: torch.zeros(4)}, r"expected x \[T, H\] and gate_up \[E, 2 I, H\], got \[4\] and \[3, 16, 16\]"),
        ({1: torch.zeros(3, 15, 16)}, r"got \[4, 16\] and \[3, 15, 16\]"),
        ({2: torch.zeros(3, 8, 16)}, r"expected down \[3, 16, 8\], got \[3, 8, 16\]"),
        ({3: torch.zeros(3, 2, dtype=torch.int64)}, r"expected int64 expert_ids \[4, K\], got torch.int64 \[3, 2\]"),
        ({3: torch.zeros(4, 2, dtype=torch.int32)}, r"got torch.int32 \[4, 2\]"),
        ({4: torch.zeros(4, 3)}, r"expected weights \[4, 2\], got \[4, 3\]"),
        ({0: torch.zeros(4, 16).double()}, "of one dtype, got torch.float64, torch.float32, torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = dict(enumerate(operands(spread(4, 3, 2), 3, 16, 8, torch.float32, "cpu"))) | change
    with pytest.raises(ValueError, match=message):
        fused_moe(*(given[i] for i in range(5)))


def test_swiglu_refuses_other_ends():
    with pytest.raises(ValueError, match=r"expected ends \[3\], got \[2\]"):
        grouped_gemm_swiglu(torch.zeros(4, 16), torch.zeros(3, 16, 16), torch.tensor([2, 4]))


# ------------------------------------------------------------------ around the kernels


def test_follows_autocast(kernels, device):
    given = operands(spread(4, 3, 2), 3, 16, 8, torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = fused_moe(*given)
        assert grouped_gemm_swiglu(given[0], given[1], torch.tensor([1, 2, 4], device=device)).dtype == torch.bfloat16
    narrow = tuple(one.bfloat16() for one in given[:3])
    assert_bitwise(out, fused_moe(*narrow, *given[3:]))


def test_compiled_gives_the_same(kernels, device):
    torch.compiler.reset()
    given = operands(spread(4, 3, 2), 3, 16, 8, torch.bfloat16, device)
    compiled = torch.compile(fused_moe, fullgraph=True, backend="aot_eager")
    assert_bitwise(compiled(*given), fused_moe(*given))
    x, gate_up, ends = in_place([3, 0, 2], 8, 16, torch.bfloat16, device)
    compiled = torch.compile(grouped_gemm_swiglu, fullgraph=True, backend="aot_eager")
    assert_bitwise(compiled(x, gate_up, ends), grouped_gemm_swiglu(x, gate_up, ends))


def test_custom_operators_are_registered_properly(launch, device):
    given = operands(spread(4, 3, 2), 3, 16, 8, torch.bfloat16, device)
    torch.library.opcheck(launch.fused_moe, tuple(one.nan_to_num() for one in given))
    x, gate_up, ends = in_place([3, 1, 2], 8, 16, torch.bfloat16, device)
    torch.library.opcheck(launch.grouped_gemm_swiglu, (x, gate_up, ends))


def few(tokens: int = 2, experts: int = 4) -> tuple[Tensor, ...]:
    """Operands of few tokens, which the reference looks at on a CPU."""
    ids = torch.arange(tokens * 2).view(tokens, 2) % experts
    return torch.randn(tokens, 8), torch.randn(experts, 12, 8), torch.randn(experts, 8, 6), ids, torch.rand(tokens, 2)


@pytest.mark.parametrize("wrong", [-1, 5, 1 << 40])
@torch.no_grad()
def test_few_tokens_refuse_ids_out_of_range(wrong):
    x, gate_up, down, ids, weights = few()
    ids[1, 0] = wrong
    with use_backend("reference"), pytest.raises(ValueError, match=f"expected expert ids from 0 to 4, got .*{wrong}"):
        fused_moe(x, gate_up, down, ids, weights)


@torch.no_grad()
def test_few_tokens_are_traced_without_their_ids():
    """A trace by `make_fx` runs other ids too."""
    from torch.fx.experimental.proxy_tensor import make_fx

    x, gate_up, down, ids, weights = few()
    with use_backend("reference"):
        traced = make_fx(lambda ids: fused_moe(x, gate_up, down, ids, weights))(ids)
        other = (ids + 1) % 4
        torch.testing.assert_close(traced(other), fused_moe(x, gate_up, down, other, weights))
