"""Arguments of a forward pass: integers of every type mean the same; what is no such argument is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import deepseek_arch as da
from support.small_models import config, model, tokens

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


@pytest.fixture(scope="module")
def lm():
    return model(config("v3", num_nextn_predict_layers=1))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_ids_and_labels_of_any_integer_type(lm, dtype):
    ids = tokens(lm.config, 2, 7)
    expected = lm(ids, labels=ids)
    got = lm(ids.to(dtype), labels=ids.to(dtype))
    for name in ("logits", "loss", "mtp_loss"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64], ids=str)
def test_other_ids_labels_and_positions_are_refused(lm, dtype):
    """A float label was rounded down before, and trained towards another token."""
    ids = tokens(lm.config, 2, 7)
    wrong = (ids + 0.7).to(dtype) if dtype.is_floating_point else ids.to(dtype)
    for given in ({"input_ids": wrong}, {"input_ids": ids, "labels": wrong}, {"input_ids": ids, "position_ids": wrong}):
        with pytest.raises(ValueError, match=f"expected integer {list(given)[-1]}.*{dtype}"):
            lm(**given)


@pytest.mark.parametrize("cached", [False, True])
def test_additive_masks_are_refused(lm, cached):
    """Its zeros would be read as padding, and its -Inf as tokens."""
    ids = tokens(lm.config, 1, 4)
    for hidden in (-torch.inf, -1e9, torch.finfo(torch.bfloat16).min, float("nan")):
        mask = torch.tensor([[hidden, 0.0, 0.0, 0.0]])
        with pytest.raises(ValueError, match="additive"):
            lm(ids, attention_mask=mask, cache=lm.new_cache(1) if cached else None)
    ones = torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    assert torch.equal(lm(ids, attention_mask=ones).logits, lm(ids, attention_mask=ones.long()).logits)


def test_positions_to_keep(lm):
    ids = tokens(lm.config, 2, 5)
    logits = lm(ids).logits
    for kept in (np.int64(2), 2, torch.tensor([3, 4]), torch.tensor([-2, -1]), torch.tensor([[3, 4], [3, 4]]).int()):
        assert torch.allclose(lm(ids, logits_to_keep=kept).logits, logits[:, 3:], atol=1e-6)
    assert torch.equal(lm(ids, logits_to_keep=9).logits, logits)  # all that there are
    for kept in (torch.tensor([5]), torch.tensor([-6]), torch.tensor([[0], [5]]), torch.tensor([[-1], [0]])):
        with pytest.raises(ValueError, match=r"expected logits_to_keep to be positions below 5, got (5|-6|-1)"):
            lm(ids, logits_to_keep=kept)
    for kept in (1.0, "1", True, None, [1], torch.tensor(1), torch.tensor([True]), torch.tensor([[0]]), 10**5000 * -1):
        with pytest.raises(ValueError, match="logits_to_keep"):
            lm(ids, logits_to_keep=kept)


def test_a_refused_call_leaves_the_cache_as_it_was(lm):
    ids, cache = tokens(lm.config, 1, 5), lm.new_cache(1)
    lm(ids, cache=cache)
    for given in ({"attention_mask": [[1]]}, {"position_ids": torch.zeros(1, 5)}, {"logits_to_keep": "all"}):
        with pytest.raises(ValueError, match="expected"):
            lm(ids, cache=cache, **given)
        assert cache.lengths == (5,)
    for wrong in ("cache", [], {}, cache.lengths):
        with pytest.raises(ValueError, match="expected cache to be a LatentCache"):
            lm(ids, cache=wrong)


def test_models_of_what_is_no_config_or_dtype():
    tiny = da.DeepseekConfig.from_pretrained("tiny")
    for wrong in ("tiny", {}, None, tiny.to_dict()):
        with pytest.raises(ValueError, match="expected config to be a DeepseekConfig, got"):
            da.DeepseekLM(wrong)
    for wrong in ("bfloat16", torch.int8, torch.float8_e4m3fn, 16):
        with pytest.raises(ValueError, match="expected dtype to be one of bfloat16, float16, float32, float64"):
            da.DeepseekLM(tiny, dtype=wrong)
    with pytest.raises(ValueError, match="expected an available device, got 'hpu:3'"):
        da.DeepseekLM(tiny, device="hpu:3")


def test_numbers_that_are_not_pythons_own_are_the_same_numbers():
    tiny = da.DeepseekConfig.from_pretrained("tiny")
    assert da.kv_cache_bytes(tiny, np.int64(7)) == da.kv_cache_bytes(tiny, 7)
    assert type(da.BalanceLoss(sequence=np.float32(0.5)).sequence) is float
    assert da.plan_placement(np.array([3.0, 1.0, 1.0, 1.0]), np.int32(2)) == da.plan_placement([3, 1, 1, 1], 2)
    for wrong in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="expected"):
            da.plan_placement([wrong, 1.0], 1)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_masks_positions_and_places_of_any_integer_type(lm, dtype):
    ids, mask = tokens(lm.config, 2, 5), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    positions, kept = torch.tensor([[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]), torch.tensor([1, 4])
    assert torch.equal(lm(ids, mask.to(dtype), labels=ids).loss, lm(ids, mask, labels=ids).loss)
    assert torch.equal(lm(ids, position_ids=positions.to(dtype)).logits, lm(ids, position_ids=positions).logits)
    assert torch.equal(lm(ids, logits_to_keep=kept.to(dtype)).logits, lm(ids, logits_to_keep=kept).logits)
    for caches in (lm.new_cache(2), None):
        got = lm(ids, mask.to(dtype), cache=caches, record_routing=True)
        assert torch.equal(got.routing.valid, mask != 0)


def test_unsigned_numbers_beyond_int64_do_not_wrap(lm):
    """2**64 - 100 would become -100: a label that is ignored."""
    ids = tokens(lm.config, 1, 4)
    huge = torch.full((1, 4), 2**64 - 100, dtype=torch.uint64)
    for given in ({"input_ids": huge}, {"input_ids": ids, "labels": huge}, {"input_ids": ids, "position_ids": huge}):
        with pytest.raises(ValueError, match=rf"{list(given)[-1]} below 2\*\*63, got {2**64 - 100}"):
            lm(**given)


@pytest.mark.parametrize("value", [-1, 61, -(2**62), 2**62])
def test_ids_and_labels_outside_the_vocabulary_are_named(lm, value):
    ids = tokens(lm.config, 2, 4)
    wrong = ids.clone()
    wrong[1, 2] = value
    with pytest.raises(ValueError, match=f"expected token ids between 0 and 60, got {value}"):
        lm(wrong)
    with pytest.raises(ValueError, match=f"expected labels of -100 or between 0 and 60, got {value}"):
        lm(ids, labels=wrong)


def test_tensors_without_values_are_refused_beside_a_model_with_weights(lm):
    ids = tokens(lm.config, 1, 4)
    for name in ("input_ids", "attention_mask", "position_ids", "labels", "logits_to_keep"):
        value = ids[0] if name == "logits_to_keep" else ids
        with pytest.raises(ValueError, match=f"expected {name} with values, .* got a tensor on device meta"):
            lm(**({"input_ids": ids} | {name: value.to("meta")}))
    with pytest.raises(ValueError, match="expected inputs_embeds with values"):
        lm(inputs_embeds=torch.ones(1, 4, 32, device="meta"))
    meta = da.DeepseekLM(lm.config, device="meta")
    assert meta(ids.to("meta"), labels=ids.to("meta")).logits.shape == (1, 4, 61)  # shapes alone
    cache = lm.new_cache(2)
    for call in (cache.rewind, cache.reorder):
        with pytest.raises(ValueError, match=r"with values, got .*meta"):
            call(torch.tensor([0, 1], device="meta"))


def test_places_out_of_range_leave_the_cache_as_it_was(lm):
    ids, cache = tokens(lm.config, 1, 5), lm.new_cache(1)
    lm(ids, cache=cache)
    for kept in (torch.tensor([5]), torch.tensor([[0], [1]]), torch.tensor([0], device="meta")):
        with pytest.raises(ValueError, match="logits_to_keep"):
            lm(ids, cache=cache, logits_to_keep=kept)
        assert cache.lengths == (5,)


def test_records_that_hold_no_decisions_are_refused(lm):
    ids = tokens(lm.config, 1, 5)
    good = lm(ids, record_routing=True).routing
    wrong = (
        ({1: 5, 2: 5}, "integer decisions .* for layer 1, got 5"),
        ({layer: each.float() for layer, each in good.ids.items()}, "integer decisions"),
        ({layer: each[0] for layer, each in good.ids.items()}, r"integer decisions .* got torch.int16 \[5, 3\]"),
        ({1: good.ids[1], 2: good.ids[2][:, :3]}, "the same .* tokens in all layers"),
        ({layer: each - 100 for layer, each in good.ids.items()}, "recorded experts between 0 and 7"),
    )
    for decisions, message in wrong:
        with pytest.raises(ValueError, match=message):
            lm(ids, replay_routing=da.RoutingRecord(decisions))


def test_records_are_compared_and_joined_only_if_they_fit(lm):
    ids = tokens(lm.config, 1, 5)
    good = lm(ids, record_routing=True).routing
    unsigned = da.RoutingRecord({layer: each.to(torch.uint16) for layer, each in good.ids.items()})
    assert torch.equal(lm(ids, replay_routing=unsigned).logits, lm(ids).logits)
    assert da.routing_agreement(good, unsigned).same == {1: 1.0, 2: 1.0}
    assert good.concat(unsigned).shape == (1, 10)
    fewer = da.RoutingRecord({layer: each[..., :1] for layer, each in good.ids.items()})
    for call in (da.routing_agreement, da.RoutingRecord.concat):
        with pytest.raises(ValueError, match="expected"):
            call(good, fewer)
        with pytest.raises(ValueError, match="expected"):
            call(good, da.RoutingRecord({1: 5, 2: 5}))
    with pytest.raises(ValueError, match="replay_routing of layer 1 with values"):
        lm(ids, replay_routing=good.to("meta"))
