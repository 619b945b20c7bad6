"""Layers whose weights stay in FP8: what they compute, what no cast may do to them, and whole models of them.

Expectations come from the definition (code times the scale of its block, in float64) or from ordinary layers with the
dequantized weights.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import deepseek_arch as da
from deepseek_arch.attention.mla import MultiHeadLatentAttention
from deepseek_arch.layers.linear import Linear, fp8_weight
from deepseek_arch.layers.rope import RotaryEmbedding
from deepseek_arch.layout.parameter_map import layout, scale_name
from deepseek_arch.moe.moe import Experts
from deepseek_arch.quant.fp8_blocks import quantize_blocks
from deepseek_arch.quant.fp8_convert import fp8_layers
from deepseek_arch.quant.fp8_experts import FP8Experts
from deepseek_arch.quant.fp8_linear import FP8Linear
from deepseek_kernels import BackendError, dispatch, fp8_gemm, quantize_rows, use_backend
from support import small_models
from support.small_models import config, error, model

E4M3 = torch.float8_e4m3fn


def linear(rows: int = 192, columns: int = 256, bias: bool = False, block=(128, 128), **options) -> FP8Linear:
    made = Linear(columns, rows, bias)
    # Blocks of very different sizes: a scale taken from a neighbour shows.
    made.weight.data *= torch.exp(torch.randn(-(-rows // 16), 1)).repeat_interleave(16, 0)[:rows]
    return FP8Linear.quantize(made, block, **options)


def experts(count: int = 5, hidden: int = 256, width: int = 192, block=(128, 128), **options) -> FP8Experts:
    return FP8Experts.quantize(Experts(count, hidden, width), block, **options)


def exact(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """The matrix in float64, each element by its own block's scale (TRAPS E1, E2)."""
    rows, columns = torch.arange(codes.shape[0]) // block[0], torch.arange(codes.shape[1]) // block[1]
    return codes.double() * scale.double()[rows][:, columns]


def ordinary(layer: FP8Experts) -> Experts:
    made = Experts(layer.num_experts, layer.hidden_dim, layer.intermediate_dim)
    made.gate_up_proj.data, made.down_proj.data = layer.dequantize(torch.float32)
    return made


def choices(tokens: int, count: int, chosen: int = 3) -> tuple[Tensor, Tensor]:
    """Expert ids, the sentinel of an expert elsewhere among them, and weights."""
    return torch.randint(count + 1, (tokens, chosen)), torch.rand(tokens, chosen)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


# ---------------------------------------------------------------- what is computed


