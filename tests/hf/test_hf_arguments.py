"""Arguments of transformers' classes: integers of every type mean the same, and what is none is refused by name."""

from __future__ import annotations

import pytest
import torch

import deepseek_arch.hf as dhf
from support import small_models
from support.small_models import tokens

INTEGERS = (torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


@pytest.fixture(scope="module")
def lm(folder_of):
    folder = folder_of("v3", num_nextn_predict_layers=1)
    return dhf.DeepseekForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def ids(lm):
    return tokens(lm.config.to_core(), 2, 6)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_of_any_type(lm, ids, dtype):
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    positions = torch.arange(6).expand(2, -1)
    lm.config.mtp_loss_weight = 0.1
    try:
        expected = lm(ids, attention_mask=mask, position_ids=positions, labels=ids)
        given = {"attention_mask": mask, "position_ids": positions, "labels": ids}
        got = lm(ids.to(dtype), **{name: value.to(dtype) for name, value in given.items()})
    finally:
        lm.config.mtp_loss_weight = 0.0
    for name in ("loss", "logits", "mtp_loss"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    text = lm.generate(ids, max_new_tokens=3, do_sample=False)
    for given in ({"inputs": ids.to(dtype)}, {"input_ids": ids.to(dtype)}):
        assert torch.equal(lm.generate(**given, max_new_tokens=3, do_sample=False), text)
    assert torch.equal(lm.generate(ids.to(dtype), max_new_tokens=3, do_sample=False, use_mtp=True), text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64], ids=str)
def test_other_numbers_are_refused(lm, ids, dtype):
    for given in ({"input_ids": ids.to(dtype)}, {"input_ids": ids, "labels": ids.to(dtype)}):
        with pytest.raises(ValueError, match=f"expected integer {list(given)[-1]}, got {dtype}"):
            lm(**given)
    with pytest.raises(ValueError, match=f"expected integer position_ids, got {dtype}"):
        lm(ids, position_ids=ids.to(dtype))
    for use_mtp in (False, True):
        with pytest.raises(ValueError, match=f"expected integer inputs, got {dtype}"):
            lm.generate(ids.to(dtype), max_new_tokens=2, use_mtp=use_mtp)


@pytest.mark.parametrize("value", [-1, 61, 2**40, -(2**40)])
def test_ids_and_labels_outside_the_vocabulary(lm, ids, value):
    wrong = ids.clone()
    wrong[1, 3] = value
    with pytest.raises(ValueError, match=f"token ids between 0 and 60, got {value}"):
        lm(wrong)
    with pytest.raises(ValueError, match=f"token ids between 0 and 60, got {value}"):
        lm.generate(wrong, max_new_tokens=2)
    with pytest.raises(ValueError, match=f"labels of -100 or between 0 and 60, got {value}"):
        lm(ids, labels=wrong)
    with pytest.raises(ValueError, match=f"labels of -100 or between 0 and 60, got {value}"):
        lm(ids, labels=ids, shift_labels=wrong)


def test_an_ignored_label_of_the_callers(lm, ids):
    labels = ids.clone()
    labels[:, :3] = -7
    expected = lm(ids, labels=labels.masked_fill(labels == -7, -100)).loss
    torch.testing.assert_close(lm(ids, labels=labels, ignore_index=-7).loss, expected)


WRONG = {
    "attention_mask": (
        (torch.ones(2, 5), r"\[2, 6\].*got \[2, 5\]"),
        (torch.ones(2, 7), r"\[2, 6\].*got \[2, 7\]"),
        (torch.ones(1, 6), r"\[2, 6\].*got \[1, 6\]"),
        (torch.ones(6), r"got \[6\]"),
        (torch.ones(2, 6, 6), r"got \[2, 6, 6\]"),
        (torch.ones(3, 1, 6, 6), r"got \[3, 1, 6, 6\]"),
        (torch.tensor([[0.0, -torch.inf, 0, 0, 0, 0]] * 2), "additive"),
        ([[1] * 6] * 2, "a tensor, got"),
        (torch.ones(2, 6, device="meta"), "with values"),
    ),
    "position_ids": (
        (torch.zeros(2, 5, dtype=torch.long), r"\[2, 6\], got \[2, 5\]"),
        (torch.zeros(6, dtype=torch.long), r"got \[6\]"),
        ("x", "a tensor, got 'x'"),
    ),
    "labels": (
        (torch.zeros(2, 5, dtype=torch.long), r"labels \[2, 6\], got \[2, 5\]"),
        (torch.zeros(12, dtype=torch.long), r"labels \[2, 6\], got \[12\]"),
        ([[1]], "a tensor, got"),
    ),
    "input_ids": (
        (torch.zeros(6, dtype=torch.long), r"input_ids \[B, T\] .* got \[6\]"),
        (torch.zeros(2, 0, dtype=torch.long), r"T >= 1, got \[2, 0\]"),
        (torch.zeros(2, 6, dtype=torch.long, device="meta"), "input_ids with values"),
        ("text", "a tensor, got 'text'"),
    ),
    "logits_to_keep": (
        (-1, "logits_to_keep >= 0, got -1"),
        (1.5, "integer, got 1.5"),
        (torch.tensor([6]), "positions below 6, got 6"),
        (torch.tensor([True]), "integer logits_to_keep"),
    ),
    "past_key_values": (("cache", "a Cache of transformers, got 'cache'"), (((1, 2),), "a Cache of transformers")),
    "replay_routing": (("record", "a RoutingRecord, got 'record'"),),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_shapes_and_kinds_are_named(lm, ids, name):
    for value, message in WRONG[name]:
        with pytest.raises(ValueError, match=message):
            lm(**({"input_ids": ids} | {name: value}))


def test_places_for_each_row(lm, ids):
    """A tensor of two dimensions indexed rows, and gave logits [B, B, n, V]."""
    kept = torch.tensor([[5, 1], [0, 2]])
    got, logits = lm(ids, logits_to_keep=kept).logits, lm(ids).logits
    torch.testing.assert_close(got, torch.stack((logits[0, kept[0]], logits[1, kept[1]])))


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-38])
def test_the_limit_of_low_temperatures_is_greedy(lm, ids, drafts, temperature):
    greedy = lm.generate(ids, max_new_tokens=5, do_sample=False)
    got = lm.generate(ids, max_new_tokens=5, do_sample=True, temperature=temperature, use_mtp=drafts)
    assert torch.equal(got, greedy)


