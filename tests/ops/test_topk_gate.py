"""The choice of experts: the definition token by token, and the kernels against the reference, bit by bit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek_kernels import BackendError, use_backend
from deepseek_kernels.moe.topk_gate import topk_gate
from deepseek_kernels.testing.numeric import assert_bitwise


@dataclass(frozen=True)
class Routing:
    experts: int
    top_k: int
    n_group: int = 1
    topk_group: int = 1
    group_best: int = 1
    biased: bool = False
    normalize: bool = True
    factor: float = 1.0

    def options(self) -> dict[str, Any]:
        names = ("n_group", "topk_group", "group_best", "normalize", "factor")
        return {name: getattr(self, name) for name in names}

    def operands(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor | None, int]:
        """As a model has them: sigmoids with a bias that may be negative, or a softmax without one."""
        logits = torch.randn(tokens, self.experts) * 2
        scores = logits.sigmoid() if self.biased else logits.softmax(-1)
        bias = torch.randn(self.experts).to(device) if self.biased else None
        return scores.to(device), bias, self.top_k


PUBLISHED = {
    "V3": Routing(256, 8, 8, 4, 2, biased=True, factor=2.5),
    "V2": Routing(160, 6, 8, 3, normalize=False, factor=16.0),  # groups of 20
    "V2-Lite": Routing(64, 6, normalize=False),
    "Kimi-K2": Routing(384, 8, biased=True, factor=2.827),
}
ROUTINGS = PUBLISHED | {
    "one expert": Routing(1, 1),
    "every expert": Routing(5, 5, biased=True, factor=1.7),
    "groups of one": Routing(6, 2, 6, 3),
    "groups of two, summed": Routing(6, 3, 3, 2, 2, biased=True),  # three groups, four with what fills up
    "every group": Routing(12, 5, 3, 3, 2, biased=True),
    "all of the kept groups": Routing(12, 6, 4, 2, 2, normalize=False),
    "most experts": Routing(1024, 3, biased=True),
    "most groups": Routing(32 * 3, 4, 32, 9, 2),
}


def chosen_one_by_one(scores: Tensor, bias: Tensor | None, routing: Routing) -> list[list[int]]:
    """The definition, with Python's sort; numbers must be such that no sum is rounded."""
    size, result = routing.experts // routing.n_group, []

    def order(values: list[float]) -> list[int]:
        """Falling, the smaller id first among equals; NaN before all numbers."""
        return sorted(range(len(values)), key=lambda i: (not math.isnan(values[i]), -values[i], i))

    for row in scores.double().tolist():
        shift = [0.0] * routing.experts if bias is None else bias.double().tolist()
        values = [a + b for a, b in zip(row, shift, strict=True)]
        groups = [values[g * size : (g + 1) * size] for g in range(routing.n_group)]
        if routing.topk_group < routing.n_group:
            sums = [sum(group[i] for i in order(group)[: routing.group_best]) for group in groups]
            kept = order(sums)[: routing.topk_group]
            groups = [group if g in kept else [-math.inf] * size for g, group in enumerate(groups)]
        result.append(order([value for group in groups for value in group])[: routing.top_k])
    return result


def few_values(tokens: int, routing: Routing, values: tuple[float, ...]) -> tuple[Tensor, Tensor | None]:
    """Scores and bias from a handful of numbers, and so with many ties."""
    table = torch.tensor(values)
    scores = table[torch.randint(len(values), (tokens, routing.experts))]
    return scores, table[torch.randint(len(values), (routing.experts,))] if routing.biased else None


@pytest.mark.parametrize("name", ROUTINGS)
def test_choice_follows_the_definition(name):
    routing = ROUTINGS[name]
    scores, bias = few_values(7, routing, (-0.75, 0.0, 0.125, 0.5))
    scores[:3] = torch.randint(1, 2**12, (3, routing.experts)) / 2**13  # hardly any ties
    _, ids = topk_gate(scores, bias, routing.top_k, **routing.options())
    assert ids.dtype == torch.int64
    assert ids.tolist() == chosen_one_by_one(scores, bias, routing)


@pytest.mark.parametrize("name", ROUTINGS)
def test_weights_are_the_unbiased_scores(name):
    routing = ROUTINGS[name]
    scores, bias, top_k = routing.operands(7, torch.device("cpu"))
    weights, ids = topk_gate(scores, bias, top_k, **routing.options())
    exact = scores.double().gather(1, ids)
    if routing.normalize:
        exact = exact / exact.sum(1, keepdim=True)
    # The sum, the quotient and the product, each rounded to half a unit in 2^24; so is the factor.
    torch.testing.assert_close(weights.double(), exact * routing.factor, rtol=4 * 2.0**-24, atol=0)


