"""The head's product with its cross-entropy: against float64, in chunks, by segments, and without ever all logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deepseek_kernels import linear_cross_entropy, use_backend
from deepseek_kernels.loss.linear_cross_entropy import reference

# numpy's, in the interpreter: an infinity less an infinity, an exponential that vanishes
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning", "ignore:All-NaN slice")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    if request.param == "triton":
        request.getfixturevalue("triton_backend")
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def narrow(backend, monkeypatch):
    """Rows of several blocks at small sizes."""
    if backend == "triton":
        from deepseek_kernels.loss.linear_cross_entropy import launch

        monkeypatch.setattr(launch, "COLUMNS", 32)


def operands(tokens: int, size: int, classes: int, device, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a standard deviation of 2; every third target is ignored."""
    hidden = torch.randn(tokens, size).to(device, dtype).requires_grad_()
    weight = (torch.randn(classes, size) * 2 / math.sqrt(size)).to(device, dtype).requires_grad_()
    targets = torch.randint(classes, (tokens,))
    targets[2::3] = -100
    return hidden, weight, targets.to(device)


def expect(hidden: Tensor, weight: Tensor, targets: Tensor, factors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Loss [T], gradients of hidden and weight in float64, each with what rounding may make of it.

    To first order, with u = 2^-24 and v half an ulp of the operands' dtype if that has 16 bits, else 0: a logit is off
    by (H + 2) u |x| |w| from its sum and v from its rounding, and no more than that moves logsumexp. A sum of V
    exponentials is off by V u, the argument of one by u times its size, and functions by some units. That is how far
    a probability is off, relatively; the gradient of a logit is rounded once more, by v or to a multiple of 2^-24 in
    float16. Sums of K products are off by (K + 2) u; the gradients are rounded when they are made and when they are
    scaled. A half more for all that is of second order.
    """
    x, w = hidden.detach().double(), weight.detach().double()
    classes, u = w.shape[0], 2.0**-24
    narrow = hidden.dtype in (torch.bfloat16, torch.float16)
    v, tiny = (torch.finfo(hidden.dtype).eps / 2, 2.0**-25) if narrow else (0.0, 0.0)
    valid, chosen = targets != -100, targets.clamp(min=0)[:, None]
    logits = x @ w.T
    off = ((x.shape[1] + 2) * u * (x.abs() @ w.abs().T) + v * logits.abs()).amax(1, True)
    largest = logits.abs().amax(1, True) + math.log(classes)
    functions = u * (classes + 16 + 4 * largest)
    loss = torch.logsumexp(logits, 1) - logits.gather(1, chosen)[:, 0]
    p = logits.softmax(1)
    grad = p - torch.zeros_like(p).scatter_(1, chosen, 1.0)
    grad_off = p * (2 * off + functions) + (u + v) * grad.abs() + tiny
    scale = (factors.double() * valid)[:, None]
    grad, grad_off = grad * scale, grad_off * scale.abs()
    results = [(loss * valid, (2 * off + functions * (1 + largest))[:, 0] * valid)]
    for exact, size, its_off, count in (
        (grad @ w, grad.abs() @ w.abs(), grad_off @ w.abs(), classes),
        (grad.T @ x, grad.abs().T @ x.abs(), grad_off.T @ x.abs(), x.shape[0]),
    ):
        rounding = 2 * v * size + 2 * tiny * scale.abs().sum()
        results.append((exact, its_off + (count + 8) * u * size + rounding))
    return [(exact, 1.5 * bound) for exact, bound in results]


def check(hidden: Tensor, weight: Tensor, targets: Tensor, segments: list[int], chunk: int | None = None) -> None:
    factors = torch.linspace(0.5, 2.0, len(segments), device=hidden.device)
    out = linear_cross_entropy(hidden, weight, targets, chunk=chunk, segments=segments)
    gradients = torch.autograd.grad((out.loss * factors).sum(), (hidden, weight))
    rows = factors.repeat_interleave(torch.tensor(segments, device=hidden.device))
    (loss, loss_bound), *expected = expect(hidden, weight, targets, rows)
    assert out.loss.dtype == torch.float32
    for got, exact, bound in zip(out.loss, loss.split(segments), loss_bound.split(segments), strict=True):
        summing = len(exact) * 2.0**-24 * exact.abs().sum()
        assert (got.double() - exact.sum()).abs() <= bound.sum() + summing
    for got, operand, (exact, bound) in zip(gradients, (hidden, weight), expected, strict=True):
        assert got.dtype == operand.dtype and got.shape == operand.shape
        assert ((got.double() - exact).abs() <= bound).all()
    valid = (targets != -100).split(segments)
    assert out.count.tolist() == [int(part.sum()) for part in valid]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "classes", "segments", "chunk"),
    [
        (1, 61, [1], 1),  # one token
        (7, 97, [7], 3),  # the last chunk partial; three blocks and one column
        (24, 64, [24], 24),  # one chunk, two whole blocks
        (40, 33, [40], 64),  # a chunk larger than all
        (23, 61, [9, 0, 14], 5),  # chunks across segments, and an empty one
        (20, 61, [20], None),
    ],
)
def test_loss_and_gradients_against_float64(narrow, device, dtype, tokens, classes, segments, chunk):
    check(*operands(tokens, 16, classes, device, dtype), segments, chunk)


def test_wide_rows_against_float64(backend, device):
    """The kernel's own blocks: one whole, one of 5 columns."""
    check(*operands(3, 8, 8197, device, torch.bfloat16), [3], 2)


def test_cpus_with_and_without_16_bit_products(native):
    with use_backend("reference"):
        check(*operands(60, 16, 61, "cpu", torch.bfloat16), [20, 40], 27)


def test_gradcheck():
    hidden, weight, targets = operands(7, 5, 11, "cpu", torch.float64)

    def loss(hidden, weight):
        return linear_cross_entropy(hidden, weight, targets, chunk=2, segments=[4, 3], reduction="mean").loss

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_the_mean_is_over_the_targets_that_count(backend, device):
    hidden, weight, targets = operands(10, 8, 17, device)
    targets[6:] = -100
    summed, mean = (
        linear_cross_entropy(hidden, weight, targets, reduction=reduction, segments=[6, 4])
        for reduction in ("sum", "mean")
    )
    assert torch.equal(mean.loss, summed.loss / torch.tensor([4.0, 1.0], device=device))
    assert mean.loss[1] == 0 and mean.count.tolist() == [4, 0]
    plain = linear_cross_entropy(hidden, weight, targets)
    assert plain.loss.shape == plain.correct.shape == plain.count.shape == ()
    assert torch.equal(plain.loss, linear_cross_entropy(hidden, weight, targets, segments=[10]).loss[0])
    # Ten rows and six of them hold the same four losses and zeros, which each processor adds in an order of its own:
    # three roundings of 2^-24 on either side.
    assert (plain.loss - summed.loss[0]).abs() <= 6 * 2.0**-24 * summed.loss[0]


def test_guesses_are_the_first_of_the_greatest(narrow, device):
    """Equal logits within a block and in two blocks: the earlier one counts."""
    weight = torch.zeros(70, 2, device=device)
    weight[[3, 5, 40, 69], 0] = 1.0
    hidden = torch.tensor([[1.0, 0.0]], device=device).expand(6, 2)
    targets = torch.tensor([3, 5, 40, 69, 0, -100], device=device)
    out = linear_cross_entropy(hidden, weight, targets, segments=[1] * 6)
    assert out.correct.tolist() == [1, 0, 0, 0, 0, 0]
    flat = linear_cross_entropy(hidden * 0, weight, targets, segments=[1] * 6)
    assert flat.correct.tolist() == [0, 0, 0, 0, 1, 0]
    falling = linear_cross_entropy(-hidden, weight, targets, segments=[1] * 6)
    assert falling.correct.tolist() == [0, 0, 0, 0, 1, 0]


def test_accuracy_is_that_of_the_logits(narrow, device):
    hidden, weight, _ = operands(20, 8, 67, device)
    guesses = F.linear(hidden, weight).argmax(1)
    targets = torch.where(torch.arange(20, device=device) % 4 == 0, guesses, (guesses + 1) % 67)
    assert int(linear_cross_entropy(hidden, weight, targets, chunk=7).correct) == 5


def test_everything_ignored_is_zero(backend, device):
    hidden, weight, targets = operands(5, 8, 17, device)
    out = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), chunk=2, reduction="mean")
    gradients = torch.autograd.grad(out.loss, (hidden, weight))
    assert out.loss == 0 and out.correct == 0 and out.count == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("segments", [None, [0, 0], []])