SHAPES = [
    ((576, 7168), (128, 128), [(1,)]),  # kv_a_proj_with_mqa of V3: five rows of scales, the last over 64
    ((192, 256), (128, 128), [(), (1,), (2, 20), (0,)]),  # two rows of scales: transformers takes blocks of 96
    ((20, 33), (16, 12), [(1,), (2, 20)]),
    ((3, 5), (128, 128), [(1,), (2, 20)]),
]
CASES = [(shape, block, tokens) for shape, block, several in SHAPES for tokens in several]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "block", "tokens"), CASES, ids=str)
def test_the_product_is_that_with_the_dequantized_weight(shape, block, tokens, dtype):
    """W8A16. K terms, each a rounded product of float32, in any order: K + 3 roundings of 2^-24 relative to the sum of
    magnitudes. Then the result's own rounding; and a 16-bit product may round the weights first."""
    layer = linear(*shape, bias=True, block=block)
    assert layer.weight_scale_inv.shape == (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    layer.to(dtype)
    x = torch.randn(*tokens, shape[1]).to(dtype)
    weight = exact(layer.weight, layer.weight_scale_inv, block)
    expected, magnitude = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    own = torch.finfo(dtype).eps / 2
    bound = (shape[1] + 3) * 2.0**-24 * magnitude + (0 if dtype == torch.float32 else own * magnitude)
    bias = layer.bias.double()
    bound = bound + 2 * own * (expected.abs() + (expected + bias).abs() + bound)  # the product's, and the sum's
    got = layer(x)
    assert got.dtype == dtype and got.shape == (*tokens, shape[0])
    assert ((got.double() - expected - bias).abs() <= bound).all()


def test_dequantizing_multiplies_each_block_by_its_own_scale():
    layer = linear(192, 130)
    assert torch.equal(layer.dequantize(torch.float32), exact(*layer.pair("weight"), (128, 128)).float())
    ones = FP8Linear(1, 192)
    ones.weight.data.copy_(torch.ones(192, 1))
    ones.weight_scale_inv.data.copy_(torch.tensor([[2.0], [3.0]]))
    assert ones(torch.ones(1)).tolist() == [2.0] * 128 + [3.0] * 64


@pytest.mark.parametrize(("count", "hidden", "width"), [(5, 256, 192), (3, 33, 20), (2, 2048, 1408)])
def test_experts_are_ordinary_experts_with_the_dequantized_weights(count, hidden, width):
    """1408 is V2-Lite's width, 11 blocks; 192 and 20 leave a partial block between gate and up, each with scales of its
    own. Both sides sum at most 2048 float32 terms twice; sums of random signs are off by the root of their number."""
    layer = experts(count, hidden, width)
    grid = -(-width // 128), -(-hidden // 128)
    assert layer.gate_up_proj_scale_inv.shape == (count, 2 * grid[0], grid[1])
    assert layer.down_proj_scale_inv.shape == (count, grid[1], grid[0])
    gate_up, down = layer.dequantize(torch.float32)
    for part in range(2):  # of the last expert
        rows, scales = slice(part * width, (part + 1) * width), slice(part * grid[0], (part + 1) * grid[0])
        whole = exact(layer.gate_up_proj[-1, rows], layer.gate_up_proj_scale_inv[-1, scales], (128, 128))
        assert torch.equal(gate_up[-1, rows], whole.float())
    assert torch.equal(down[0], exact(layer.down_proj[0], layer.down_proj_scale_inv[0], (128, 128)).float())
    reference = ordinary(layer)
    tolerance = 8 * max(hidden, width) ** 0.5 * 2.0**-24
    for tokens in (1, 40):
        x, (ids, weights) = torch.randn(tokens, hidden), choices(tokens, count)
        assert error(layer(x, ids, weights), reference(x, ids, weights)) < tolerance
    assert layer(x[:0], ids[:0], weights[:0]).shape == (0, hidden)
    elsewhere = torch.full_like(ids, count)
    assert not layer(x, elsewhere, weights).any()


def test_each_of_stacked_gate_and_up_has_its_own_blocks():
    """Quantized as the two matrices that are published, not as one whose blocks reach from gate into up."""
    plain = Experts(2, 40, 192)
    layer = FP8Experts.quantize(plain)
    for expert in range(2):
        for part in range(2):
            rows, scales = slice(192 * part, 192 * (part + 1)), slice(2 * part, 2 * (part + 1))
            codes, scale = quantize_blocks(plain.gate_up_proj[expert, rows].detach())
            assert torch.equal(bits(layer.gate_up_proj[expert, rows]), bits(codes))
            assert torch.equal(layer.gate_up_proj_scale_inv[expert, scales], scale)


# ---------------------------------------------------------------- quantized activations


@pytest.mark.parametrize("scale_format", [None, "ue8m0"])
@pytest.mark.parametrize("shape", [(192, 256), (130, 1000)], ids=str)
def test_quantized_activations_are_off_by_the_rounding_of_their_format(shape, scale_format):
    """e4m3 keeps four bits: each activation is off by 2^-4 of itself at most, or, next to zero, by 2^-10 of its scale,
    which is at most amax / 224 (TRAPS E5). Independent errors, uniform up to that, add up to a relative root mean
    square of 2^-4 / sqrt(3) at most; a quarter of it shows that they were there."""
    layer = linear(*shape, scale_format=scale_format)
    layer.activations = "fp8"
    x = torch.randn(60, shape[1])
    weight = exact(*layer.pair("weight"), (128, 128))
    expected, got = x.double() @ weight.T, layer(x).double()
    groups = nn.functional.pad(x, (0, -x.shape[1] % 128)).unflatten(1, (-1, 128)).abs().amax(-1)
    per_element = groups.repeat_interleave(128, 1)[:, : x.shape[1]].double()
    bound = (x.double().abs() * 2.0**-4 + per_element / 224 * 2.0**-10) @ weight.abs().T
    assert ((got - expected).abs() <= bound * (1 + 2.0**-10)).all()
    relative = ((got - expected).square().mean() / expected.square().mean()).sqrt()
    most = 2.0**-4 / 3**0.5
    assert most / 4 < relative < most
    # The activations' scales have the checkpoint's format.
    assert torch.equal(layer(x), fp8_gemm(*quantize_rows(x, scale_format), *layer.pair("weight"), torch.float32))


@pytest.mark.parametrize("scale_format", [None, "ue8m0"])
def test_experts_with_quantized_activations(scale_format):
    """Two such products with SwiGLU between them, whose derivatives are of order one: their errors add up."""
    layer = experts(scale_format=scale_format)
    x, (ids, weights) = torch.randn(50, 256), choices(50, 5)
    expected = ordinary(layer)(x, ids, weights)
    layer.activations = "fp8"
    got = layer(x, ids, weights)
    relative = ((got - expected).square().mean() / expected.square().mean()).sqrt()
    most = 2.0**-4 / 3**0.5
    assert most / 4 < relative < 3 * most
    # The path that remembers what gradients need computes the same numbers.
    assert torch.equal(layer(x.clone().requires_grad_(), ids, weights), got)


def test_gradients_see_the_dequantized_weight():
    """With quantized activations too: the rounding counts as the identity, and the weights get no gradient."""
    layer = linear(bias=True)
    reference = nn.Linear(256, 192)
    reference.weight.data, reference.bias.data = layer.dequantize(torch.float32), layer.bias.data
    x, grad = torch.randn(2, 9, 256, requires_grad=True), torch.randn(2, 9, 192)
    (expected,) = torch.autograd.grad(reference(x), x, grad)
    found = {}
    for layer.activations in ("high", "fp8"):
        found[layer.activations], bias = torch.autograd.grad(layer(x), (x, layer.bias), grad)
        assert error(bias, grad.sum((0, 1))) < 2.0**-20
    assert torch.equal(found["high"], found["fp8"])
    assert error(found["high"], expected) < 8 * 192**0.5 * 2.0**-24


def test_gradients_of_experts():
    layer = experts()
    reference = ordinary(layer)
    x, (ids, weights) = torch.randn(30, 256, requires_grad=True), choices(30, 5)
    weights.requires_grad_()
    grad = torch.randn(30, 256)
    expected = torch.autograd.grad(reference(x, ids, weights), (x, weights), grad)
    got = torch.autograd.grad(layer(x, ids, weights), (x, weights), grad)
    assert max(error(a, b) for a, b in zip(got, expected, strict=True)) < 8 * 256**0.5 * 2.0**-24
    layer.activations = "fp8"
    rounded = torch.autograd.grad(layer(x, ids, weights), (x, weights), grad)
    # SwiGLU's derivative is taken where its rounded arguments are: off by as much as these.
    for a, b in zip(rounded, expected, strict=True):
        assert 0 < ((a - b).square().mean() / b.square().mean()).sqrt() < 3 * 2.0**-4 / 3**0.5


def test_the_device_decides_about_activations_unless_told(monkeypatch):
    layer, blocks = linear(), linear(20, 33, block=(16, 12))
    x = torch.randn(4, 256)
    high = layer(x)
    layer.activations = "high"
    assert torch.equal(layer(x), high)  # a CPU does not multiply FP8
    layer.activations = "fp8"
    assert not torch.equal(layer(x), high)
    layer.activations = "auto"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # which the operators' tests may have set in this process
    dispatch.forget()
    with use_backend("triton"), pytest.raises(BackendError):  # asked for by name, it is not replaced in silence
        layer(x)
    dispatch.forget()
    monkeypatch.setattr("deepseek_arch.quant.fp8_base.dispatch.pick", lambda *_: "triton")
    assert layer._quantizes("fp8_gemm", x.device) and not blocks._quantizes("fp8_gemm", x.device)
    layer.activations = "high"
    assert not layer._quantizes("fp8_gemm", x.device)
    with pytest.raises(ValueError, match=r"one of auto, fp8, high, got 'w8a8'"):
        layer.activations = "w8a8"
    with pytest.raises(ValueError, match=r"blocks of 128 x 128 for activations='fp8', got \[16, 12\]"):
        blocks.activations = "fp8"
    with pytest.raises(ValueError, match="scale_format None or 'ue8m0', got 'e8'"):
        FP8Linear(4, 4, scale_format="e8")


def test_autocast_takes_activations_down_as_for_any_linear_layer():
    layer, several = linear(), experts()
    x, (ids, weights) = torch.randn(4, 256), choices(4, 5)
    for how in ("auto", "fp8"):
        layer.activations = several.activations = how
        narrow = layer(x.bfloat16()), several(x.bfloat16(), ids, weights)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), narrow[0]) and torch.equal(several(x, ids, weights), narrow[1])
    assert layer(x).dtype == torch.float32


