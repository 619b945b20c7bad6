"""RMSNorm: TRAPS B1 and B2."""

import torch

from deepseek_arch.layers.norm import RMSNorm
from support.oracle import _norm as oracle_norm
from support.small_models import config, error, model

EPS32 = torch.finfo(torch.float32).eps


def _norm_and_input(dtype=torch.float32, eps=1e-6):
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(48, eps=eps, dtype=dtype)
    norm.weight.data.copy_(1 + torch.randn(48, generator=generator))
    return norm, torch.randn(3, 5, 48, generator=generator).to(dtype)


def test_equals_the_equation():
    norm, x = _norm_and_input()
    # One mean over 48 squares, one square root, two products: a handful of roundings.
    assert error(norm(x), oracle_norm(x.double(), norm.weight.double(), 1e-6)) < 8 * EPS32


def test_epsilon_is_added_inside_the_root():
    norm, x = _norm_and_input(eps=0.5)
    tiny = x * 1e-3
    assert error(norm(tiny), oracle_norm(tiny.double(), norm.weight.double(), 0.5)) < 8 * EPS32


def test_float64_stays_float64():
    norm, x = _norm_and_input(torch.float64)
    assert error(norm(x), oracle_norm(x, norm.weight, 1e-6)) < 1e-14


def test_statistics_are_float32_in_half_precision():
    """TRAPS B2: squares of 300 overflow float16, and bfloat16 sums lose whole elements."""
    norm, x = _norm_and_input(torch.float16)
    large = x * 300
    expected = oracle_norm(large.double(), norm.weight.double(), 1e-6)
    # Rounded to float16 before and after the weight: two half units in the last place.
    assert error(norm(large), expected) < 1.01 * torch.finfo(torch.float16).eps


def test_rounds_before_the_weight_as_published_code_does():
    """TRAPS B2: one rounding at the end gives other bits than the published order."""
    norm, x = _norm_and_input(torch.bfloat16)
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    late = (normed * norm.weight.float()).to(torch.bfloat16)
    assert torch.equal(norm(x), norm.weight * normed.to(torch.bfloat16))
    assert not torch.equal(norm(x), late)


def test_zero_input_gives_zero_and_a_finite_gradient():
    norm = RMSNorm(8)
    x = torch.zeros(2, 8, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 8)) and torch.isfinite(x.grad).all()


def test_latent_norms_keep_1e_6_whatever_the_config_says():
    """TRAPS B1: `rms_norm_eps` reaches the layer norms but not `q_a_layernorm` and `kv_a_layernorm`."""
    lm = model(config("v3", rms_norm_eps=1e-2))
    layer = lm.model.layers[1]
    assert layer.input_layernorm.eps == layer.post_attention_layernorm.eps == lm.model.norm.eps == 1e-2
    assert layer.self_attn.q_a_layernorm.eps == layer.self_attn.kv_a_layernorm.eps == 1e-6
    other = model(config("v3", latent_norm_eps=1e-3)).model.layers[0].self_attn
    assert other.q_a_layernorm.eps == other.kv_a_layernorm.eps == 1e-3
