"""Our classes against transformers' own on the same float32 weights: relative error of logits <= 1e-4."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache
from twins import native, ours

import deepseek_arch.hf as dhf
from support import small_models
from support.small_models import error, tokens

TOLERANCE = 1e-4


@pytest.fixture(params=small_models.KINDS)
def pair(request):
    config = small_models.config(request.param, rope_scaling=small_models.YARN)
    model = ours(config)
    return model, native(model)


def left_padded(pad: list[int], length: int) -> torch.Tensor:
    return (torch.arange(length) >= torch.tensor(pad)[:, None]).long()


@st.composite
def configs(draw):
    groups = draw(st.sampled_from([1, 2, 4]))
    kept = draw(st.integers(1, groups))
    experts = groups * draw(st.integers(2, 4))
    kind = draw(st.sampled_from(["v3", "v2", "v2-lite", "glm"]))
    grouped = {"n_group": groups, "topk_group": kept} if kind in ("v3", "v2") else {}
    most = kept * experts // groups if grouped else experts
    return small_models.config(
        kind,
        **grouped,
        n_routed_experts=experts,
        # Of a single expert the published code does not normalize the weight, transformers does.
        num_experts_per_tok=draw(st.integers(1, min(most, 4))),
        n_shared_experts=draw(st.integers(1, 2)),
        q_lora_rank=draw(st.sampled_from([None, 12])),
        num_attention_heads=draw(st.sampled_from([1, 2, 4])),  # transformers' V2 wants a divisor of hidden_size
        qk_rope_head_dim=draw(st.sampled_from([2, 8])),
        v_head_dim=draw(st.sampled_from([6, 24])),
        num_hidden_layers=2,
        # GLM's native class has its first layer dense, whatever the field.
        first_k_dense_replace=1 if kind == "glm" else draw(st.integers(0, 2)),
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        rope_scaling=draw(st.sampled_from([None, small_models.YARN])),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
    )


@settings(max_examples=25, phases=(Phase.generate,))
@given(configs(), st.sampled_from([-1.0, 0.0, 5.0]), st.integers(0, 99))
def test_logits_and_cached_steps_equal_for_random_configs(config, bias_mean, seed):
    """Negative biases too: a group mask of 0 instead of -inf shows only there (TRAPS C4)."""
    model = dhf.DeepseekForCausalLM(config)
    model.load_state_dict(small_models.model(config, seed, bias_mean).state_dict())
    model.eval()
    twin = native(model)
    ids, mask = tokens(config, 2, 9, seed=seed), left_padded([0, 3], 9)
    with torch.no_grad():
        expected = twin(ids, attention_mask=mask).logits
        whole = model(ids, attention_mask=mask).logits
        cache, steps = DynamicCache(config=model.config), []
        for start, stop in ((0, 4), (4, 5), (5, 9)):
            steps.append(model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits)
    real = mask.bool()
    assert error(whole[real], expected[real]) <= TOLERANCE
    assert error(torch.cat(steps, 1)[real], expected[real]) <= TOLERANCE


def test_loss_and_every_gradient(pair):
    model, twin = pair
    ids = tokens(model.config.to_core(), 2, 11)
    labels = ids.clone()
    labels[0, :4] = -100
    for m in pair:
        # Summed over the batch's own number of items, as Trainer asks for under gradient accumulation.
        m.train()
        m(ids, labels=labels, num_items_in_batch=torch.tensor(40)).loss.backward()
    expected = {name: p.grad for name, p in twin.named_parameters()}
    got = {name: p.grad for name, p in model.named_parameters()}
    assert got.keys() == expected.keys()
    assert max(error(got[name], expected[name]) for name in got) <= TOLERANCE
    losses = [m(ids, labels=labels).loss for m in pair]
    assert error(*losses) <= TOLERANCE


def test_gradients_are_finite_and_equal_with_left_padding(pair):
    """Padded queries see no key; an empty softmax row must not become NaN on the way back."""
    ids, mask = tokens(pair[0].config.to_core(), 2, 8), left_padded([5, 0], 8)
    for m in pair:
        m(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    expected = {name: p.grad for name, p in pair[1].named_parameters()}
    for name, p in pair[0].named_parameters():
        assert error(p.grad, expected[name]) <= TOLERANCE


def test_recorded_outputs(pair):
    model = pair[0]
    ids, mask = tokens(model.config.to_core(), 2, 7), left_padded([0, 2], 7)
    with torch.no_grad():
        for m in pair:
            m.set_attn_implementation("eager")
        asked = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
        got, expected = (m(ids, attention_mask=mask, **asked) for m in pair)
        sdpa_logits = [m(ids, attention_mask=mask).logits for m in pair if not m.set_attn_implementation("sdpa")]
    real = mask.bool()
    assert error(got.logits[real], expected.logits[real]) <= TOLERANCE
    assert error(sdpa_logits[0][real], got.logits[real]) <= TOLERANCE
    layers = model.config.num_hidden_layers
    assert len(got.hidden_states) == len(expected.hidden_states) == layers + 1
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert error(a[real], b[real]) <= TOLERANCE
    assert len(got.attentions) == layers
    for a, b in zip(got.attentions, expected.attentions, strict=True):
        assert a.shape == (2, model.config.num_attention_heads, 7, 7)
        assert error(a.transpose(1, 2)[real], b.transpose(1, 2)[real]) <= TOLERANCE
    assert len(got.router_logits) == layers - model.config.to_core().first_k_dense_replace
    assert got.router_logits[0].dtype == torch.float32


def test_attention_weights_need_the_implementation_that_computes_them(pair):
    ids = torch.zeros(1, 3, dtype=torch.long)
    with pytest.warns(UserWarning, match="eager"):
        got = pair[0](ids, output_attentions=True)
    assert got.attentions == pair[1](ids, output_attentions=True).attentions == ()


def test_static_cache_gives_the_same_logits_for_prompt_and_steps(pair):
    """Its first call has no mask although it returns more slots than there are tokens."""
    model, twin = pair
    ids = tokens(model.config.to_core(), 2, 10)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        expected = twin(ids).logits
        got = [model(part, past_key_values=cache).logits for part in ids.split([6, 1, 3], dim=1)]
    assert error(torch.cat(got, 1), expected) <= TOLERANCE


def test_embeddings_in_place_of_ids_and_few_logits(pair):
    model = pair[0]
    ids = tokens(model.config.to_core(), 2, 6)
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, logits)
        assert error(model(ids, logits_to_keep=2).logits, logits[:, -2:]) <= TOLERANCE
        assert error(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, logits[:, [1, 4]]) <= TOLERANCE
        assert torch.equal(model(ids, return_dict=False)[0], logits)
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))


def test_four_dimensional_masks_pass_through(pair):
    model, twin = pair
    ids = tokens(model.config.to_core(), 1, 6)
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()
    allowed[4, 1:3] = False
    additive = torch.zeros(6, 6).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = twin(ids, attention_mask=allowed[None, None]).logits
        for mask in (allowed, additive):
            assert error(model(ids, attention_mask=mask[None, None]).logits, expected) <= TOLERANCE


def test_sequence_classifier_reads_the_last_real_token():
    config = small_models.config("v3", pad_token_id=0)
    model = dhf.DeepseekForSequenceClassification(dhf.as_arch_config(config)).eval()
    ids = tokens(config, 1, 5).clamp(min=1)
    padded = torch.cat((ids, torch.zeros(1, 3, dtype=torch.long)), 1)
    with torch.no_grad():
        assert error(model(padded, attention_mask=(padded != 0).long()).logits, model(ids).logits) <= TOLERANCE
    model.train()
    model(ids, labels=torch.tensor([1])).loss.backward()
    assert model.model.layers[1].mlp.experts.down_proj.grad.abs().sum() > 0