# ---------------------------------------------------------------- what must not happen to codes and scales

CASTS = {
    "to": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "half": (lambda m: m.half(), torch.float16),
    "double": (lambda m: m.double(), torch.float64),
    "type": (lambda m: m.type(torch.bfloat16), torch.bfloat16),
    "to device and dtype": (lambda m: m.to("cpu", torch.float16), torch.float16),
    "an unconditional cast": (lambda m: m._apply(lambda t: t.to(torch.float16)), torch.float16),
    "inside a model": (lambda m: nn.Sequential(m).to(torch.bfloat16)[0], torch.bfloat16),
    "and back": (lambda m: m.half().float(), torch.float32),
    "deepcopy": (copy.deepcopy, torch.float32),
    "pickle": (lambda m: pickle.loads(pickle.dumps(m)), torch.float32),
    "share_memory": (lambda m: m.share_memory(), torch.float32),
}


@pytest.mark.parametrize("make", [lambda: linear(bias=True), experts], ids=["linear", "experts"])
@pytest.mark.parametrize("cast", CASTS)
def test_casts_and_copies_leave_codes_and_scales_alone(make, cast):
    layer, (change, dtype) = make(), CASTS[cast]
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items() if name != "bias"}
    changed = change(layer)
    after = changed.state_dict()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(bits(after[name]), bits(tensor)), name
    assert not any(p.requires_grad for name, p in changed.named_parameters() if name != "bias")
    assert changed.compute_dtype == dtype  # what adapters are made in
    assert isinstance(changed, FP8Experts) or changed.bias.dtype == dtype
    assert (changed.activations, changed.block_size) == ("auto", (128, 128))


