"""The quantized codes of a weight under FP8 training are never older than the weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from deepseek_arch.layers.linear import Linear
from deepseek_arch.quant.fp8_training import layers as fp8_layers
from support.fp8_layers import linear
from support.small_models import error

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
