"""`torch.compile(fullgraph=True)` traces attention and the MoE block without a break, and computes the same."""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from deepseek_arch.attention.mla import MultiHeadLatentAttention
from deepseek_arch.layers.rope import RotaryEmbedding
from deepseek_arch.moe.balance_loss import BalanceLoss
from deepseek_arch.moe.load_balancer import routers
from deepseek_arch.moe.moe import MoE
from support import small_models
from support.small_models import YARN, config, error, tokens

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


class Graphs:
    """Compiler backend that runs graphs as they are, and counts the regions that are recomputed."""

    def __init__(self) -> None:
        self.recomputed = 0

    def __call__(self, graph, inputs):
        self.recomputed += sum("tag_activation_checkpoint" in str(node.target) for node in graph.graph.nodes)
        return aot_eager(graph, inputs)


@pytest.mark.parametrize("kind", ["v3", "v2-lite", "v32", "glm-5"])
def test_training_with_recomputed_layers(kind):
    """Losses, loads, recorded decisions and gradients are the same, compiled or not, recomputed or not."""
    cfg = config(kind, num_nextn_predict_layers=1, **({"aux_loss_alpha": 0.1} if kind == "v2-lite" else {}))
    ids, mask, results = tokens(cfg, 2, 11), torch.ones(2, 11, dtype=torch.long), []
    mask[0, :3] = 0
    for compiled, recompute in ((False, False), (False, True), (True, False), (True, True)):
        lm, graphs = small_models.model(cfg).train(), Graphs()
        lm.balance_loss = BalanceLoss(sequence=0.5)
        lm.gradient_checkpointing_enable(recompute)
        run = torch.compile(lm, fullgraph=True, backend=graphs) if compiled else lm
        out = run(ids, mask, labels=ids, record_routing=True)
        (out.loss + 0.3 * out.mtp_loss).backward()
        assert graphs.recomputed == (cfg.num_hidden_layers + 1 if compiled and recompute else 0)
        loads = {name: router.load for name, router in routers(lm).items()}
        grads = {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}
        results.append((out.loss, out.mtp_loss, out.aux_loss, out.routing.ids, loads, grads))
    for *losses, chosen, loads, grads in results[1:]:
        assert all(error(got, expected) < TOLERANCE for got, expected in zip(losses, results[0], strict=False))
        for got, expected in ((chosen, results[0][3]), (loads, results[0][4])):
            assert got and got.keys() == expected.keys() and all(torch.equal(got[k], expected[k]) for k in got)
        assert grads.keys() == results[0][5].keys()
        assert all(error(grads[name], grad) < 4 * TOLERANCE for name, grad in results[0][5].items())