def test_no_tokens(backend, device, segments):
    hidden, weight, targets = operands(0, 8, 17, device)
    out = linear_cross_entropy(hidden, weight, targets, segments=segments)
    gradients = torch.autograd.grad(out.loss.sum(), (hidden, weight))
    assert out.loss.sum() == 0 and out.loss.numel() == (1 if segments is None else len(segments))
    assert [gradient.shape for gradient in gradients] == [(0, 8), (17, 8)] and not gradients[1].any()


def test_another_number_may_mark_what_is_ignored(backend, device):
    hidden, weight, targets = operands(9, 8, 17, device)
    other = torch.where(targets == -100, 3, torch.where(targets == 3, 4, targets))
    expected = linear_cross_entropy(hidden, weight, torch.where(other == 3, -100, other))
    assert torch.equal(linear_cross_entropy(hidden, weight, other, ignore_index=3).loss, expected.loss)


@pytest.mark.parametrize("hostile", [math.nan, math.inf])
def test_ignored_rows_reach_nothing(narrow, device, hostile):
    hidden, weight, targets = operands(12, 8, 61, device)
    spoilt = hidden.detach().clone()
    spoilt[2::3] = hostile
    spoilt.requires_grad_()
    results = []
    for x in (hidden, spoilt):
        out = linear_cross_entropy(x, weight, targets, chunk=5)
        results.append((out.loss, *torch.autograd.grad(out.loss, (x, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not results[1][1][2::3].any()


def test_nan_propagates(narrow, device):
    hidden, weight, targets = operands(6, 8, 61, device)
    with torch.no_grad():
        hidden[4, 3] = math.nan
    out = linear_cross_entropy(hidden, weight, targets, segments=[3, 3])
    assert out.loss[0].isfinite() and out.loss[1].isnan()
    grad_hidden, grad_weight = torch.autograd.grad(out.loss[1], (hidden, weight))
    assert grad_hidden.isnan().any(1).tolist() == [False, False, False, False, True, False]
    assert grad_weight.isnan().all()
    with torch.no_grad():
        hidden[4, 3], weight[60] = 0.0, math.nan
    out = linear_cross_entropy(hidden, weight, torch.full_like(targets, 60), segments=[3, 3])
    assert out.loss.isnan().all() and out.correct.tolist() == [0, 0]


@pytest.mark.parametrize("sign", [1, -1])
def test_infinite_logits_are_those_of_cross_entropy(narrow, device, sign):
    """Minus infinity has probability 0, also where a whole block is; infinity makes NaN."""
    weight = torch.ones(70, 1, device=device)
    weight[:33] = -sign * 1e30
    hidden = torch.tensor([[1e30], [1.0]], device=device)
    targets = torch.tensor([50, 50], device=device)
    weight[33:] = 1e-30
    got = linear_cross_entropy(hidden, weight, targets, segments=[1, 1]).loss
    expected = F.cross_entropy(F.linear(hidden, weight), targets, reduction="none")
    torch.testing.assert_close(got, expected, rtol=80 * 2.0**-24, atol=0, equal_nan=True)
    assert bool(got[0].isnan()) == (sign < 0)


def test_other_layouts_give_the_same(narrow, device):
    hidden, weight, targets = operands(12, 16, 61, device)
    plain = hidden.detach(), weight.detach(), targets
    strided = (
        hidden.detach().T.contiguous().T,
        weight.detach().repeat_interleave(2, 0)[::2],
        targets.repeat_interleave(2)[::2],
    )
    results = []
    for x, w, t in (plain, strided):
        x, w = x.requires_grad_(), w.requires_grad_()
        out = linear_cross_entropy(x, w, t, chunk=5)
        results.append((out.loss, *torch.autograd.grad(out.loss, (x, w))))
    for a, b in zip(*results, strict=True):  # the products may take other paths: sums of 61 in another order
        torch.testing.assert_close(a, b, rtol=0, atol=64 * 2.0**-24 * float(b.detach().abs().max()) * 4)


def test_only_what_is_needed_is_computed(backend, device, monkeypatch):
    hidden, weight, targets = operands(6, 8, 17, device)
    whole = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets).loss, (hidden, weight))
    asked = []
    module, name = reference, "linear_cross_entropy_reference"
    if backend == "triton":
        from deepseek_kernels.loss.linear_cross_entropy import launch as module

        name = "linear_cross_entropy_triton"
    operator = getattr(module, name)

    def recorded(*arguments):
        results = operator(*arguments)
        asked.append((tuple(arguments[-1]), tuple(r.numel() for r in results[3:])))
        return results

    monkeypatch.setattr(module, name, recorded)
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight.detach(), targets).loss, hidden)
    assert torch.equal(grad, whole[0])
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden.detach(), weight, targets).loss, weight)
    assert torch.equal(grad, whole[1])
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).loss.requires_grad
    assert asked == [((True, False), (48, 0)), ((False, True), (0, 136)), ((False, False), (0, 0))]


