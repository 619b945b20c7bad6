"""Experts and the block around them: TRAPS C9, C11, C12, C14, C15 and C16."""

import pytest
import torch

from deepseek_arch.moe.moe import Experts, MoE
from deepseek_kernels import sort_by_expert, unpermute
from support.oracle import _mlp as oracle_mlp
from support.oracle import is_moe
from support.oracle import moe as oracle_moe
from support.published import random_weights, stack, unstack
from support.small_models import KINDS, config, error

EPS32 = torch.finfo(torch.float32).eps
# Three products of at most 44 terms, a gate and a sum over the chosen experts: well below 100 roundings of values whose
# partial sums exceed the result a few times.
TOLERANCE = 256 * EPS32


def _block(cfg, seed=0, bias_mean=0.0):
    """A MoE block and its float64 weights under published names (prefix `mlp.`)."""
    cfg = cfg.replace(num_hidden_layers=2)
    weights = random_weights(cfg, seed, bias_mean)
    prefix = "model.layers.1.mlp."
    state = {k.removeprefix(prefix): v for k, v in stack(weights, cfg).items() if k.startswith(prefix)}
    block = MoE.from_config(cfg, dtype=torch.float32)
    block.load_state_dict(state)
    exact = {k.removeprefix("model.layers.1."): v.double() for k, v in weights.items() if k.startswith(prefix)}
    return block, exact


def _inputs(cfg, *shape, seed=1):
    return torch.randn(*shape, cfg.hidden_size, generator=torch.Generator().manual_seed(seed))


def _published_gradients(block, cfg):
    grads = {f"mlp.{name}": p.grad for name, p in block.named_parameters()}
    return unstack(grads, cfg)


@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_equations(kind, tokens):
    """One token touches three experts, seventy touch them all: both kinds of path."""
    cfg = config(kind)
    block, weights = _block(cfg)
    x = _inputs(cfg, tokens)
    expected, _ = oracle_moe(cfg, weights, "mlp.", x.double())
    assert error(block(x), expected) < TOLERANCE
    assert error(block(x[None]), expected[None]) < TOLERANCE


def test_shared_experts_are_one_wide_ungated_unscaled_mlp():
    """TRAPS C11: the routed scaling factor (2.446 for Moonlight) does not reach them."""
    cfg = config("moonlight")
    block, weights = _block(cfg)
    x = _inputs(cfg, 5)
    assert block.shared_experts.gate_proj.weight.shape == (2 * cfg.moe_intermediate_size, cfg.hidden_size)
    shared = oracle_mlp(weights, "mlp.shared_experts.", x.double())
    whole, _ = oracle_moe(cfg, weights, "mlp.", x.double())
    assert error(block(x), whole) < TOLERANCE
    assert error(whole - shared + cfg.routed_scaling_factor * shared, whole) > 0.1  # the wrong answer


def test_no_shared_experts():
    cfg = config("v3", n_shared_experts=None)
    block, weights = _block(cfg)
    x = _inputs(cfg, 5)
    assert block.shared_experts is None
    assert error(block(x), oracle_moe(cfg, weights, "mlp.", x.double())[0]) < TOLERANCE


@pytest.mark.parametrize(
    ("dense", "every", "layers"), [(1, 1, [1, 2, 3, 4]), (3, 1, [3, 4]), (0, 2, [0, 2, 4]), (1, 2, [2, 4])]
)
def test_which_layers_have_experts(dense, every, layers):
    """TRAPS C12."""
    cfg = config("v3", num_hidden_layers=4, first_k_dense_replace=dense, moe_layer_freq=every)
    assert [layer for layer in range(5) if cfg.is_moe_layer(layer)] == layers
    assert [layer for layer in range(5) if is_moe(cfg, layer)] == layers


@pytest.mark.parametrize("kind", ["v3", "v2", "v2-lite"])
def test_gradients_equal_the_equations(kind):
    """Every parameter and the input; experts that no token chose get zeros, not None and not garbage (TRAPS C15)."""
    cfg = config(kind, n_routed_experts=16)
    block, weights = _block(cfg)
    x = _inputs(cfg, 4).requires_grad_()
    direction = torch.randn(4, cfg.hidden_size, generator=torch.Generator().manual_seed(2))
    (block(x) * direction).sum().backward()

    leaves = {name: w.requires_grad_() for name, w in weights.items()}
    exact_x = x.detach().double().requires_grad_()
    out, chosen = oracle_moe(cfg, leaves, "mlp.", exact_x)
    (out * direction).sum().backward()

    assert error(x.grad, exact_x.grad) < 4 * TOLERANCE
    unused = set(range(16)) - {e for row in chosen for e in row}
    assert len(unused) >= 2, "the test needs experts that nobody chose"
    for name, grad in _published_gradients(block, cfg).items():
        if any(f"experts.{e}." in name for e in unused):
            assert grad is not None and torch.count_nonzero(grad) == 0, name
        else:
            assert error(grad, leaves[name].grad) < 4 * TOLERANCE, name


def test_all_tokens_to_one_expert():
    cfg = config("v3", num_experts_per_tok=1, n_group=1, topk_group=1)
    block, weights = _block(cfg)
    bias = torch.zeros(8)
    bias[5] = 10.0
    block.gate.e_score_correction_bias.copy_(bias)
    weights["mlp.gate.e_score_correction_bias"] = bias.double()
    x = _inputs(cfg, 40).requires_grad_()
    expected, chosen = oracle_moe(cfg, weights, "mlp.", x.detach().double())
    assert {e for row in chosen for e in row} == {5}
    y = block(x)
    assert error(y, expected) < TOLERANCE
    y.sum().backward()
    used = [bool(grad.any()) for grad in block.experts.down_proj.grad]
    assert used == [e == 5 for e in range(8)]


