"""A whole model on the kernels and on their references: switching the backend changes speed and nothing else."""

from __future__ import annotations

import pytest
import torch

from deepseek_arch import DeepseekLM, generate, keep_fp8
from deepseek_arch.cache.static_cache import StaticLatentCache
from deepseek_arch.quant.fp8_convert import fp8_layers
from deepseek_kernels import dispatch, use_backend
from support.small_models import config, error

EPS = torch.finfo(torch.float32).eps
# Some twenty chained products and sums a layer of up to 64 terms, in another order; two layers and a prediction layer.
TOLERANCE = 2048 * EPS


@pytest.fixture(autouse=True)
def _kernels(triton_backend):
    """Every test here runs kernels."""


@pytest.fixture
def ran(monkeypatch):
    """Names of the operators that picked their kernels."""
    names, real = set(), dispatch.pick

    def pick(op, *arguments, **options):
        chosen = real(op, *arguments, **options)
        names.update({op} if chosen == "triton" else ())
        return chosen

    monkeypatch.setattr(dispatch, "pick", pick)
    return names


def _model(device, kind="v3", **changes):
    changes = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1 if kind == "v3" else 0} | changes
    return DeepseekLM(config(kind, **changes), device=device)


def _both(call):
    results = []
    for backend in ("reference", "triton"):
        with use_backend(backend):
            results.append(call())
    return results


@pytest.mark.parametrize("kind", ["v2", "v3"])
def test_training(kind, device, ran):
    """Packed documents and padding; logits, all losses, and the gradient of every parameter."""
    model = _model(device, kind).train()
    ids = torch.randint(0, model.config.vocab_size, (2, 9), device=device)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7, 8]], device=device)
    mask = torch.tensor([[1] * 9, [1] * 7 + [0] * 2], device=device)

    def step():
        model.zero_grad()
        whole = model(ids, mask, positions, labels=ids)
        lean = model(ids, mask, positions, labels=ids, return_logits=False)
        loss = whole.loss + (0 if whole.mtp_loss is None else whole.mtp_loss)
        (loss + lean.loss).backward()
        losses = [x for x in (whole.loss, whole.aux_loss, whole.mtp_loss, lean.loss) if x is not None]
        return whole.logits, losses, {name: p.grad.clone() for name, p in model.named_parameters()}

    (logits, losses, gradients), found = _both(step)
    assert error(found[0], logits) < TOLERANCE
    for got, expected in zip(found[1], losses, strict=True):
        assert error(got, expected) < TOLERANCE
    for name, gradient in gradients.items():
        assert error(found[2][name], gradient) < 4 * TOLERANCE, name
    assert ran >= {"rms_norm", "rope", "mla_attention", "topk_gate", "moe_permute", "grouped_gemm"}
    assert "linear_cross_entropy" in ran


@pytest.mark.parametrize("format", [None, "fp8"])
@torch.no_grad()
def test_decoding(format, device, ran):
    """A prefill of rows of different length, steps of one and of three tokens, and a cache of fixed shape."""
    model = _model(device).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 8), device=device)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6], device=device)
    steps = [torch.randint(0, model.config.vocab_size, (2, tokens), device=device) for tokens in (1, 3)]

    def decode():
        cache = model.new_cache(2, format=format)
        logits = [model(ids[:, :6], mask, cache=cache, logits_to_keep=1).logits]
        logits += [model(step, cache=cache).logits for step in steps]
        static = StaticLatentCache(cache, 32)
        return [*logits, model(steps[0], cache=static).logits]

    expected, found = _both(decode)
    # A code of FP8 may round the other way where its value differs in the last bit: a step of 1/16 of it.
    tolerance = TOLERANCE if format is None else 2**-6
    for got, right in zip(found, expected, strict=True):
        assert error(got, right) < tolerance
    fp8 = "" if format is None else "_fp8"
    assert ran >= {"rms_norm", "rope", "topk_gate", "fused_moe", "mla_attention"}
    assert {f"latent_write{fp8}", f"mla_decode{fp8}"} <= ran


@torch.no_grad()
def test_generated_tokens(device):
    model = _model(device).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 5), device=device)
    plain, kernels = _both(lambda: generate(model, ids, max_new_tokens=3))
    assert torch.equal(plain, kernels)
    with use_backend("triton"):
        assert torch.equal(generate(model, ids, max_new_tokens=3, mtp_depth=2), plain)


@torch.no_grad()
def test_fp8_weights(device, ran):
    """All products of FP8 with FP8, with norms that quantize."""
    model = keep_fp8(_model(device).eval().to(torch.bfloat16))
    for layer in fp8_layers(model).values():
        layer.activations = "fp8"
    ids = torch.randint(0, model.config.vocab_size, (1, 5), device=device)
    expected, found = _both(lambda: model(ids).logits)
    # bfloat16 between some twenty operators, and codes that round the other way.
    assert error(found.float(), expected.float()) < 2**-5
    assert ran >= {"rms_norm_quantize", "fp8_gemm", "fp8_grouped_gemm", "swiglu_quantize", "fp8_quantize"}