def test_a_bias_moves_the_choice_and_not_the_weights():
    """TRAPS C3, C4: a bias that makes every choice negative keeps the kept groups in front."""
    scores = torch.tensor([[0.5, 0.25, 0.125, 0.75]])
    weights, ids = topk_gate(
        scores, torch.tensor([-9.0, -8.0, -1.0, -2.0]), 2, n_group=2, topk_group=1, normalize=False
    )
    assert ids.tolist() == [[2, 3]]
    assert weights.tolist() == [[0.125, 0.75]]


def test_zeros_weigh_nothing_and_not_nan():
    weights, ids = topk_gate(torch.zeros(2, 4), None, 2)
    assert ids.tolist() == [[0, 1], [0, 1]]
    assert weights.tolist() == [[0.0, 0.0], [0.0, 0.0]]


# Gradients.


def weighed_one_by_one(scores: Tensor, ids: Tensor, routing: Routing) -> Tensor:
    rows = []
    for t in range(scores.shape[0]):
        row = [scores[t, i] for i in ids[t].tolist()]
        total = sum(row) + 1e-20 if routing.normalize else 1.0
        rows.append(torch.stack([value / total * routing.factor for value in row]))
    return torch.stack(rows)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", ["V3", "V2", "V2-Lite", "one expert", "every expert"])
def test_gradients_of_the_scores(backend, triton_backend, device, name):
    routing = ROUTINGS[name]
    scores, bias, top_k = routing.operands(3, device)
    grad = torch.randn(3, top_k, device=device)
    scores.requires_grad_()
    with use_backend(backend):
        weights, ids = topk_gate(scores, bias, top_k, **routing.options())
        weights.backward(grad)
    wide = scores.detach().double().requires_grad_()
    weighed_one_by_one(wide, ids, routing).backward(grad.double())
    # d s = factor / total (g - sum of g s / total): about K + 4 roundings of terms no larger than these.
    largest = grad.abs().double().amax(1, keepdim=True) * routing.factor
    if routing.normalize:
        largest = 2 * largest / scores.detach().double().gather(1, ids).sum(1, keepdim=True)
    error = (scores.grad.double() - wide.grad).abs()
    assert (error <= (top_k + 4) * 2.0**-24 * largest).all()
    chosen = torch.zeros_like(error, dtype=torch.bool).scatter(1, ids, True)
    assert (scores.grad[~chosen] == 0).all()


def test_gradcheck():
    scores = torch.rand(3, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True)
    for normalize in (True, False):
        options = {"n_group": 4, "topk_group": 2, "group_best": 2, "normalize": normalize, "factor": 1.5}
        assert torch.autograd.gradcheck(lambda s, o=options: topk_gate(s, bias, 3, **o)[0], (scores,))
    topk_gate(scores, bias, 3)[0].sum().backward()
    assert bias.grad is None


# The kernels against the reference.


@pytest.fixture(params=["triton", "cpu"])
def kernels(request) -> str:
    request.getfixturevalue(f"{request.param}_backend")
    return request.param


def assert_same(scores: Tensor, bias: Tensor | None, routing: Routing, kernels: str = "triton") -> None:
    with use_backend("reference"):
        expected = topk_gate(scores, bias, routing.top_k, **routing.options())
    with use_backend(kernels):
        got = topk_gate(scores, bias, routing.top_k, **routing.options())
    assert_bitwise(got[1], expected[1], strides=False)
    # The payload of a NaN is not specified.
    assert torch.equal(got[0].isnan(), expected[0].isnan())
    assert_bitwise(got[0].nan_to_num(nan=-1.0), expected[0].nan_to_num(nan=-1.0), strides=False)
    assert got[0].is_contiguous() and got[1].is_contiguous()


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("name", ROUTINGS)
def test_kernel_is_bitwise(kernels, device, name, tokens):
    scores, bias, _ = ROUTINGS[name].operands(tokens, device)
    assert_same(scores, bias, ROUTINGS[name], kernels)


interpreted = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # by numpy
HOSTILE = (math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 0.5)


