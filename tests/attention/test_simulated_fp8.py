"""Latents that are rounded as FP8 has them, in sparse attention that simulates DeepSeek's serving."""

from __future__ import annotations

import pytest
import torch

from deepseek_arch.attention.sparse_attention import _through_fp8
from support.small_models import config, model, tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rounding_counts_as_the_identity_for_gradients(dtype):
    x = torch.randn(3, 5, 256, dtype=dtype, requires_grad=True)
    weights = torch.randn(3, 5, 256, dtype=dtype)
    rounded = _through_fp8(x)
    assert rounded.dtype == dtype and not torch.equal(rounded, x)
    assert ((rounded - x).abs() <= x.abs() / 16 + 0.02).all()  # three bits behind the point, and small numbers
    (rounded * weights).sum().backward()
    assert torch.equal(x.grad, weights)
    with torch.no_grad():
        torch.testing.assert_close(
            _through_fp8(x), rounded.detach(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0
        )


def test_training_reaches_what_makes_the_latents():
    """Without it neither `kv_a_proj_with_mqa`'s rows of the latent nor its norm would learn."""
    cfg = config("v32", simulate_fp8=True)
    lm, ids = model(cfg).train(), tokens(cfg, 2, 9)
    lm(ids, labels=ids).loss.backward()
    for layer in lm.model.layers:
        attention = layer.self_attn
        assert attention.kv_a_layernorm.weight.grad.abs().min() > 0
        assert attention.kv_a_proj_with_mqa.weight.grad[: cfg.kv_lora_rank].abs().amax(-1).min() > 0
