"""Kinds of adapters of PEFT on latent attention: losses, gradients and tokens of transformers' own class."""

from __future__ import annotations

import copy

import pytest
import torch
from twins import native, ours

from support import small_models
from support.small_models import error, tokens

peft = pytest.importorskip("peft")

CONFIG = small_models.config("v3")
TARGETS = ["q_b_proj", "kv_b_proj", "o_proj"]
TOLERANCE = 1e-4
KINDS = {
    "LoRA": peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False),
    "DoRA": peft.LoraConfig(r=2, target_modules=TARGETS, use_dora=True, init_lora_weights=False),
    "IA3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=["o_proj"], init_ia3_weights=False),
    "LoHa": peft.LoHaConfig(r=2, target_modules=TARGETS, init_weights=False),
    "LoKr": peft.LoKrConfig(r=2, target_modules=TARGETS, init_weights=False),
    "VeRA": peft.VeraConfig(r=2, target_modules=["o_proj"]),
    "HRA": peft.HRAConfig(r=2, target_modules=TARGETS, init_weights=False),
    "BOFT": peft.BOFTConfig(boft_block_size=2, target_modules=TARGETS, init_weights=False),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm", "kv_a_layernorm"]),
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_learn_and_generate_as_on_the_native_model(kind):
    model = ours(CONFIG)
    twin = native(model)
    adapted = []
    for base in (twin, model):
        torch.manual_seed(0)
        adapted.append(peft.get_peft_model(base, copy.deepcopy(KINDS[kind])))
    expected, got = adapted
    learned = {name: p for name, p in expected.named_parameters() if p.requires_grad}
    with torch.no_grad():
        own = dict(got.named_parameters())
        for name, parameter in learned.items():
            parameter += 0.05 * torch.randn(parameter.shape)  # away from adapters that begin as nothing
            own[name].copy_(parameter)
    ids = tokens(CONFIG, 2, 7)
    plain = native(ours(CONFIG))
    losses = []
    for each in (expected, got):
        out = each.train()(input_ids=ids, labels=ids)
        out.loss.backward()
        losses.append(out.loss.detach())
    assert error(losses[1], losses[0]) < TOLERANCE
    assert error(plain(ids, labels=ids).loss.detach(), losses[0]) > TOLERANCE
    assert learned
    for name, parameter in learned.items():
        assert parameter.grad.abs().sum() > 0 and error(own[name].grad, parameter.grad) < 1e-3
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    texts = [each.eval().generate(input_ids=ids, **settings) for each in (expected, got)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("projected", [False, True])
def test_prefix_tuning_is_refused_in_its_first_step(projected):
    """transformers' own class fails there too, between two shapes: heads' keys do not go into a cache of latents."""
    settings = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=projected, encoder_hidden_size=8
    )
    model = peft.get_peft_model(ours(CONFIG), settings)
    ids = tokens(CONFIG, 2, 7)
    with pytest.raises(
        ValueError, match=r"expected a cache of latents, \[B, 1, S, 24\], got keys \[B, 2, S, 8\].*Prompt"
    ):
        model(input_ids=ids, labels=ids)
    with pytest.raises(ValueError, match="expected a cache of latents"):
        model.eval().generate(input_ids=ids, max_new_tokens=2)
    with pytest.raises(RuntimeError):
        peft.get_peft_model(native(ours(CONFIG)), copy.deepcopy(settings))(input_ids=ids, labels=ids)
