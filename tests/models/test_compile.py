"""`torch.compile(fullgraph=True)` traces attention and the MoE block without a break, and computes the same."""

import pytest
import torch

from deepseek_arch.attention.mla import MultiHeadLatentAttention
from deepseek_arch.layers.rope import RotaryEmbedding
from deepseek_arch.moe.moe import MoE
from support.small_models import YARN, config, error

# The compiler reorders sums and keeps what eager code rounds; both stay within the modules' own tolerance.
TOLERANCE = 256 * torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _run(module, x, *others):
    """Output and all gradients."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    out = module(x, *others)
    out.square().sum().backward()
    return [out, x.grad, *(p.grad.clone() for p in module.parameters())]


def _agree(first, second):
    return [error(a, b) < 4 * TOLERANCE for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_attention_forward_and_backward(form, monkeypatch):
    """Graph capture with eager kernels: what breaks a graph breaks here, in a fraction of the compile time."""
    cfg = config("v3", rope_scaling=YARN)
    attention = MultiHeadLatentAttention.from_config(cfg, dtype=torch.float32)
    monkeypatch.setattr(attention, "prefers_absorbed", lambda queries, keys: form == "absorbed")
    rope = RotaryEmbedding.from_config(cfg)(torch.arange(9).expand(2, -1))
    x = torch.randn(2, 9, cfg.hidden_size)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert all(_agree(_run(compiled, x, rope), _run(attention, x, rope)))


def test_moe_block_forward_and_backward():
    cfg = config("v3")
    block = MoE.from_config(cfg, dtype=torch.float32)
    x = torch.randn(2, 9, cfg.hidden_size)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert all(_agree(_run(compiled, x), _run(block, x)))


@pytest.mark.slow
@torch.no_grad()
def test_compiled_kernels():
    """The default backend, which also checks what the operators declare about their outputs. Forward only and one
    shape: most of the time goes to the C++ compiler."""
    cfg = config("v3")
    attention = MultiHeadLatentAttention.from_config(cfg, dtype=torch.float32).eval()
    block = MoE.from_config(cfg, dtype=torch.float32).eval()

    def layer(x, cos, sin):
        return block(x + attention(x, (cos, sin)))

    cos, sin = RotaryEmbedding.from_config(cfg)(torch.arange(9).expand(2, -1))
    x = torch.randn(2, 9, cfg.hidden_size)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    assert error(compiled(x, cos, sin), layer(x, cos, sin)) < TOLERANCE
