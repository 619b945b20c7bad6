"""FP8 training: the three products against their formulas, and what stays as it was in a model that trains so."""

from __future__ import annotations

import copy
import functools
import gc
import io
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepseek_arch.layers.linear import Linear
from deepseek_arch.models.causal_lm import DeepseekLM
from deepseek_arch.moe.moe import Experts, MoE
from deepseek_arch.quant.fp8_training import (
    FP8,
    HIGH,
    V3_RECIPE,
    FP8Policy,
    FP8Precision,
    FP8Rule,
    fp8_training,
    remove_fp8_training,
)
from deepseek_arch.quant.fp8_training import layers as fp8_layers
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
from support.small_models import config, error, model, tokens

EPS32 = torch.finfo(torch.float32).eps
ALL = FP8Policy((FP8Rule("*", FP8),))
POWERS = FP8Precision(input_scale="ue8m0", grad_scale="ue8m0", weight_scale="ue8m0")
# A dense layer, one with experts, and a prediction layer: every kind of weight once or twice.
SMALL = config(
    "v3",
    num_hidden_layers=2,
    num_nextn_predict_layers=1,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
)


def wide(quantized: tuple[Tensor, Tensor], rows: int = 1) -> Tensor:
    """Codes times scales in float64, for groups of `rows` by 128."""
    codes, scale = quantized
    scale = scale.double().repeat_interleave(rows, 0)[: codes.shape[0]].repeat_interleave(128, 1)
    return codes.double() * scale[:, : codes.shape[1]]


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