def test_losses_of_segments_are_weighted_afterwards(backend, device):
    """One call for two heads gives what two calls give, whatever their weights; also if one is not used at all."""
    hidden, weight, targets = operands(13, 8, 17, device)
    for first, second in ((1.0, 0.3), (0.0, 2.0)):
        both = linear_cross_entropy(hidden, weight, targets, segments=[6, 7], chunk=4).loss
        got = torch.autograd.grad(first * both[0] + second * both[1], (hidden, weight))
        parts = [linear_cross_entropy(hidden[rows], weight, targets[rows]) for rows in (slice(6), slice(6, 13))]
        expected = torch.autograd.grad(first * parts[0].loss + second * parts[1].loss, (hidden, weight))
        for a, b in zip(got, expected, strict=True):  # sums of up to 17 terms, each below 4, in another order
            torch.testing.assert_close(a, b, rtol=0, atol=17 * 4 * 2.0**-24 * 4)


def test_autocast_is_that_of_linear(backend, device):
    hidden, weight, targets = operands(20, 16, 61, device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets).loss
    narrow = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets).loss
    assert torch.equal(loss, narrow)
    got, expected = (torch.autograd.grad(one, (hidden, weight)) for one in (loss, narrow))
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(got, expected, strict=True))


def test_the_same_bits_every_time(backend, device):
    hidden, weight, targets = operands(20, 16, 61, device, torch.bfloat16)
    results = []
    for _ in range(2):
        loss = linear_cross_entropy(hidden, weight, targets, chunk=6, segments=[5, 15]).loss
        results.append((loss, *torch.autograd.grad(loss.sum(), (hidden, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def largest_allocation(function) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    return max(event.self_cpu_memory_usage for event in profiler.events())


def test_logits_never_exist_all_at_once():
    hidden, weight, targets = operands(256, 4, 512, "cpu")
    logits, chunk = 256 * 512 * 4, 16 * 512 * 4

    def ours():
        linear_cross_entropy(hidden, weight, targets, chunk=16).loss.backward()

    def plain():
        F.cross_entropy(F.linear(hidden, weight), targets).backward()

    with use_backend("reference"):
        assert largest_allocation(ours) <= max(chunk, weight.numel() * 4)
    assert largest_allocation(plain) >= logits  # the measure sees what there is


@pytest.mark.parametrize(
    ("row_bytes", "budget", "rows"),
    [(129280 * 4, 128 << 20, 256), (129280 * 2, 1 << 30, 4096), (129280 * 2, 1 << 28, 1024), (1 << 30, 1 << 28, 16)],
)
def test_the_rule_for_chunks(row_bytes, budget, rows):
    from deepseek_kernels.loss.linear_cross_entropy import _chunk

    assert _chunk(row_bytes, budget) == rows


def test_second_derivatives_are_refused(backend, device):
    hidden, weight, targets = operands(5, 8, 17, device)
    loss = linear_cross_entropy(hidden, weight, targets).loss
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(grad.sum(), weight)


def test_compiled_gives_the_same(backend, device):
    torch.compiler.reset()
    hidden, weight, targets = operands(11, 8, 17, device)

    def loss(hidden, weight, targets):
        out = linear_cross_entropy(hidden, weight, targets, chunk=4, reduction="mean", segments=[5, 6])
        return out.loss.sum() + out.correct.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        value = function(hidden, weight, targets)
        results.append((value, *torch.autograd.grad(value, (hidden, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("needs", [(True, True), (False, True), (False, False)])
def test_the_custom_operators_are_registered_properly(backend, device, needs):
    hidden, weight, targets = operands(5, 8, 17, device)
    operator = reference.linear_cross_entropy_reference
    if backend == "triton":
        from deepseek_kernels.loss.linear_cross_entropy import launch

        operator = launch.linear_cross_entropy_triton
    arguments = (hidden, weight, targets, [2, 3], -100, 2, list(needs))
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_target_out_of_range_spoils_the_kernels_loss(triton_backend, device):
    """On a GPU nobody looks at the targets first."""
    from deepseek_kernels.loss.linear_cross_entropy import launch

    hidden, weight, targets = operands(3, 8, 17, device)
    for wrong in (17, -1, 1 << 40):
        targets[1] = wrong
        loss, *_ = launch.linear_cross_entropy_triton(hidden, weight, targets, [1, 1, 1], -100, 2, [False, False])
        assert loss.isnan().tolist() == [False, True, False]


X, W, T = torch.zeros(4, 8), torch.zeros(17, 8), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X[0], W, T), {}, r"hidden \[T, H\] and weight \[V, H\], got \[8\]"),
        ((X, W[:, :3], T), {}, r"got \[4, 8\] and \[17, 3\]"),
        ((X, W, T[:3]), {}, r"int64 targets \[4\], got torch.int64 \[3\]"),
        ((X, W, T.int()), {}, r"int64 targets \[4\], got torch.int32"),
        ((X, W.bfloat16(), T), {}, "one dtype, got torch.float32 and torch.bfloat16"),
        ((X.long(), W.long(), T), {}, "of floats, got torch.int64"),
        ((X, W, T + 17), {}, "-100 or between 0 and 16, got 17"),
        ((X, W, T - 1), {}, "-100 or between 0 and 16, got -1"),
        ((X, W, T), {"chunk": 0}, "at least one token, got 0"),
        ((X, W, T), {"reduction": "none"}, "'sum' or 'mean', got 'none'"),
        ((X, W, T), {"segments": [1, 2]}, r"add up to 4, got \[1, 2\]"),
        ((X, W, T), {"segments": [5, -1]}, r"add up to 4, got \[5, -1\]"),
    ],
)
def test_wrong_arguments_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*arguments, **options)