def test_other_devices_take_codes_as_codes():
    layer = linear(bias=True).to("meta")
    assert [(p.dtype, p.device.type) for p in layer.parameters()] == [
        (E4M3, "meta"),
        (torch.float32, "meta"),
        (torch.float32, "meta"),
    ]
    layer.to_empty(device="cpu")
    assert layer.weight.dtype == E4M3 and layer.weight.device.type == "cpu"


def test_torch_save_and_initialization_keep_them(tmp_path):
    layer = linear()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = FP8Linear(256, 192)
    assert not fresh(torch.randn(2, 256)).any()  # zeros until loaded, not whatever memory held
    fresh.load_state_dict(torch.load(buffer))
    fresh.reset_parameters()
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(fresh.parameters(), layer.parameters(), strict=True))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("make", [linear, experts], ids=["linear", "experts"])
def test_state_dicts_go_in_as_they_came_out(make, assign):
    layer, other = make(), make()
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(layer.parameters(), other.parameters(), strict=True))
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("assign", [False, True])
def test_values_do_not_pass_for_codes_nor_scales_of_another_kind_for_scales(assign):
    """TRAPS E11: a copy would cast."""
    layer = linear()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for name, dtype in (("weight", torch.bfloat16), ("weight_scale_inv", torch.uint8)):
        wrong = before | {name: torch.ones(before[name].shape, dtype=dtype)}
        with pytest.raises(RuntimeError, match=rf"{name}: expected {before[name].dtype}, got {dtype}"):
            layer.load_state_dict(wrong, strict=False, assign=assign)
    assert all(torch.equal(bits(t), bits(before[name])) for name, t in layer.state_dict().items())
    with pytest.raises(RuntimeError, match="weight_scale_inv"):
        layer.load_state_dict({"weight": before["weight"]}, assign=assign)