def run(module: nn.Module, x: Tensor, grad: Tensor, *others: Tensor) -> list[Tensor]:
    """Output and all gradients, the input's first."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    out = module(x, *others)
    out.backward(grad)
    return [out.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def intercept(monkeypatch, name: str, wrapped) -> None:
    """Puts `wrapped(operator, ...)` in the place of an operator, wherever FP8 training calls it."""
    for module in (fp8_operands, fp8_products):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, functools.partial(wrapped, getattr(module, name)))


def linear(inputs: int, outputs: int, policy: FP8Policy = ALL, bias: bool = False, dtype=torch.float32) -> Linear:
    layer = Linear(inputs, outputs, bias=bias, dtype=dtype)
    fp8_training(layer, policy)
    return layer


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


# ------------------------------------------------------------------ the codes of a weight are never old


@pytest.fixture
def quantizations(monkeypatch) -> list[Tensor]:
    """The weights that were quantized, one entry each time."""
    made = []
    operator = fp8_layers.quantize_blocks
    monkeypatch.setattr(fp8_layers, "quantize_blocks", lambda w, **kw: made.append(w) or operator(w, **kw))
    return made


def fresh(layer: Linear, x: Tensor) -> Tensor:
    """The output of a layer that has no codes yet."""
    return copy.deepcopy(layer)(x)


def test_micro_batches_share_the_codes_and_a_step_renews_them(quantizations):
    layer, x = linear(20, 10), torch.randn(4, 20)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for step in range(3):
        for _ in range(3):
            out = layer(x)
            assert torch.equal(out, fresh(layer, x))
            out.square().sum().backward()
        assert len([w for w in quantizations if w is layer.weight]) == step + 1
        optimizer.step()
        optimizer.zero_grad(set_to_none=step % 2 == 0)


def replace(weight: nn.Parameter, other: Tensor) -> None:
    weight.data = other


CHANGES = {
    "load_state_dict": lambda layer, other: layer.load_state_dict({"weight": other}),
    "in place": lambda layer, other: layer.weight.detach().copy_(other),
    "another storage": lambda layer, other: replace(layer.weight, other),
    "another parameter": lambda layer, other: setattr(layer, "weight", nn.Parameter(other)),
    "to": lambda layer, other: layer.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_codes_follow_the_weight_however_it_changes_within_a_step(change):
    layer, x = linear(20, 10), torch.randn(4, 20)
    layer(x).sum().backward()  # codes are kept from here on
    before = layer(x)
    change(layer, torch.randn(10, 20))
    assert not torch.equal(layer(x), before) and torch.equal(layer(x), fresh(layer, x))


@pytest.mark.parametrize("frozen", [False, True])
def test_codes_follow_writes_that_autograd_does_not_see_between_steps(frozen):
    """`.data` in place bumps no version: old optimizers, averaged weights swapped in, adapters merged."""
    layer, x = linear(20, 10).requires_grad_(not frozen), torch.randn(4, 20, requires_grad=True)
    for _ in range(2):
        layer(x).sum().backward()
        layer.zero_grad()
        layer.weight.data.mul_(-1.5)
        assert torch.equal(layer(x), fresh(layer, x))
        with torch.no_grad():
            layer.weight.data.add_(0.25)
            assert torch.equal(layer(x), fresh(layer, x))


def test_a_new_weight_at_an_old_address_is_not_taken_for_the_old_one():
    layer, x = linear(20, 10), torch.randn(4, 20)
    memory = torch.randn(10, 20).numpy()
    layer.weight = nn.Parameter(torch.from_numpy(memory))
    layer(x).sum().backward()
    address, gradient = layer.weight.data_ptr(), layer.weight.grad
    memory *= -1  # torch does not see it, and the new tensor's version is the old one's
    layer.weight = nn.Parameter(torch.from_numpy(memory))
    layer.weight.grad = gradient
    assert layer.weight.data_ptr() == address
    assert torch.equal(layer(x), fresh(layer, x))


def test_evaluation_neither_uses_nor_keeps_codes(quantizations):
    """Between micro-batches, say, with an average of the weights put in through `.data`: no version tells."""
    layer, x = linear(20, 10), torch.randn(4, 20)
    with torch.no_grad():
        layer(x)
    assert layer.fp8_codes["weight"]._quantized is None
    layer(x).sum().backward()
    quantizations.clear()
    own = layer.weight.data.clone()
    layer.weight.data.copy_(torch.randn(10, 20))
    with torch.no_grad():
        averaged = layer(x)
    assert quantizations
    layer.weight.data.copy_(own)
    quantizations.clear()
    assert error(layer(x), averaged) > 0.1 and not quantizations


# ------------------------------------------------------------------ a whole model


def step(lm: nn.Module, ids: Tensor) -> list[Tensor]:
    """Loss and all gradients."""
    lm.zero_grad()
    out = lm(ids, labels=ids)
    (out.loss + 0.3 * out.mtp_loss).backward()
    return [out.loss.detach(), *(p.grad.clone() for p in lm.parameters())]


def test_everything_but_the_products_stays_and_comes_back():
    lm, ids = model(SMALL), tokens(SMALL, 2, 9)
    hooked = []
    lm.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *_: hooked.append(1))
    lm.lm_head.bias_free = True  # an attribute of somebody else's
    modules = {name: (module, type(module), set(vars(module))) for name, module in lm.named_modules()}
    parameters, state = dict(lm.named_parameters()), {k: v.clone() for k, v in lm.state_dict().items()}
    before = step(lm, ids)

    first = fp8_training(lm)
    once = step(lm, ids)
    assert not torch.equal(once[0], before[0])
    assert fp8_training(lm) == first and same(step(lm, ids), once)  # idempotent
    assert all(lm.get_parameter(name) is p for name, p in parameters.items())
    assert list(lm.state_dict()) == list(state) and all(torch.equal(lm.state_dict()[k], v) for k, v in state.items())
    assert all(lm.get_submodule(name) is module for name, (module, *_) in modules.items())
    assert isinstance(lm.model.layers[0].self_attn.o_proj, nn.Linear)

    remove_fp8_training(lm)
    assert {name: (m, type(m), set(vars(m))) for name, m in lm.named_modules()} == modules
    assert same(step(lm, ids), before) and len(hooked) == 4
    remove_fp8_training(lm)  # nothing to do
    assert same(step(lm, ids), before)


def test_another_policy_replaces_the_first():
    lm, twin, ids = model(SMALL), model(SMALL), tokens(SMALL, 1, 7)
    only = FP8Policy((FP8Rule("o_proj", FP8),))
    fp8_training(lm)
    assert fp8_training(lm, only) == fp8_training(twin, only)
    assert same(step(lm, ids), step(twin, ids))


def test_training_updates_the_same_parameters_and_lowers_the_loss():
    """An optimizer made before the change goes on; the model learns one sequence by heart, as in high precision."""
    torch.manual_seed(0)
    lm, ids = DeepseekLM(SMALL, dtype=torch.float32).train(), tokens(SMALL, 1, 16)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2)
    fp8_training(lm)
    start = {name: p.detach().clone() for name, p in lm.named_parameters()}
    losses = []
    for _ in range(20):
        out = lm(ids, labels=ids)
        (out.loss + 0.3 * out.mtp_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.dtype == torch.float32 and not torch.equal(p, start[name]) for name, p in lm.named_parameters())


def test_micro_batches_add_up():
    """Two accumulated backward passes give the sum of the two alone: one addition in float32."""
    lm, ids = model(SMALL), tokens(SMALL, 2, 9)
    fp8_training(lm)
    alone = [step(lm, row[None])[1:] for row in ids]
    lm.zero_grad()
    for row in ids:
        out = lm(row[None], labels=row[None])
        (out.loss + 0.3 * out.mtp_loss).backward()
    expected = [a + b for a, b in zip(*alone, strict=True)]
    assert same(expected, [p.grad for p in lm.parameters()])


def test_gradient_checkpointing_of_a_model_gives_the_same_bits():
    lm, ids = model(SMALL).train(), tokens(SMALL, 2, 9)
    fp8_training(lm)
    plain = step(lm, ids)
    lm.gradient_checkpointing_enable()
    assert same(step(lm, ids), plain)


def test_copies_are_independent_and_files_hold_the_plain_weights(tmp_path):
    lm, ids = model(SMALL), tokens(SMALL, 1, 7)
    fp8_training(lm)
    expected = step(lm, ids)
    twin = copy.deepcopy(lm)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.01)
    assert same(step(lm, ids), expected) and not same(step(twin, ids), expected)
    file = io.BytesIO()
    torch.save(lm, file)
    file.seek(0)
    assert same(step(torch.load(file, weights_only=False), ids), expected)
    plain = DeepseekLM(SMALL, dtype=torch.float32).eval()
    plain.load_state_dict(lm.state_dict())
    remove_fp8_training(lm)
    assert same(step(plain, ids), step(lm, ids))


def test_absorbed_attention_multiplies_by_the_quantized_weight():
    """Decoding in between: `kv_b_proj` means the same in both forms."""
    lm = model(SMALL)
    fp8_training(lm)
    attention = lm.model.layers[0].self_attn
    expected = wide(quantize_blocks(attention.kv_b_proj.weight), rows=128)
    # A unit vector in FP8 is 448 times a float32 quotient by 448.
    assert (attention.kv_b_map(torch.zeros(1))[0].double() - expected).abs().max() <= 2 * EPS32 * expected.abs().max()


@pytest.mark.slow
def test_the_transformers_trainer_needs_nothing_special(tmp_path, capsys):
    """Accumulation, checkpointing and a saved checkpoint that holds the plain weights."""
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    import deepseek_arch.hf as dhf

    lm = dhf.DeepseekForCausalLM(SMALL)
    assert len(fp8_training(lm).fp8) == 3 * 5 + 3 + 2 * (2 + 3)  # attention, the dense layer, experts and shared ones
    rows = [{"input_ids": row, "labels": row} for row in tokens(SMALL, 4, 10)]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(lm, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    lm.save_pretrained(tmp_path / "saved")
    plain = dhf.DeepseekForCausalLM.from_pretrained(tmp_path / "saved")
    state = lm.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())


def test_the_benchmark_compares_runs_that_differ_in_nothing_but_precision():
    """Under a policy without FP8 the first run is the second, bit for bit."""
    from benchmarks.training.fp8_training import BF16, OTHER, Settings, run

    settings = Settings(steps=3, last=2, batch=2, sequence=8, held_out=2, warmup=1)
    text = torch.randint(256, (200,), dtype=torch.uint8)
    high, low = (run(settings, SMALL.replace(vocab_size=256), p, text) for p in (FP8Policy(()), V3_RECIPE))
    for report, differs in ((high, False), (low, True)):
        rows = {row.name: row.results for row in report.rows}
        curves = rows["training loss, every step"]
        assert [len(curve.values) for curve in curves.values()] == [3, 3, 3]
        assert (curves["ours"] != curves[BF16]) == differs and curves[OTHER] != curves[BF16]
        assert curves["ours"].values[0] == pytest.approx(math.log(256), rel=0.1)
        for name in ("training loss, difference to bf16", "held-out loss, difference to bf16"):
            assert (rows[name]["ours"].median > 0) == differs
    assert (high.settings["fp8_weights"], low.settings["fp8_weights"]) == (0, 28)
    with pytest.raises(ValueError, match="expected more than 44 bytes of text, got 30"):
        run(settings, SMALL.replace(vocab_size=256), text=text[:30])
    with pytest.raises(ValueError, match="last <= steps"):
        Settings(steps=3, last=4)