def test_no_tokens():
    cfg = config("v3")
    block, _ = _block(cfg)
    x = _inputs(cfg, 0).requires_grad_()
    y = block(x)
    assert y.shape == (0, cfg.hidden_size)
    y.sum().backward()
    assert torch.count_nonzero(block.experts.gate_up_proj.grad) == 0


def test_inputs_need_not_be_contiguous():
    cfg = config("v3")
    block, _ = _block(cfg)
    x = _inputs(cfg, 6, 5)
    assert torch.equal(block(x.transpose(0, 1)), block(x.transpose(0, 1).contiguous()))


def test_gate_rows_come_before_up_rows():
    """TRAPS C16: [E, 2 I, H] with gate first; the other order is a different function."""
    cfg = config("v3")
    block, _ = _block(cfg)
    experts = block.experts
    x = _inputs(cfg, 3)
    ids, ones = torch.tensor([[2], [2], [0]]), torch.ones(3, 1)
    gate_up, down, width = experts.gate_up_proj.detach(), experts.down_proj.detach(), cfg.moe_intermediate_size

    def expert(first, second):
        rows = []
        for token, e in zip(x, ids[:, 0], strict=True):
            both = gate_up[e] @ token
            rows.append(down[e] @ (torch.nn.functional.silu(both[first]) * both[second]))
        return torch.stack(rows)

    low, high = slice(None, width), slice(width, None)
    assert error(experts(x, ids, ones), expert(low, high)) < TOLERANCE
    assert error(expert(high, low), expert(low, high)) > 0.1


def test_choices_served_elsewhere_add_nothing():
    """The id `num_experts` marks an expert of another rank."""
    cfg = config("v3")
    experts = _block(cfg)[0].experts
    x = _inputs(cfg, 4)
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(4)])
    weights = torch.rand(4, 3, generator=generator)
    away = torch.tensor([[True, False, False], [True, True, True], [False, False, True], [False, False, False]])
    got = experts(x, ids.masked_fill(away, 8), weights)
    assert error(got, experts(x, ids, weights.masked_fill(away, 0.0))) < TOLERANCE
    assert torch.count_nonzero(got[1]) == 0


def test_every_choice_counts_once_and_order_does_not_matter():
    cfg = config("v3")
    experts = _block(cfg)[0].experts
    x = _inputs(cfg, 2)
    ids, weights = torch.tensor([[4, 1, 7], [0, 4, 2]]), torch.tensor([[0.5, 1.5, 0.25], [2.0, 1.0, 3.0]])
    shuffled = experts(x, ids[:, [2, 0, 1]], weights[:, [2, 0, 1]])
    assert error(shuffled, experts(x, ids, weights)) < TOLERANCE
    alone = sum(experts(x, ids[:, k : k + 1], weights[:, k : k + 1]) for k in range(3))
    assert error(alone, experts(x, ids, weights)) < TOLERANCE


def test_same_bits_every_time():
    """TRAPS C14: no atomics, forward and backward."""
    cfg = config("v3")
    block, _ = _block(cfg)
    x = _inputs(cfg, 50)

    def once():
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        y = block(leaf)
        y.square().sum().backward()
        return [y, leaf.grad, *(p.grad.clone() for p in block.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


@pytest.mark.parametrize("tokens", [2, 40], ids=["few", "many"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_leaks_no_float32_and_is_no_worse_than_rounding(dtype, tokens):
    """TRAPS C9: the routing weights are float32, the output is not; sums over experts are float32."""
    cfg = config("v3", n_shared_experts=None)
    block = _block(cfg)[0].to(dtype)
    exact = {f"mlp.{k}": v.double() for k, v in block.state_dict().items()}
    x = _inputs(cfg, tokens).to(dtype)
    y = block(x)
    assert y.dtype == dtype
    expected, _ = oracle_moe(cfg, unstack(exact, cfg), "mlp.", x.double())
    # Four roundings to `dtype` (gate, up, their product, the expert's output), half a unit each, and the sum's; some
    # grow through the next product by at most the spread of 20 random signs.
    assert error(y, expected) < 4 * torch.finfo(dtype).eps


def test_routing_weights_are_not_rounded_to_the_activations():
    """TRAPS C9: 0.5015 and 0.4985 are shares of one; rounded to bfloat16 they would be shares of 0.998."""
    order, inverse, _ = sort_by_expert(torch.tensor([[1, 0]]), 2)
    shares = torch.tensor([[0.50146484375, 0.49853515625]])
    ones = torch.ones(2, 4, dtype=torch.bfloat16)
    assert torch.equal(unpermute(ones, shares, order, inverse), torch.ones(1, 4, dtype=torch.bfloat16))
    assert float(shares.to(torch.bfloat16).float().sum()) < 1


def test_experts_run_without_gradients_for_frozen_weights():
    cfg = config("v3")
    block, _ = _block(cfg)
    block.requires_grad_(False)
    x = _inputs(cfg, 6).requires_grad_()
    block(x).sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.any()
    assert all(p.grad is None for p in block.parameters())


def test_experts_alone_with_explicit_sizes():
    experts = Experts(4, 6, 5)
    y = experts(torch.randn(3, 6), torch.tensor([[0, 3], [1, 2], [3, 3]]), torch.rand(3, 2))
    assert y.shape == (3, 6) and experts.gate_up_proj.shape == (4, 10, 6) and experts.down_proj.shape == (4, 6, 5)