@pytest.mark.parametrize("drafts", [False, True])
def test_what_selects_is_looked_at_before_anything_runs(folder_of, ids, drafts):
    lm = dhf.DeepseekForCausalLM.from_pretrained(folder_of("v3", num_nextn_predict_layers=1), dtype=torch.float32)
    lm.model.layers[2].mlp.gate.e_score_correction_bias[5] = torch.nan
    with pytest.raises(
        ValueError, match=r"expected finite values, got .*layers\.2\.mlp\.gate\.e_score_correction_bias"
    ):
        lm.generate(ids, max_new_tokens=3, use_mtp=drafts)


@pytest.mark.parametrize("weight", [torch.inf, -1.0, "0.1", torch.nan, [0.1]])
def test_weights_of_losses_are_finite_numbers(lm, ids, weight):
    lm.config.mtp_loss_weight = weight
    try:
        with pytest.raises(ValueError, match="expected a finite mtp_loss_weight >= 0, got"):
            lm(ids, labels=ids)
    finally:
        lm.config.mtp_loss_weight = 0.0


def test_odd_scales_of_files(fp8_folder, edited):
    """A negative scale is no scale; one of 0 makes zeros of a block, and a warning says so."""
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"

    def with_scale(value):
        return edited(fp8_folder, lambda tensors, config: tensors[name].view(-1)[:1].fill_(value))

    for value in (-0.5, torch.nan, torch.inf):
        with pytest.raises(ValueError, match=r"o_proj.*expected .*scales"):
            dhf.DeepseekForCausalLM.from_pretrained(with_scale(value))
    with pytest.warns(UserWarning, match=r"o_proj\.weight_scale_inv has scales of 0"):
        dhf.DeepseekForCausalLM.from_pretrained(with_scale(0.0))


def test_a_mask_beside_a_cache_covers_the_tokens_in_it(lm, ids):
    """A mask of the new tokens alone was taken for one of the first tokens, the others for padding."""
    from transformers import DynamicCache

    for width in (2, 5, 7):
        cache = DynamicCache(config=lm.config)
        lm(ids[:, :4], past_key_values=cache)
        with pytest.raises(ValueError, match=rf"attention_mask \[2, 6\], got \[2, {width}\]"):
            lm(ids[:, 4:], attention_mask=torch.ones(2, width), past_key_values=cache)
    got = lm(ids[:, 4:], attention_mask=torch.ones(2, 6), past_key_values=cache).logits
    torch.testing.assert_close(got, lm(ids).logits[:, 4:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["Sequence", "Token"])
def test_labels_of_classifiers(kind, ids):
    core = small_models.config("v3", pad_token_id=0)
    lm = getattr(dhf, f"DeepseekFor{kind}Classification")(dhf.as_arch_config(core))
    lm.config.num_labels, labels = 2, torch.tensor([0, 1]) if kind == "Sequence" else ids % 2
    assert lm(ids, labels=labels).loss > 0
    for wrong in (2, -1, 10**6):
        changed = labels.clone()
        changed.view(-1)[0] = wrong
        with pytest.raises(ValueError, match=f"expected labels of -100 or between 0 and 1, got {wrong}"):
            lm(ids, labels=changed)
    with pytest.raises(ValueError, match="expected labels to be a tensor, got"):
        lm(ids, labels=[0, 1])
    if kind == "Sequence":  # several classes at once
        lm.config.problem_type = None
        assert lm(ids, labels=torch.rand(2, 2)).loss > 0
