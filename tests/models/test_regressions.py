"""Defects that reviews found, each by the input that showed it."""

from __future__ import annotations

import pytest
import torch

import deepseek_arch as da
from support.small_models import YARN, config, model, tokens


@torch.no_grad()
def test_loss_does_not_depend_on_the_padding_token_at_the_end():
    """The last real token must not be asked for the padding behind it."""
    lm, ids = model(config("v3")), tokens(config("v3"), 1, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    alone = lm(ids[:, :5], labels=ids[:, :5]).loss
    for padding in (0, 7):
        padded = ids.masked_fill(mask == 0, padding)
        torch.testing.assert_close(lm(padded, attention_mask=mask, labels=padded).loss, alone)


@torch.no_grad()
def test_no_document_predicts_the_next_ones_first_token():
    lm, ids = model(config("v3")), tokens(config("v3"), 1, 9)
    packed = lm(ids, labels=ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])).loss
    parts = [lm(part, labels=part).loss for part in (ids[:, :4], ids[:, 4:])]
    torch.testing.assert_close(packed, (3 * parts[0] + 4 * parts[1]) / 7)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
        {"rope_scaling": {**YARN, "rope_theta": 50000}},
        {"rope_theta": 50000, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    ],
    ids=["null beside rope_parameters", "inside rope_scaling", "twice the same"],
)
def test_rope_theta_is_found_wherever_it_is_written(fields):
    written = config("v3").to_dict()
    del written["rope_theta"]
    assert da.DeepseekConfig.from_dict(written | fields).rope_theta == 50000.0


def test_two_thetas_that_differ_are_an_error():
    written = config("v3").to_dict() | {"rope_theta": 10000, "rope_parameters": {"rope_theta": 5e4}}
    with pytest.raises(da.ConfigError, match="one rope_theta"):
        da.DeepseekConfig.from_dict(written)


def test_null_beside_an_alias_does_not_hide_it():
    written = config("v3").to_dict()
    count = written.pop("n_routed_experts")
    read = da.DeepseekConfig.from_dict(written | {"n_routed_experts": None, "num_local_experts": count})
    assert read.n_routed_experts == count


@pytest.mark.parametrize("made", [da.DeepseekConfig(), da.DeepseekConfig(dtype=None)], ids=["defaults", "no dtype"])
def test_any_config_round_trips(made):
    assert da.DeepseekConfig.from_dict(made.to_dict()) == made


def test_heads_are_one_field_to_change():
    assert config("v3").replace(num_attention_heads=8).num_key_value_heads == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"dtype": "nonsense"}, "dtype"), ({"rope_scaling": {**YARN, "beta_fast": 0}}, "beta_fast")],
)
def test_fields_that_fail_later_fail_at_once(changes, words):
    with pytest.raises(da.ConfigError, match=words):
        config("v3", **changes)


def test_glm_names_its_dense_layers_as_transformers_reads_them():
    written = config("glm", first_k_dense_replace=2, num_hidden_layers=3).to_dict()
    assert written["mlp_layer_types"] == ["dense", "dense", "sparse"]


def test_finished_rows_may_be_filled_with_any_number():
    lm, ids = model(config("v3")), tokens(config("v3"), 2, 5)
    plain = da.generate(lm, ids, max_new_tokens=6, eos_token_id=[])
    first = int(plain[0, 5])
    ended = da.generate(lm, ids, max_new_tokens=6, eos_token_id=[first], pad_token_id=-1)
    assert ended[0, 6:].eq(-1).all()
    if first not in plain[1, 5:]:
        assert torch.equal(ended[1], plain[1])


def test_generating_leaves_the_mode_of_every_module_as_it_was():
    lm, ids = model(config("v3")), tokens(config("v3"), 1, 4)
    lm.train()
    lm.model.layers[0].eval()
    before = [module.training for module in lm.modules()]
    da.generate(lm, ids, max_new_tokens=2)
    assert [module.training for module in lm.modules()] == before


