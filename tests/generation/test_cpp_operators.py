"""Whole models on the C++ operators and on the references: switching the backend changes speed and nothing else."""

from __future__ import annotations

import pytest
import torch

from deepseek_arch import DeepseekLM, generate, keep_fp8
from deepseek_arch.cache.static_cache import StaticLatentCache
from deepseek_kernels import use_backend
from support.small_models import config, error

EPS = torch.finfo(torch.float32).eps
# Some twenty chained products and sums a layer of up to 64 terms, in another order; two layers and a prediction layer.
TOLERANCE = 2048 * EPS


@pytest.fixture(autouse=True)
def _library(cpu_library):
    """Every test here runs the C++."""


@pytest.fixture
def ran(monkeypatch) -> set[str]:
    """Names of the C++ operators that were called."""
    library, names = torch.ops.deepseek_kernels_cpu, set()
    for name in ("dense", "fp8_weight", "experts", "rms_norm", "topk_gate", "latent_write", "mla_decode"):
        operator = getattr(library, name)
        monkeypatch.setattr(library, name, lambda *a, n=name, o=operator: names.add(n) or o(*a))
    return names


def _model(kind: str = "v3", **changes) -> DeepseekLM:
    changes = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1 if kind == "v3" else 0} | changes
    return DeepseekLM(config(kind, **changes)).eval()


def _both(call) -> list:
    results = []
    for backend in ("reference", "cpu"):
        with use_backend(backend):
            results.append(call())
    return results


@pytest.mark.parametrize("format", [None, "fp8"])
@pytest.mark.parametrize("kind", ["v2", "v2-lite", "v3"])
@torch.no_grad()
def test_decoding(kind, format, ran):
    """A prefill of rows of different length, steps of one and of three tokens, and a cache of fixed shape."""
    model = _model(kind)
    ids = torch.randint(0, model.config.vocab_size, (2, 8))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    steps = [torch.randint(0, model.config.vocab_size, (2, tokens)) for tokens in (1, 3)]

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
    assert ran == {"dense", "experts", "rms_norm", "topk_gate", "latent_write", "mla_decode"}


@pytest.mark.parametrize("fp8", [False, True], ids=["bfloat16", "FP8 weights"])
@torch.no_grad()
def test_narrow_weights(fp8, ran):
    model = _model().to(torch.bfloat16)
    if fp8:
        model = keep_fp8(model)
    ids = torch.randint(0, model.config.vocab_size, (1, 5))
    expected, found = _both(lambda: model(ids).logits)
    # bfloat16 between some twenty operators, as for the kernels of a GPU.
    assert error(found.float(), expected.float()) < 2**-5
    assert ran >= {"fp8_weight" if fp8 else "dense", "experts", "rms_norm", "topk_gate"}


@torch.no_grad()
def test_generated_tokens():
    model = _model()
    ids = torch.randint(0, model.config.vocab_size, (2, 5))
    plain, found = _both(lambda: generate(model, ids, max_new_tokens=6))
    assert torch.equal(plain, found)
    with use_backend("cpu"):
        assert torch.equal(generate(model, ids, max_new_tokens=6, mtp_depth=2), plain)


def test_training_runs_attention_alone(ran):
    """With gradients nothing else runs in C++; sums of float32 in another order are all that differs."""
    model = _model().train()
    ids = torch.randint(0, model.config.vocab_size, (2, 4))

    def step():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected, found = _both(step)
    for got, right in zip(found, expected, strict=True):
        assert (got - right).abs().max() <= 1e-5 * right.abs().max()
    assert not ran  # attention of many queries is not among the names


@pytest.mark.parametrize("fp8", [False, True], ids=["float32", "FP8 weights"])
@torch.no_grad()
def test_compiled_steps(fp8):
    torch.compiler.reset()
    model = keep_fp8(_model()) if fp8 else _model()
    ids = torch.randint(0, model.config.vocab_size, (1, 3))
    with use_backend("cpu"):
        cache = StaticLatentCache(model.new_cache(1), 16)
        other = StaticLatentCache(model.new_cache(1), 16)
        step = torch.compile(model, fullgraph=True, backend="aot_eager")
        for part in (ids[:, :2], ids[:, 2:]):
            assert torch.equal(step(part, cache=other).logits, model(part, cache=cache).logits)
