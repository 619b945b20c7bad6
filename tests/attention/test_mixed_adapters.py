"""Batches whose rows have different adapters, in decoding with either form of attention."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from support.small_models import config, error, model, tokens

peft = pytest.importorskip("peft")


def adapted(lm):
    """Two adapters on the projections of attention, kv_b_proj among them, with telling weights."""
    settings = peft.LoraConfig(r=2, target_modules=["q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"])
    wrapped = peft.PeftModel(copy.deepcopy(lm), settings, "first")
    wrapped.add_adapter("second", settings)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return wrapped.eval()


@torch.no_grad()
def test_each_row_is_decoded_with_its_own_adapter():
    wrapped = adapted(model(config("v3")))
    lm, ids = wrapped.base_model.model, tokens(config("v3"), 3, 9)
    names = ["second", "__base__", "first"]
    cache, parts = lm.new_cache(3), []
    for start, end in ((0, 7), (7, 8), (8, 9)):  # a prompt, then steps that absorb kv_b_proj without adapters
        parts.append(wrapped(ids[:, start:end], cache=cache, adapter_names=names).logits)
    together = torch.cat(parts, 1)
    for row, name in enumerate(names):
        with wrapped.disable_adapter() if name == "__base__" else torch.no_grad():
            if name != "__base__":
                wrapped.set_adapter(name)
            alone = wrapped(ids[row : row + 1]).logits[0]
        assert error(together[row], alone) < 1e-4, name
    assert error(together[0], together[2]) > 0.01  # other prompts, and other adapters