def test_parametrizations_act_on_values_not_on_codes():
    """PEFT adds adapters of expert parameters this way; added to codes they would be multiplied by scales."""

    class Plus(nn.Module):
        def __init__(self, delta):
            super().__init__()
            self.delta = nn.Parameter(delta)

        def forward(self, weight):
            return (weight.float() + self.delta).to(weight.dtype)

    layer, several = linear(), experts()
    x, (ids, weights) = torch.randn(6, 256), choices(6, 5)
    reference = ordinary(several)
    delta, deltas = torch.randn(192, 256), torch.randn(5, 384, 256)
    reference.gate_up_proj.data += deltas
    plus = nn.functional.linear(x, layer.dequantize(torch.float32) + delta)
    before = layer(x), several(x, ids, weights)
    nn.utils.parametrize.register_parametrization(layer, "weight", Plus(delta))
    nn.utils.parametrize.register_parametrization(several, "gate_up_proj", Plus(deltas))
    for how in ("auto", "fp8"):  # the sum is no FP8 weight
        layer.activations = several.activations = how
        assert error(layer(x), plus) < 2.0**-18
        assert error(several(x, ids, weights), reference(x, ids, weights)) < 2.0**-18
    several(x, ids, weights).sum().backward()
    assert several.parametrizations.gate_up_proj[0].delta.grad.any()
    layer.activations = several.activations = "auto"
    nn.utils.parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    nn.utils.parametrize.remove_parametrizations(several, "gate_up_proj", leave_parametrized=False)
    assert torch.equal(layer(x), before[0]) and torch.equal(several(x, ids, weights), before[1])


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_absorbed_attention_with_an_fp8_kv_b_proj(dtype, monkeypatch):
    """TRAPS B4: dequantized, then split by heads, whose rows the blocks do not respect."""
    cfg = small_models.config("v3")
    attention = MultiHeadLatentAttention.from_config(cfg, dtype=torch.float32)
    attention.kv_b_proj = FP8Linear.quantize(attention.kv_b_proj, (16, 12))
    attention.to(dtype).eval()
    rope = RotaryEmbedding.from_config(cfg)(torch.arange(9)[None])
    x, outputs = torch.randn(1, 9, cfg.hidden_size).to(dtype), {}
    monkeypatch.setattr(FP8Linear, "forward", lambda *_: pytest.fail("a product of unit vectors"))
    assert attention.kv_b_map(x)[0].dtype == dtype
    assert torch.equal(attention.kv_b_map(x)[0], attention.kv_b_proj.dequantize(dtype))
    monkeypatch.undo()
    for form in ("expanded", "absorbed"):
        monkeypatch.setattr(attention, "prefers_absorbed", lambda *_, form=form: form == "absorbed")
        outputs[form] = attention(x, rope)
    # As for ordinary weights: five chained products of few terms, each rounded to the dtype.
    roundings = 256 if dtype == torch.float32 else 4
    assert error(outputs["absorbed"], outputs["expanded"]) < roundings * torch.finfo(dtype).eps
    # A hook may change what the module computes: then it is asked.
    attention.kv_b_proj.register_forward_hook(lambda module, args, out: 2 * out)
    assert error(attention.kv_b_map(x)[0], 2 * attention.kv_b_proj.dequantize(dtype)) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_queries_read_an_fp8_kv_b_proj_as_it_is(cpu_backend, dtype, monkeypatch):
    """A step that dequantized the matrix would take longer for it than for all other products of the layer."""
    cfg = small_models.config("v3")
    attention = MultiHeadLatentAttention.from_config(cfg, dtype=torch.float32)
    attention.kv_b_proj = FP8Linear.quantize(attention.kv_b_proj, (16, 12))
    attention.to(dtype).eval()
    rope = RotaryEmbedding.from_config(cfg)(torch.arange(5)[None])
    x = torch.randn(1, 5, cfg.hidden_size).to(dtype)
    monkeypatch.setattr(attention, "prefers_absorbed", lambda *_: True)
    with torch.no_grad():
        expected = attention(x, rope)  # by the references, which dequantize
        monkeypatch.setattr(FP8Linear, "dequantized", lambda *_: pytest.fail("dequantized"))
        with use_backend("cpu"):
            got = attention(x, rope)
            attention.kv_b_proj.bias = nn.Parameter(torch.ones(attention.kv_b_proj.out_features, dtype=dtype))
            assert fp8_weight(attention.kv_b_proj) is None
            assert fp8_weight(nn.Linear(2, 2)) is None
    roundings = 256 if dtype == torch.float32 else 4
    assert error(got, expected) < roundings * torch.finfo(dtype).eps