def test_generating_goes_through_the_models_own_call():
    """Hooks on the model (sharding, compilation, offload) see every step."""
    lm, ids, calls = model(config("v3")), tokens(config("v3"), 1, 4), []
    lm.register_forward_hook(lambda *_: calls.append(1))
    da.generate(lm, ids, max_new_tokens=3, eos_token_id=[])
    assert len(calls) == 3


@torch.no_grad()
def test_a_tiny_temperature_is_greedy():
    lm, ids = model(config("v3")), tokens(config("v3"), 1, 4)
    cold = da.generate(lm, ids, max_new_tokens=4, temperature=1e-40, seed=1, eos_token_id=[])
    assert torch.equal(cold, da.generate(lm, ids, max_new_tokens=4, eos_token_id=[]))


@torch.no_grad()
def test_a_long_cache_under_autocast():
    """The part of the attention that calls the kernel itself casts like the rest."""
    lm, ids = model(config("v3")), tokens(config("v3"), 1, 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        cache = lm.new_cache(1)
        with cache.append(2100):
            for layer in range(cache.num_layers):
                cache.update_states(torch.randn(1, 2100, config("v3").latent_dim), layer)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert lm(ids, cache=cache).logits.isfinite().all()
    finally:
        torch.set_num_threads(threads)


def test_a_cache_reordered_under_inference_mode_stays_usable():
    lm, ids = model(config("v3")), tokens(config("v3"), 2, 3)
    with torch.inference_mode():
        cache = lm.new_cache(2)
        lm(ids, cache=cache)
        cache.reorder(torch.tensor([1, 0]))
    with torch.no_grad():
        assert lm(ids, cache=cache).logits.isfinite().all()


@pytest.mark.parametrize(
    ("cache", "words"),
    [
        (lambda c: da.LatentCache(9, 1, c.kv_lora_rank, c.qk_rope_head_dim), "this model's cache"),
        (lambda c: da.LatentCache(c.num_hidden_layers, 1, c.kv_lora_rank + 1, c.qk_rope_head_dim), "this model's"),
        (
            lambda c: da.LatentCache(c.num_hidden_layers, 1, c.kv_lora_rank, c.qk_rope_head_dim, dtype=torch.bfloat16),
            "cache of dtype torch.float32",
        ),
    ],
    ids=["layers", "width", "dtype"],
)
def test_another_models_cache_is_refused(cache, words):
    cfg = config("v3")
    with pytest.raises(ValueError, match=words):
        model(cfg)(tokens(cfg, 1, 2), cache=cache(cfg))


def test_a_model_without_memory_computes_shapes():
    cfg = config("v3")
    out = da.DeepseekLM(cfg, device="meta")(torch.zeros(2, 5, dtype=torch.int64, device="meta"))
    assert out.logits.shape == (2, 5, cfg.vocab_size) and out.logits.is_meta


def test_parameters_that_the_layout_has_no_name_for_are_not_dropped_silently(tmp_path):
    lm = model(config("v3"))
    lm.model.layers[0].self_attn.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"self_attn\.extra\.weight"):
        da.save(lm, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@torch.no_grad()
def test_logits_of_another_position_in_each_row():
    lm, ids = model(config("v3")), tokens(config("v3"), 2, 6)
    whole, at = lm(ids).logits, torch.tensor([[1, 4], [5, 0]])
    kept = lm(ids, logits_to_keep=at).logits
    torch.testing.assert_close(kept, torch.stack([whole[row, at[row]] for row in range(2)]))


def test_prediction_layers_are_recomputed_like_the_others():
    cfg = config("v3", num_nextn_predict_layers=1)
    lm, ids, runs = model(cfg), tokens(cfg, 1, 6), []
    lm.train()
    lm.gradient_checkpointing_enable()
    lm.mtp[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    lm(ids, labels=ids).mtp_loss.backward()
    assert len(runs) == 2
