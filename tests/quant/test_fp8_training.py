"""FP8 training: the three products against their formulas, and what stays as it was in a model that trains so."""

from __future__ import annotations

import functools
import gc

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepseek_arch.layers.linear import Linear
from deepseek_arch.moe.moe import Experts, MoE
from deepseek_arch.quant.fp8_training import (
    FP8,
    HIGH,
    FP8Policy,
    FP8Precision,
    FP8Rule,
    fp8_training,
)
from deepseek_arch.quant.fp8_training import operands as fp8_operands
from deepseek_arch.quant.fp8_training import products as fp8_products
from deepseek_arch.quant.fp8_training.products import product, swiglu_product
from deepseek_kernels import (
    quantize_blocks,
    quantize_grouped_transposed,
    quantize_rows,
    quantize_transposed,
    swiglu_quantize,
)
from support.fp8_layers import ALL, EPS32, linear, run, same, wide

POWERS = FP8Precision(input_scale="ue8m0", grad_scale="ue8m0", weight_scale="ue8m0")


def assert_product(got: Tensor, a: Tensor, b: Tensor) -> None:
    """`got` is `a @ b.T`, summed in float32 in any order: K + 2 roundings of at most eps / 2 on the sum of magnitudes
    (one for each dequantized operand, K for products and sums), doubled for their growth, and one of the result."""
    assert got.shape == (a.shape[0], b.shape[0])
    exact, magnitude, info = a @ b.T, a.abs() @ b.abs().T, torch.finfo(got.dtype)
    bound = (a.shape[1] + 2) * EPS32 * magnitude + info.eps / 2 * exact.abs().clamp(min=info.tiny)
    assert ((got.detach().double() - exact).abs() <= bound).all()


def sqnr(exact: Tensor, got: Tensor) -> float:
    """Signal to quantization noise, in decibels."""
    exact, got = exact.detach().double(), got.detach().double()
    return float(20 * torch.log10(exact.norm() / (got - exact).norm()))


def least_sqnr(operands: int) -> float:
    """Returns the least signal-to-noise ratio after so many operands were rounded to e4m3 in a chain of GEMMs.

    Three mantissa bits: between 2^n and 2^(n + 1) codes are 2^(n - 3) apart, so the mean square error is
    2^(2 n - 6) / 12 of squares of at least 2^(2 n): 28.9 dB if all were as small as that (31.5 dB for evenly spread
    mantissas). Independent errors add: 25.9 dB for the two operands of a product.
    """
    return float(-10 * torch.log10(torch.tensor(operands * 2.0**-6 / 12)))


def intercept(monkeypatch, name: str, wrapped) -> None:
    """Puts `wrapped(operator, ...)` in the place of an operator, wherever FP8 training calls it."""
    for module in (fp8_operands, fp8_products):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, functools.partial(wrapped, getattr(module, name)))


# ------------------------------------------------------------------ the three products