# ---------------------------------------------------------------- compiled


@pytest.mark.parametrize("activations", ["auto", "fp8"])
@pytest.mark.parametrize("grad", [False, True])
def test_compiled_without_a_break(activations, grad):
    torch.compiler.reset()
    layer, several = linear(bias=True), experts()
    layer.activations = several.activations = activations
    x, (ids, weights) = torch.randn(4, 256, requires_grad=grad), choices(4, 5)

    def both(x):
        return several(x, ids, weights) + layer(x).sum(-1, keepdim=True)

    expected, got = both(x), torch.compile(both, fullgraph=True, backend="aot_eager")(x)
    assert error(got, expected) < 2.0**-20
    if grad:
        (a,), (b,) = (torch.autograd.grad(out.square().sum(), x) for out in (got, expected))
        assert error(a, b) < 2.0**-20
    torch.compiler.reset()


# ---------------------------------------------------------------- models


def published_fp8(config) -> set[str]:
    return {slot.parameter for slot in layout(config) if slot.fp8}


@pytest.mark.parametrize("kind", ["v3", "v2-lite"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_keeping_fp8_replaces_what_is_published_in_fp8(kind, device):
    """TRAPS E7: never the embedding, head, router, norms and eh_proj; in prediction layers too."""
    cfg = small_models.config(kind, num_nextn_predict_layers=1, attention_bias=True)
    model = da.DeepseekLM(cfg, device=device, dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert da.keep_fp8(model, (16, 12), scale_format="ue8m0") is model
    state = model.state_dict()
    kept = {name for name, tensor in state.items() if tensor.dtype == E4M3}
    assert kept == published_fp8(cfg) and any(name.startswith("mtp.0.mlp.experts") for name in kept)
    assert set(state) == set(before) | {scale_name(name) for name in kept}
    for name in set(before) - kept:
        assert state[name].dtype == before[name].dtype and state[name].device.type == device
        assert device == "meta" or torch.equal(state[name], before[name])
    assert model.config.weight_block_size == model.model.config.weight_block_size == (16, 12)
    assert model.config.quantization_config["scale_fmt"] == "ue8m0"
    if device == "cpu":
        name = "model.layers.1.self_attn.o_proj.weight"
        codes, scale = quantize_blocks(before[name], (16, 12), "ue8m0")
        assert torch.equal(bits(state[name]), bits(codes)) and torch.equal(state[scale_name(name)], scale)
        assert fp8_layers(model)["model.layers.1.self_attn.o_proj"].scale_format == "ue8m0"


def test_a_kept_model_computes_what_its_dequantized_weights_say():
    cfg = small_models.config("v3", num_nextn_predict_layers=1)
    model = da.keep_fp8(small_models.model(cfg), (16, 12))
    ids = small_models.tokens(cfg, 2, 9)
    plain = da.dequantize(copy.deepcopy(model))
    assert not fp8_layers(plain) and plain.config.quantization_config is None
    assert all(p.requires_grad for p in plain.parameters())
    # Float32 sums in another order, through three layers.
    got, expected = (each(ids, labels=ids) for each in (model, plain))
    assert error(got.logits, expected.logits) < 2.0**-16
    assert error(got.mtp_loss, expected.mtp_loss) < 2.0**-16  # which drafts alone would not show (TRAPS F13)
    greedy = {"max_new_tokens": 6, "temperature": 0.0}
    for options in ({}, {"mtp_depth": 1}):
        assert torch.equal(da.generate(model, ids, **greedy, **options), da.generate(plain, ids, **greedy, **options))
    # Again in FP8: the values are codes times scales already, and each block's largest is 448 of them.
    again = da.keep_fp8(plain, (16, 12))
    for (name, got), expected in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(bits(got), bits(expected)) or name.endswith("_scale_inv"), name


def test_a_kept_model_passes_gradients_on():
    """The embedding below eight FP8 products and the head above them are trained; codes and scales are not."""
    cfg = small_models.config("v3")
    model = da.keep_fp8(small_models.model(cfg), (16, 12))
    plain = da.dequantize(copy.deepcopy(model))
    ids = small_models.tokens(cfg, 2, 9)
    for each in (model, plain):
        each(ids, labels=ids).loss.backward()
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight"):
        assert error(model.get_parameter(name).grad, plain.get_parameter(name).grad) < 2.0**-14
    assert all(p.grad is None for p in model.parameters() if p.dtype == E4M3)


def test_only_some_parameters():
    model = da.DeepseekLM(small_models.config("v3"))
    da.keep_fp8(model, (16, 12), ["model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.experts.down_proj"])
    assert set(fp8_layers(model)) == {"model.layers.0.mlp.up_proj", "model.layers.2.mlp.experts"}
    before = fp8_layers(model)
    da.keep_fp8(model, (16, 12))
    assert before.items() <= fp8_layers(model).items()  # those stay what they are


def test_what_cannot_be_kept_is_an_error():
    model = da.DeepseekLM(small_models.config("v3"))
    with pytest.raises(ValueError, match=r"expected model\.layers\.1\.mlp\.gate to be a linear layer or experts"):
        da.keep_fp8(model, parameters=["model.layers.1.mlp.gate.weight"])
    with pytest.raises(ValueError, match="expected a DeepseekLM or the names of parameters, got Sequential"):
        da.keep_fp8(nn.Sequential(Linear(4, 4)))
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="expected finite weights"):
        da.keep_fp8(model)


# ---------------------------------------------------------------- keeping a model that is there


def test_a_model_becomes_fp8_whole_or_not_at_all():
    lm = model(config("v3"))
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    with torch.no_grad():
        lm.model.layers[2].self_attn.o_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"finite weights in model.layers.2.self_attn.o_proj.weight"):
        da.keep_fp8(lm)
    assert lm.config.quantization_config is None and not fp8_layers(lm)
    assert lm.state_dict().keys() == before.keys()
    lm.load_state_dict(before)
    da.keep_fp8(lm)
    with pytest.raises(ValueError, match=r"FP8 blocks of \[64, 64\], got \[128, 128\] already"):
        da.keep_fp8(lm, (64, 64))
    assert lm.config.weight_block_size == (128, 128)


def test_the_scale_format_is_part_of_what_is_kept(tmp_path):
    """Also where the config speaks of FP8 already, as published ones do."""
    published = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    lm = model(config("v3", quantization_config=published))
    da.keep_fp8(lm, scale_format="ue8m0")
    da.save(lm, tmp_path, format="fp8")
    again = da.load(tmp_path)
    assert again.config.quantization_config["scale_fmt"] == "ue8m0"
    assert {layer.scale_format for layer in fp8_layers(again).values()} == {"ue8m0"}