@interpreted
@pytest.mark.parametrize("name", ["V2-Lite", "groups of two, summed", "every expert", "groups of one", "Kimi-K2"])
def test_values_that_no_score_should_have(request, device, name):
    routing = ROUTINGS[name]
    scores, bias = few_values(16, routing, HOSTILE)
    scores[0], scores[1], scores[2] = math.nan, -math.inf, -0.0
    for kernels in ("triton", "cpu"):
        request.getfixturevalue(f"{kernels}_backend")
        assert_same(scores.to(device), None if bias is None else bias.to(device), routing, kernels)
    clean = torch.where(scores.abs() < 1e38, scores, torch.nan)
    _, ids = topk_gate(clean, None, routing.top_k, **routing.options())
    assert ids.tolist() == chosen_one_by_one(clean, None, routing)


@interpreted
def test_nan_comes_first_and_indexes_nothing_else(kernels, device):
    """Of either sign, and whatever its payload."""
    nans = torch.tensor([0x7FC00000, -0x400000, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    scores = torch.tensor([[1.0, math.inf, 0, 0, 0, 0, 2.0, 3.0]]).expand(3, 8).clone()
    scores[1, 2:6] = nans
    scores[2] = math.nan
    for backend in ("reference", kernels):
        with use_backend(backend):
            _, ids = topk_gate(scores.to(device), None, 6)
        assert ids.tolist() == [[1, 7, 6, 0, 2, 3], [2, 3, 4, 5, 1, 7], [0, 1, 2, 3, 4, 5]]


def test_a_bias_of_minus_infinity_is_as_bad_as_an_excluded_group(kernels, device):
    bias = torch.tensor([-8.0, -8, -8, 0, -math.inf, -math.inf], device=device)
    for backend in ("reference", kernels):
        with use_backend(backend):
            _, ids = topk_gate(torch.ones(1, 6, device=device), bias, 3, n_group=2, topk_group=1)
        assert ids.tolist() == [[3, 0, 1]]


@st.composite
def routings(draw) -> Routing:
    groups = draw(st.integers(1, 5))
    size = draw(st.integers(1, 7))
    kept = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, min(kept * size, 9)))
    best = draw(st.integers(1, min(2, size)))
    return Routing(
        groups * size, top_k, groups, kept, best, draw(st.booleans()), draw(st.booleans()), draw(st.floats(0.5, 4))
    )


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(routing=routings(), tokens=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_ties_go_to_the_smaller_id_in_both(kernels, device, routing, tokens, seed):
    torch.manual_seed(seed)
    scores, bias = few_values(tokens, routing, (-0.0, 0.0, 0.25))
    assert_same(scores.to(device), None if bias is None else bias.to(device), routing, kernels)
    _, ids = topk_gate(scores, bias, routing.top_k, **routing.options())
    assert ids.tolist() == chosen_one_by_one(scores, bias, routing)


@pytest.mark.parametrize("layout", ["columns apart", "wider", "transposed", "one row repeated"])
def test_other_layouts_give_the_same(kernels, device, layout):
    def lay(t: Tensor) -> Tensor:
        return {
            "columns apart": lambda: torch.stack([t, t], -1).flatten(1)[:, ::2],
            "wider": lambda: torch.cat([t, torch.full_like(t, torch.nan)], 1)[:, : t.shape[1]],
            "transposed": lambda: t.T.contiguous().T,
            "one row repeated": lambda: t[:1].expand_as(t),
        }[layout]()

    routing = ROUTINGS["every group"]
    scores, bias, top_k = routing.operands(5, device)
    scores, grad, bias = lay(scores), lay(torch.randn(5, top_k, device=device)), torch.stack([bias, bias], -1)[:, 0]
    assert_same(scores, bias, routing, kernels)
    if kernels == "cpu":
        return  # a gradient is the reference's
    gradients = []
    for one, other in ((scores, grad), (scores.contiguous(), grad.contiguous())):
        leaf = one.detach().requires_grad_()
        with use_backend(kernels):
            topk_gate(leaf, bias, top_k, **routing.options())[0].backward(other)
        gradients.append(leaf.grad)
    assert_bitwise(*gradients, strides=False)


@pytest.mark.parametrize("name", ["V3", "V2-Lite", "groups of two, summed", "most experts"])
def test_several_tokens_in_a_program_give_the_same(triton_backend, device, monkeypatch, name):
    from deepseek_kernels.moe.topk_gate import configs

    routing = ROUTINGS[name]
    scores, bias, top_k = routing.operands(5, device)  # the last program's are not all there
    grad = torch.randn(5, top_k, device=device)

    def results() -> list[Tensor]:
        leaf = scores.detach().requires_grad_()
        with use_backend("triton"):
            weights, ids = topk_gate(leaf, bias, top_k, **routing.options())
        weights.backward(grad)
        return [ids, weights.detach(), leaf.grad]

    alone = results()
    monkeypatch.setattr(configs, "_MOST_PROGRAMS", 0)
    assert configs.tokens_of(5, routing.experts) > 1
    for mine, theirs in zip(results(), alone, strict=True):
        assert_bitwise(mine, theirs)
    assert_same(scores, bias, routing)


def test_a_factor_may_be_an_integer(kernels, device):
    """As published configs write it."""
    scores = torch.rand(2, 4, device=device)
    with use_backend(kernels):
        assert_bitwise(topk_gate(scores, None, 2, factor=2)[0], topk_gate(scores, None, 2, factor=2.0)[0])


def test_compiled_gives_the_same(kernels, device):
    torch.compiler.reset()
    routing = ROUTINGS["groups of two, summed"]
    scores, bias, top_k = routing.operands(4, device)
    grad = torch.randn(4, top_k, device=device)

    def step(scores: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = topk_gate(scores, bias, top_k, **routing.options())
        return weights * 2, ids

    results = []
    with use_backend(kernels):
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            leaf = scores.detach().requires_grad_()
            weights, ids = function(leaf, bias)
            weights.backward(grad)
            results.append([weights.detach(), ids, leaf.grad])
    for mine, theirs in zip(*results, strict=True):
        assert_bitwise(mine, theirs)


def test_custom_operators_are_registered_properly(triton_backend, device):
    from deepseek_kernels.moe.topk_gate import launch

    scores, bias, top_k = ROUTINGS["groups of two, summed"].operands(4, device)
    numbers = (top_k, (3, 2, 2), True, 2.5)
    torch.library.opcheck(launch.topk_gate, (scores.requires_grad_(), bias, *numbers))


# What users do wrong.


def test_what_the_kernels_do_not_take_runs_on_the_reference(triton_backend, device):
    scores = torch.rand(2, 2048, device=device)
    with use_backend("auto"):
        assert topk_gate(scores.double(), None, 2)[0].dtype == torch.float64
        assert topk_gate(scores, None, 2)[1].shape == (2, 2)
    with use_backend("triton"):
        with pytest.raises(BackendError, match=r"its scores are float32, got torch.float64"):
            topk_gate(scores.double(), None, 2)
        with pytest.raises(BackendError, match=r"at most 1024 experts, got 2048"):
            topk_gate(scores, None, 2)
        with pytest.raises(BackendError, match=r"at most 32 groups, got 64"):
            topk_gate(scores[:, :128], None, 2, n_group=64, topk_group=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, b: topk_gate(s[0], b, 2), r"float32 or float64 scores \[T, E\], got torch.float32 \[12\]"),
        (lambda s, b: topk_gate(s.bfloat16(), b, 2), r"got torch.bfloat16 \[3, 12\]"),
        (lambda s, b: topk_gate(s, b[1:], 2), r"torch.float32 bias \[12\] or None, got torch.float32 \[11\]"),
        (lambda s, b: topk_gate(s, b.double(), 2), r"bias \[12\] or None, got torch.float64 \[12\]"),
        (lambda s, b: topk_gate(s, b, 2, n_group=5), r"groups that divide 12 experts, got 1 of 5 groups"),
        (lambda s, b: topk_gate(s, b, 2, n_group=0), r"got 1 of 0 groups"),
        (lambda s, b: topk_gate(s, b, 2, n_group=2, topk_group=3), r"got 3 of 2 groups"),
        (lambda s, b: topk_gate(s, b, 2, n_group=2, topk_group=0), r"got 0 of 2 groups"),
        (lambda s, b: topk_gate(s, b, 2, group_best=3), r"group_best 1 or 2.* got 3"),
        (lambda s, b: topk_gate(s, b, 2, n_group=12, topk_group=4, group_best=2), r"the 1 experts of a group, got 2"),
        (lambda s, b: topk_gate(s, b, 0), r"1 <= top_k <= 12 .* got 0"),
        (lambda s, b: topk_gate(s, b, 7, n_group=2, topk_group=1), r"1 <= top_k <= 6 .* got 7"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.rand(3, 12), torch.zeros(12))