@pytest.mark.parametrize("precision", [FP8, POWERS], ids=["float32 scales", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens_", "inputs", "outputs"), [(130, 200, 150), (1, 128, 256), (7, 5, 3)])
def test_each_product_is_the_product_of_what_was_quantized(tokens_, inputs, outputs, dtype, precision):
    x, grad = torch.randn(tokens_, inputs).to(dtype), torch.randn(tokens_, outputs).to(dtype)
    layer = linear(inputs, outputs, FP8Policy((FP8Rule("*", precision),)), dtype=dtype)
    y, grad_x, grad_weight = run(layer, x, grad)
    weight = wide(quantize_blocks(layer.weight, scale_format=precision.weight_scale), rows=128)
    assert_product(y, wide(quantize_rows(x, precision.input_scale)), weight)
    assert_product(grad_x, wide(quantize_rows(grad, precision.grad_scale)), weight.T)
    by_token = [quantize_transposed(grad, precision.grad_scale), quantize_transposed(x, precision.input_scale)]
    assert_product(grad_weight, *map(wide, by_token))
    assert y.dtype == grad_x.dtype == grad_weight.dtype == dtype


# Widths of a part: whole blocks, and with an edge inside, where a group of the gradient must not straddle two parts.
@pytest.mark.parametrize("width", [128, 20, 192])
def test_each_product_of_experts(width):
    """Expert 1 has no rows, and the last row belongs to nobody."""
    experts, hidden, ends = 3, 136, torch.tensor([130, 130, 139])
    weight = torch.randn(experts, 2 * width, hidden, requires_grad=True)
    x, grad = torch.randn(140, hidden, requires_grad=True), torch.randn(140, 2 * width)
    y = product(x, weight, quantize_blocks(weight, parts=2), FP8, ends, parts=2)
    y.backward(grad)
    codes_x, codes_g = wide(quantize_rows(x)), grad
    by_token = [wide(quantize_grouped_transposed(t, ends)) for t in (grad, x)]
    starts, first = [0, 130, 130], [0, 256, 256]
    for expert, (start, end, column) in enumerate(zip(starts, ends.tolist(), first, strict=True)):
        rows, columns = slice(start, end), slice(column, column + -(-(end - start) // 128) * 128)
        parts = [wide(quantize_blocks(part), rows=128) for part in weight[expert].detach().chunk(2)]
        assert_product(y[rows], codes_x[rows], torch.cat(parts))
        halves = [wide(quantize_rows(half)) for half in codes_g[rows].chunk(2, dim=1)]
        assert_product(x.grad[rows], torch.cat(halves, dim=1), torch.cat(parts).T)
        assert_product(weight.grad[expert], *(t[:, columns] for t in by_token))
    assert not y[139:].any() and not x.grad[139:].any() and not weight.grad[1].any()


@pytest.mark.parametrize("cache", ["fp8", "high"])
def test_the_product_behind_swiglu_recomputes_it_from_its_cache(cache):
    ends, width, hidden = torch.tensor([0, 140, 150]), 136, 40
    precision = FP8Precision(swiglu_cache=cache, grad_scale="ue8m0")
    gate_up = torch.randn(150, 2 * width, requires_grad=True)
    weight = torch.randn(3, hidden, width, requires_grad=True)
    grad = torch.randn(150, hidden)
    y = swiglu_product(gate_up, weight, quantize_blocks(weight), precision, ends)
    y.backward(grad)

    kept = wide(quantize_rows(gate_up)).float() if cache == "fp8" else gate_up.detach()
    gate, up = kept.chunk(2, dim=-1)
    hidden_t = wide(quantize_grouped_transposed(gate * gate.sigmoid() * up, ends))
    grad_t = wide(quantize_grouped_transposed(grad, ends, "ue8m0"))
    codes_h, codes_g = wide(swiglu_quantize(gate_up.detach())), wide(quantize_rows(grad, "ue8m0"))
    for expert, (start, end, column) in enumerate([(0, 0, 0), (0, 140, 0), (140, 150, 256)]):
        rows, columns = slice(start, end), slice(column, column + -(-(end - start) // 128) * 128)
        codes_w = wide(quantize_blocks(weight[expert]), rows=128)
        assert_product(y[rows], codes_h[rows], codes_w)
        assert_product(weight.grad[expert], grad_t[:, columns], hidden_t[:, columns])
        exact = kept[rows].double().requires_grad_()
        (torch.nn.functional.silu(exact[:, :width]) * exact[:, width:]).backward(codes_g[rows] @ codes_w)
        # A product of `hidden` terms, as in assert_product, and a dozen roundings after it.
        bound = (hidden + 2 + 12) * EPS32 * (codes_g[rows].abs() @ codes_w.abs()).repeat(1, 2)
        bound *= 1.1 * (1 + kept[rows].double().abs().amax(1, keepdim=True))  # |silu'| <= 1.1, |silu(x)| <= |x|
        assert ((gate_up.grad[rows].double() - exact.grad).abs() <= bound).all()


def test_gradients_are_as_near_to_high_precision_as_the_format_allows():
    x, grad = torch.randn(3, 77, 300), torch.randn(3, 77, 200)
    layer = Linear(300, 200, bias=True)
    exact = run(layer, x, grad)
    fp8_training(layer, ALL)
    got = run(layer, x, grad)
    assert min(sqnr(a, b) for a, b in zip(exact[:3], got[:3], strict=True)) > least_sqnr(operands=2) > 25
    assert torch.equal(got[3], exact[3])  # the bias takes no part in a product


def test_experts_are_as_near_to_high_precision_as_the_format_allows():
    experts = Experts(4, 128, 128)
    x, ids, weights = torch.randn(60, 128), torch.stack([torch.randperm(5)[:3] for _ in range(60)]), torch.rand(60, 3)
    grad = torch.randn(60, 128)
    exact = run(experts, x, grad, ids, weights)
    fp8_training(MoE(nn.Identity(), experts))
    got = run(experts, x, grad, ids, weights)
    # y: x, W1, h, W2. dx: dy, W2, the cached gate and up (both from x and W1), d gate_up, W1.
    assert sqnr(exact[0], got[0]) > least_sqnr(operands=4)
    assert sqnr(exact[1], got[1]) > least_sqnr(operands=8)
    # dW1: as dx, but x for W1. dW2: dy, and h from x, W1 and the cached gate and up.
    assert sqnr(exact[2], got[2]) > least_sqnr(operands=8)
    assert sqnr(exact[3], got[3]) > least_sqnr(operands=6)


def test_weight_gradients_have_groups_of_tokens():
    """One feature is 10^7 times the others, beyond what e4m3 spans: in groups along features those would be zeros, and
    a gradient from the transposed codes of the forward product too (TRAPS E9)."""
    x, grad = torch.randn(256, 128), torch.randn(256, 64)
    x[:, 5] = x[:, 5].sign() * 1e7
    layer = Linear(128, 64, bias=False)
    exact = run(layer, x, grad)[2]
    fp8_training(layer, ALL)
    got = run(layer, x, grad)[2]
    others = torch.arange(128) != 5
    assert sqnr(exact[:, others], got[:, others]) > 25
    codes, scale = quantize_rows(x)
    assert (codes.float() * scale)[:, others].abs().max() == 0, "the test needs an outlier that hides the rest"


@pytest.mark.parametrize("factor", [2.0**-36, 2.0**-50])
@pytest.mark.parametrize("kind", ["linear", "experts"])
def test_gradients_may_be_tiny(kind, factor):
    """Those of a mean over many tokens are: a power of two in front changes no code.

    In experts, columns of a gate that hardly opens are 10^-6 of the others; they keep their codes too.
    """
    if kind == "linear":
        module, others = linear(40, 30), ()
        x, grad = torch.randn(9, 40), torch.randn(9, 30)
    else:
        module, others = Experts(2, 40, 36), (torch.tensor([[0], [1], [1]]), torch.ones(3, 1))
        fp8_training(MoE(nn.Identity(), module))
        x, grad = torch.randn(3, 40), torch.randn(3, 40)
    large, tiny = run(module, x, grad, *others), run(module, x, grad * factor, *others)
    assert same([t * factor for t in large[1:]], tiny[1:])


def test_the_smallest_columns_of_a_tiny_gradient_keep_their_codes():
    """Columns 2^-20 below the others, in a gradient 2^-36 below one: their amax is far below 1e-4."""
    layer = linear(40, 30)
    x, grad = torch.randn(9, 40), torch.randn(9, 30)
    grad[:, ::2] *= 2.0**-20
    large, tiny = run(layer, x, grad), run(layer, x, grad * 2.0**-36)
    assert torch.equal(large[2] * 2.0**-36, tiny[2])


@pytest.mark.parametrize("kind", ["fprop", "dgrad", "wgrad"])
def test_products_in_high_precision_are_exact_and_the_others_are_not(kind):
    """Each product is chosen on its own; for experts too."""
    order = ["fprop", "dgrad", "wgrad"]
    one_high = FP8Precision(**{kind: "high"})
    x, grad = torch.randn(50, 40), torch.randn(50, 30)
    layer = Linear(40, 30, bias=False)
    exact = run(layer, x, grad)
    fp8_training(layer, FP8Policy((FP8Rule("*", one_high),)))
    equal = [torch.allclose(a, b, rtol=0, atol=64 * EPS32) for a, b in zip(exact, run(layer, x, grad), strict=True)]
    assert equal == [one == kind for one in order]

    ends, weight = torch.tensor([20, 20, 50]), torch.randn(3, 30, 40)
    stacked = [weight.clone().requires_grad_() for _ in range(2)]
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outs = [
        product(inputs[0], stacked[0], quantize_blocks(weight), one_high, ends),
        product(inputs[1], stacked[1], None, HIGH, ends),
    ]
    for out in outs:
        out.backward(grad)
    pairs = [outs, [t.grad for t in inputs], [t.grad for t in stacked]]
    assert [torch.allclose(a, b, rtol=0, atol=256 * EPS32) for a, b in pairs] == equal


def test_scales_are_powers_of_two_exactly_where_the_paper_says_so(monkeypatch):
    """V3 report, 3.3.3: the input of o_proj, what is dispatched to experts, and the gradient dispatched to them."""
    seen = []

    def spy(name):
        def wrapped(operator, x, *arguments):
            out = operator(x, *arguments)
            seen.extend((x.shape[-1], bool((s.frexp().mantissa == 0.5).all())) for s in out[1::2])
            return out

        intercept(monkeypatch, name, wrapped)

    for name in ("quantize_rows", "quantize_transposed", "quantize_both", "quantize_grouped_transposed"):
        spy(name)
    spy("swiglu_quantize")

    def formats(module: nn.Module, x: Tensor, *others: Tensor) -> dict[int, set[bool]]:
        """By width of what was quantized: whether all scales were powers of two, for each time."""
        seen.clear()
        run(module, x, torch.randn_like(module(x, *others)), *others)
        return {width: {power for w, power in seen if w == width} for width, _ in seen}

    for name in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "gate_proj", "up_proj", "o_proj"):
        block = nn.ModuleDict({name: Linear(40, 30, bias=False)})
        fp8_training(block)
        assert formats(block[name], torch.randn(20, 40)) == {40: {name == "o_proj"}, 30: {False}}, name
    experts = Experts(2, 40, 30)
    fp8_training(MoE(nn.Identity(), experts))
    found = formats(experts, torch.randn(20, 40), torch.randint(2, (20, 1)), torch.ones(20, 1))
    # 40: the dispatched input and the dispatched gradient; 60: the cached gate and up and, as two times 30, the
    # gradient of both; 30: SwiGLU's output for wgrad.
    assert found == {40: {True}, 60: {False}, 30: {False}}


# ------------------------------------------------------------------ shapes, dtypes, what is computed and kept


def test_inputs_of_any_leading_shape_and_of_no_tokens():
    layer = linear(20, 10, bias=True)
    x = torch.randn(6, 20)
    whole = layer(x)
    assert torch.equal(layer(x.view(2, 3, 20)), whole.view(2, 3, 10)) and torch.equal(layer(x[0]), layer(x[:1])[0])
    assert torch.equal(layer(x.repeat(2, 1)[::2]), layer(x.repeat(2, 1)[::2].contiguous()))
    out, grad_x, grad_weight, grad_bias = run(layer, torch.empty(2, 0, 20), torch.empty(2, 0, 10))
    assert out.shape == (2, 0, 10) and grad_x.shape == (2, 0, 20)
    assert not grad_weight.any() and not grad_bias.any()


def test_experts_of_no_tokens_and_of_all_tokens_in_one():
    experts = Experts(3, 40, 20)
    fp8_training(MoE(nn.Identity(), experts))
    nothing = torch.empty(0, 2, dtype=torch.int64)
    out, grad_x, *grads = run(experts, torch.empty(0, 40), torch.empty(0, 40), nothing, torch.empty(0, 2))
    assert out.shape == grad_x.shape == (0, 40) and not any(g.any() for g in grads)
    crowd = torch.ones(9, 1, dtype=torch.int64)
    _, _, *grads = run(experts, torch.randn(9, 40), torch.randn(9, 40), crowd, torch.ones(9, 1))
    assert all(g[1].any() and not g[0].any() and not g[2].any() for g in grads)


def test_only_the_gradients_that_are_needed_are_made(monkeypatch):
    calls = []
    for name in ("fp8_gemm", "quantize_transposed", "quantize_both"):
        intercept(monkeypatch, name, lambda operator, *args, name=name: calls.append(name) or operator(*args))
    x, grad = torch.randn(9, 20), torch.randn(9, 10)
    frozen = linear(20, 10).requires_grad_(False)
    frozen(x.clone().requires_grad_()).backward(grad)
    assert calls == ["fp8_gemm", "fp8_gemm"] and frozen.weight.grad is None
    calls.clear()
    linear(20, 10)(x).backward(grad)  # the first layer: nobody asks for the input's gradient
    assert calls == ["quantize_both", "fp8_gemm", "quantize_transposed", "fp8_gemm"]
    calls.clear()
    with torch.no_grad():
        linear(20, 10)(x)
    assert calls == ["fp8_gemm"]


def test_an_input_that_two_layers_share_is_quantized_once(monkeypatch):
    calls = []

    def counted(operator, x, *arguments):
        calls.extend([1] if x.shape[-1] == 20 else [])  # gradients have 10 columns
        return operator(x, *arguments)

    intercept(monkeypatch, "quantize_both", counted)
    first, second = linear(20, 10), linear(20, 10)
    grad = torch.randn(3, 4, 10)
    x = torch.randn(3, 4, 20)
    apart = [run(layer, x, grad) for layer in (first, second)]
    assert len(calls) == 2
    shared = x.clone().requires_grad_()
    outs = [first(shared), second(shared)]
    assert len(calls) == 3
    for layer, out, expected in zip((first, second), outs, apart, strict=True):
        shared.grad = None
        layer.zero_grad()
        out.backward(grad)
        assert same([out.detach(), shared.grad, layer.weight.grad], expected)
    power_of_two = linear(20, 10, FP8Policy((FP8Rule("*", FP8Precision(input_scale="ue8m0")),)))
    power_of_two(shared)
    assert len(calls) == 4
    with torch.no_grad():
        shared.mul_(2)  # in place: another version of the same tensor
    assert torch.equal(first(shared), run(first, 2 * x, grad)[0])
    assert len(calls) == 6
    del outs, out, shared
    gc.collect()
    assert fp8_operands._last is None  # nothing is kept for an input that is gone


def test_backward_keeps_one_byte_an_element():
    """For a bfloat16 input: codes and a float32 scale for 128, instead of two bytes."""
    saved: list[Tensor] = []
    layer = linear(256, 128, dtype=torch.bfloat16)
    x = torch.randn(256, 256, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert sum(t.numel() * t.element_size() for t in saved) == (256 * 256 + 256 * 128) + 4 * (256 * 2 + 2)
    saved.clear()
    experts = Experts(1, 256, 128, dtype=torch.bfloat16)
    fp8_training(MoE(nn.Identity(), experts))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        experts(x, torch.zeros(256, 1, dtype=torch.int64), torch.ones(256, 1))
    widest = [tuple(t.shape) for t in saved if t.numel() >= 256 * 256 and t.element_size() > 1]
    assert widest == [(256, 256)]  # the experts' output, for the gradient of the routing weights


@pytest.mark.parametrize("kind", ["linear", "experts", "swiglu"])
def test_autocast_sets_the_output_and_leaves_the_operands_alone(kind):
    """The same codes are multiplied, in float32: only the output is rounded."""
    ends = torch.tensor([4, 9])
    weight = torch.randn(*(() if kind == "linear" else (2,)), 30, 20 if kind == "swiglu" else 40, requires_grad=True)
    x, grad = torch.randn(9, 40, requires_grad=True), torch.randn(9, 30).bfloat16()

    def results(low: bool) -> list[Tensor]:
        x.grad = weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            if kind == "swiglu":
                out = swiglu_product(x, weight, quantize_blocks(weight), FP8, ends)
            else:
                out = product(x, weight, quantize_blocks(weight), FP8, None if kind == "linear" else ends)
        out.backward(grad if low else grad.float())
        return [out.detach(), x.grad, weight.grad]

    plain, cast = results(low=False), results(low=True)
    assert cast[0].dtype == torch.bfloat16 and torch.equal(cast[0], plain[0].bfloat16())
    assert same(cast[1:], plain[1:])


def test_activations_in_bfloat16_over_master_weights_in_float32():
    layer = linear(40, 30)
    out, grad_x, grad_weight = run(layer, torch.randn(9, 40).bfloat16(), torch.randn(9, 30).bfloat16())
    assert (out.dtype, grad_x.dtype, grad_weight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_inputs_that_cannot_be_quantized_are_refused(dtype):
    with pytest.raises(ValueError, match="expected a float32, bfloat16 or float16 matrix"):
        linear(8, 4)(torch.ones(2, 8, dtype=dtype))


def test_a_second_derivative_is_refused():
    x = torch.randn(3, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(linear(8, 4)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_not_a_number_and_infinity_reach_the_gradients():
    """A loss scaler looks for them."""
    layer, grad = linear(8, 4), torch.ones(3, 4)
    for bad in (float("nan"), float("inf")):
        broken = grad.clone()
        broken[1, 2] = bad
        _, grad_x, grad_weight = run(layer, torch.randn(3, 8), broken)
        assert grad_x[1].isnan().all() and grad_weight[2].isnan().all()
        assert grad_x[[0, 2]].isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_gives_the_same_bits(reentrant):
    layer, x = linear(40, 30), torch.randn(9, 40)
    grad = torch.randn(9, 30)
    plain = run(layer, x, grad)
    x = x.requires_grad_()
    layer.zero_grad()
    out = checkpoint(layer, x, use_reentrant=reentrant)
    out.backward(grad)
    assert same(plain, [out.detach(), x.grad, layer.weight.grad])


@pytest.mark.slow
def test_compiled_code_computes_the_same():
    torch.compiler.reset()
    layer = linear(140, 30, bias=True)
    x, grad = torch.randn(2, 9, 140), torch.randn(2, 9, 30)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert same(run(compiled, x, grad), run(layer, x, grad))
    torch.compiler.reset()
