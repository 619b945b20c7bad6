"""Activations other than SiLU: every MLP of the model, in each form of its weights, against the float64 oracle."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import deepseek_arch as da
from deepseek_arch.config.validation import HIDDEN_ACTS
from deepseek_arch.moe.moe import Experts
from deepseek_arch.quant.fp8_convert import dequantize, keep_fp8
from deepseek_arch.quant.fp8_experts import FP8Experts
from deepseek_arch.quant.fp8_training.policy import FP8Policy, FP8Precision, FP8Rule
from deepseek_kernels import dequantize_blocks, quantize_rows
from deepseek_kernels.common.activations import ACTIVATIONS
from deepseek_kernels.moe.fused_moe import fused_moe
from support import oracle, published, small_models
from support.small_models import error, tokens

TOLERANCE = 1e-5
DEFINED = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "relu2": lambda x: torch.where(x > 0, x * x, torch.zeros_like(x)),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),  # does not vanish at 0
    "swish": lambda x: x / (1 + torch.exp(-x)),
}


@pytest.fixture(params=DEFINED)
def activation(request, monkeypatch) -> str:
    """A name, by which the oracle computes as well."""
    function = DEFINED[request.param]

    def mlp(weights, prefix: str, x: Tensor) -> Tensor:
        gate, up = (oracle._linear(weights, f"{prefix}{name}_proj", x) for name in ("gate", "up"))
        return oracle._linear(weights, f"{prefix}down_proj", function(gate) * up)

    monkeypatch.setattr(oracle, "_mlp", mlp)
    return request.param


def made(activation: str, **changes) -> tuple[da.DeepseekConfig, da.DeepseekLM]:
    config = small_models.config("v3", num_nextn_predict_layers=1, hidden_act=activation, **changes)
    return config, small_models.model(config)


def test_the_names_of_a_config_are_those_of_the_operators():
    assert set(HIDDEN_ACTS) == set(ACTIVATIONS)


def test_every_mlp_computes_it(activation):
    """Dense layer, experts (few tokens and many), shared experts, and those of the MTP module."""
    config, model = made(activation)
    weights = published.published_state(model)
    for length in (3, 40):
        ids = tokens(config, 1, length)
        expected = oracle.run(config, weights, ids[0].tolist())
        with torch.no_grad():
            out = model(ids, labels=ids)
        assert error(out.logits[0], expected.logits) < TOLERANCE
        guesses = expected.mtp[0][: length - 2]  # the last one's token is unknown
        loss = torch.nn.functional.cross_entropy(guesses, ids[0, 2:])
        assert float(out.mtp_loss) == pytest.approx(float(loss), rel=1e-5)
    other = small_models.model(config.replace(hidden_act="silu"), weights=weights)
    with torch.no_grad():
        assert (error(other(ids).logits[0], expected.logits) > 1e-3) == (activation != "swish")


def test_gradients_and_generated_tokens(activation):
    config, model = made(activation)
    ids = tokens(config, 1, 12)
    weights = {
        name: tensor.double().requires_grad_(tensor.is_floating_point())
        for name, tensor in published.published_state(model).items()
    }
    oracle.next_token_loss(oracle.run(config, weights, ids[0].tolist()).logits[None], ids).backward()
    model.train()(ids, labels=ids).loss.backward()
    layer = model.model.layers[1].mlp
    name = "model.layers.1.mlp."
    assert error(layer.shared_experts.up_proj.weight.grad, weights[f"{name}shared_experts.up_proj.weight"].grad) < 1e-4
    for expert in range(config.n_routed_experts):
        grad = weights[f"{name}experts.{expert}.gate_proj.weight"].grad
        got = layer.experts.gate_up_proj.grad[expert, : config.moe_intermediate_size]
        assert grad is None or error(got, grad) < 1e-4
    text = da.generate(model.eval(), ids, max_new_tokens=4)
    rows = ids[0].tolist()
    for token in text[0, ids.shape[1] :].tolist():
        assert token == int(oracle.run(config, weights, rows).logits[-1].argmax())
        rows.append(token)
    assert torch.equal(da.generate(model, ids, max_new_tokens=4, mtp_depth=1), text)


def test_a_model_kept_in_fp8_and_dequantized_again(activation, tmp_path):
    config, model = made(activation)
    keep_fp8(model)
    experts = model.model.layers[1].mlp.experts
    assert type(experts) is FP8Experts and experts.activation == activation
    da.save(model, tmp_path)
    ids = tokens(config, 1, 9)
    exact = dequantize(copy.deepcopy(model))
    assert type(exact.model.layers[1].mlp.experts) is Experts
    expected = oracle.run(config, published.published_state(exact), ids[0].tolist()).logits
    for kept in (model, exact, da.load(tmp_path), da.load(tmp_path, fp8="dequantize", dtype="float32")):
        with torch.no_grad():
            assert error(kept(ids).logits[0], expected) < TOLERANCE
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dtype == torch.float32 and parameter.ndim == 1)
    model(ids, labels=ids).loss.backward()  # adapters need the gradients of activations
    assert model.model.layers[0].input_layernorm.weight.grad.abs().sum() > 0


def test_experts_that_multiply_fp8_by_fp8(activation):
    """Rows are quantized before both products, the gated ones unrounded."""
    torch.manual_seed(0)
    experts = FP8Experts.quantize(Experts(4, 256, 128, activation))
    experts.activations = "fp8"
    x, ids = torch.randn(12, 256), torch.randint(4, (12, 2))
    ids[:, 1] = (ids[:, 0] + 1) % 4
    weights = torch.rand(12, 2)
    gate_up, down = (each.double() for each in experts.dequantize())

    def rounded(rows: Tensor) -> Tensor:
        return dequantize_blocks(*quantize_rows(rows.float()), (1, 128), torch.float32).double()

    expected = torch.zeros(12, 256, dtype=torch.float64)
    for token in range(12):
        for choice in range(2):
            expert = int(ids[token, choice])
            gate, up = (rounded(x[token : token + 1]) @ gate_up[expert].T).chunk(2, -1)
            row = rounded(DEFINED[activation](gate) * up) @ down[expert].T
            expected[token] += weights[token, choice].double() * row[0]
    with torch.no_grad():
        assert error(experts(x, ids, weights), expected) < 5e-3
    x.requires_grad_(True)
    out = experts(x, ids, weights)
    assert error(out.detach(), expected) < 5e-3
    out.sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_fp8_training(activation):
    """Rules without a recomputed SwiGLU train it; V3's recipe, which has one, is refused before anything changes."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": Experts(4, 256, 128, activation)})
    x, weights = torch.randn(12, 256), torch.rand(12, 2)
    ids = torch.stack((torch.arange(12) % 4, (torch.arange(12) + 1) % 4), -1)
    exact = copy.deepcopy(model["experts"])
    expected = exact(x, ids, weights)
    expected.square().sum().backward()
    if activation != "swish":
        with pytest.raises(ValueError, match=rf"expected experts with silu for swiglu_cache='fp8'.* got {activation}"):
            da.fp8_training(model)
        assert torch.equal(model["experts"](x, ids, weights), expected)
    da.fp8_training(model, FP8Policy(tuple(FP8Rule(f"{name}_proj", FP8Precision()) for name in ("gate_up", "down"))))
    out = model["experts"](x, ids, weights)
    out.square().sum().backward()
    assert 1e-4 < error(out.detach(), expected.detach()) < 0.1
    for name, parameter in exact.named_parameters():
        assert 1e-4 < error(model["experts"].get_parameter(name).grad, parameter.grad) < 0.15


def test_the_operator_names_the_activations_that_it_knows():
    ids, weights = torch.randint(4, (5, 2)), torch.rand(5, 2)
    with pytest.raises(ValueError, match=r"expected an activation out of silu.*got 'prelu'"):
        fused_moe(torch.randn(5, 32), torch.randn(4, 40, 32), torch.randn(4, 32, 20), ids, weights, "prelu")
