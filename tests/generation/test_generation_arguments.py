"""Arguments of `generate`: types, ranges and sizes; end tokens of the folder; logits that are not finite."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import deepseek_arch as da
from deepseek_arch.generation.finite_check import FiniteCheck
from deepseek_arch.generation.sampling import Sampler, sampling_probabilities
from deepseek_arch.generation.speculative import accept
from support.small_models import config, model, tokens


@pytest.fixture(scope="module")
def lm():
    return model(config("v3", num_nextn_predict_layers=1))


WRONG = {
    "max_new_tokens": [
        (10**12, r"max_new_tokens <= 1048571, got 10{12}\b"),
        (10**5000, r"max_new_tokens .* got about 10\*\*5000"),
        (1.5, "1.5"),
        (True, "True"),
        (None, "None"),
        ("8", "'8'"),
        (-1, "max_new_tokens >= 0, got -1"),
    ],
    "mtp_depth": [(-1, "mtp_depth >= 0"), (1.0, "integer mtp_depth"), (10**12, "mtp_depth <= 1024")],
    "temperature": [(None, "got None"), ("hot", "'hot'"), (float("inf"), "inf"), (10**400, "finite temperature")],
    "top_k": [(0, "top_k >= 1"), (2.0, "integer top_k"), ([3], r"\[3\]")],
    "top_p": [(0.0, r"\(0, 1\]"), (float("nan"), "nan"), ("1", "'1'")],
    "seed": [(1.0, "integer seed"), (2**65, "seed <="), (-(2**64), "seed >=")],
    "pad_token_id": [("<pad>", "'<pad>'"), (2**64, "pad_token_id <=")],
    "eos_token_id": [("</s>", "'</s>'"), (1.5, "1.5"), ([1, "a"], "'a'"), (2**70, "token id"), (True, "True")],
    "prefill_chunk": [(0, "prefill_chunk >= 1"), (2.5, "2.5")],
    "cache_format": [("int4", "'int4'"), (8, "got 8")],
    "callback": [(3, "got 3")],
    "compiled": [("yes", "'yes'")],
    "adaptive": [(1, "got 1")],
    "drop_finished": [(None, "got None")],
    "attention_mask": [
        ([[1, 1, 1, 1, 1]], "tensor, got list"),
        (torch.ones(1, 4), r"\[1, 5\], got \[1, 4\]"),
        (torch.tensor([[0.0, 0, 0, 0, -torch.inf]]), "additive"),
        (torch.zeros(1, 5), "row of padding only"),
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_types_and_ranges_are_named_at_once(lm, name):
    ids = tokens(lm.config, 1, 5)
    for value, message in WRONG[name]:
        started = time.process_time()
        with pytest.raises(ValueError, match=message):
            da.generate(lm, ids, **{name: value})
        assert time.process_time() - started < 1, value  # milliseconds; the margin is for a machine at its limit


def test_several_mistakes_are_named_together(lm):
    with pytest.raises(ValueError, match=r"top_k >= 1, got 0; expected a finite temperature"):
        da.generate(lm, tokens(lm.config, 1, 5), top_k=0, temperature=-1)


def test_numpy_scalars_are_numbers(lm):
    ids = tokens(lm.config, 1, 5)
    settings = {"max_new_tokens": 4, "temperature": 1.0, "top_k": 5, "top_p": 0.9, "seed": 3, "eos_token_id": 60}
    typed = {k: (np.float32 if isinstance(v, float) else np.int64)(v) for k, v in settings.items()}
    expected = da.generate(lm, ids, **(settings | {"top_p": float(np.float32(0.9))}))
    assert torch.equal(da.generate(lm, ids, **typed), expected)
    ends = da.generate(lm, ids, max_new_tokens=4, eos_token_id=np.array([60, 1]))
    assert torch.equal(ends, da.generate(lm, ids, max_new_tokens=4, eos_token_id=torch.tensor([60, 1])))


@pytest.mark.parametrize("drafts", [0, 1])
def test_ids_of_any_integer_type_and_no_other(lm, drafts):
    ids = tokens(lm.config, 2, 5)
    expected = da.generate(lm, ids, max_new_tokens=3, mtp_depth=drafts)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64):
        assert torch.equal(da.generate(lm, ids.to(dtype), max_new_tokens=3, mtp_depth=drafts), expected)
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=f"integer input_ids, got {dtype}"):
            da.generate(lm, ids.to(dtype), max_new_tokens=3, mtp_depth=drafts)
    for wrong, message in (([[1, 2]], "tensor"), (ids[0], r"got \[5\]"), (ids[:0], r"got \[0, 5\]")):
        with pytest.raises(ValueError, match=message):
            da.generate(lm, wrong, mtp_depth=drafts)


def test_other_things_than_models(lm):
    for wrong in ("tiny", None, torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=f"DeepseekLM, got {type(wrong).__name__}"):
            da.generate(wrong, torch.tensor([[1]]))


@pytest.mark.parametrize("drafts", [0, 1])
def test_prompts_masks_and_models_without_values(lm, drafts):
    ids = tokens(lm.config, 2, 5)
    with pytest.raises(ValueError, match=r"expected input_ids with values, .* on device meta"):
        da.generate(lm, ids.to("meta"), mtp_depth=drafts)
    with pytest.raises(ValueError, match=r"expected attention_mask with values, .* on device meta"):
        da.generate(lm, ids, torch.ones_like(ids, device="meta"), mtp_depth=drafts)
    with pytest.raises(ValueError, match="expected a model with weights, got one on device meta"):
        da.generate(da.DeepseekLM(lm.config, device="meta"), ids, mtp_depth=drafts)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    expected = da.generate(lm, ids, mask, max_new_tokens=3, mtp_depth=drafts)
    for dtype in (torch.bool, torch.uint8, torch.uint16, torch.uint64, torch.float16):
        assert torch.equal(da.generate(lm, ids, mask.to(dtype), max_new_tokens=3, mtp_depth=drafts), expected)


# ---------------------------------------------------------------- extreme settings


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-45, 1e-38, 1e-30])
def test_the_limit_of_low_temperatures_is_greedy(lm, drafts, temperature):
    """Below float32's smallest number a temperature became 0, and the best logit 0 / 0."""
    ids = tokens(lm.config, 2, 5)
    greedy = da.generate(lm, ids, max_new_tokens=6)
    settings = {"max_new_tokens": 6, "mtp_depth": drafts, "temperature": temperature, "seed": 1}
    for more in ({}, {"top_k": 3}, {"top_p": 0.5}, {"top_p": 1e-300}):
        assert torch.equal(da.generate(lm, ids, **settings, **more), greedy)
    _, report = da.generate(lm, ids, **settings, return_logprobs=True)
    assert torch.equal(report.logprobs, torch.zeros(2, 6))  # certain


def test_the_limit_of_high_temperatures_is_uniform(lm):
    """Above float32's largest number a temperature became infinite, and a masked logit Inf / Inf."""
    logits = torch.tensor([[1.0, 3.0, -torch.inf, 2.0]])
    third = torch.tensor([[1, 1, 0, 1]]) / 3
    torch.testing.assert_close(sampling_probabilities(logits, 1e300), third)
    torch.testing.assert_close(sampling_probabilities(logits, 1e39), third)
    out = da.generate(lm, tokens(lm.config, 1, 5), max_new_tokens=4, temperature=1e300, seed=0)
    assert out.shape == (1, 9)


@pytest.mark.parametrize("top_p", [1e-300, 1e-45, 1e-8])
def test_a_nucleus_holds_at_least_the_best_token(top_p):
    got = sampling_probabilities(torch.tensor([[0.0, 0.1, -1.0]]), 1.0, None, top_p)
    assert got.tolist() == [[0.0, 1.0, 0.0]]


# ---------------------------------------------------------------- end tokens


@pytest.mark.parametrize("drafts", [0, 1])
def test_end_tokens_outside_the_vocabulary(lm, drafts):
    """Refused as an argument; those of a folder end no text, and a warning says so."""
    ids = tokens(lm.config, 1, 5)
    free = da.generate(lm, ids, max_new_tokens=3, eos_token_id=[])
    for wrong in (61, -1, [3, 10**6], 2**62, np.array([61]), torch.tensor([-100]), range(10**12)):
        with pytest.raises(ValueError, match="expected eos_token_id of the argument between 0 and 60, got"):
            da.generate(lm, ids, max_new_tokens=3, eos_token_id=wrong, mtp_depth=drafts)
    with pytest.raises(ValueError, match="expected at most 1048576 eos_token_id, got more"):
        da.generate(lm, ids, eos_token_id=itertools.repeat(1), mtp_depth=drafts)
    other = model(config("v3", num_nextn_predict_layers=1, eos_token_id=100))
    with pytest.warns(UserWarning, match=r"eos_token_id of config\.json between 0 and 60, got 100, which ends no text"):
        assert torch.equal(da.generate(other, ids, max_new_tokens=3, mtp_depth=drafts), free)
    other.generation_config = {"eos_token_id": [163586]}
    with pytest.warns(UserWarning, match=r"generation_config\.json between 0 and 60, got 163586") as caught:
        assert torch.equal(da.generate(other, ids, max_new_tokens=3, mtp_depth=drafts), free)
    assert caught[0].filename == __file__  # of the caller
    for wrong in ("</s>", 1.5, [True], {"a": 1}):
        other.generation_config = {"eos_token_id": wrong}
        with pytest.raises(ValueError, match=r"eos_token_id of generation_config\.json to be an integer or a list"):
            da.generate(other, ids, max_new_tokens=3, mtp_depth=drafts)


def test_the_folders_generation_config_says_where_texts_end(lm):
    """Kimi-K2's turns end with a token that its config.json does not name."""
    ids = tokens(lm.config, 1, 6)
    free = da.generate(lm, ids, max_new_tokens=8, eos_token_id=[])[0, 6:].tolist()
    end = next(token for token in free[1:] if token != free[0])
    length = free.index(end) + 1
    for kind in (dict, SimpleNamespace):
        ended = model(config("v3", eos_token_id=free[0], num_nextn_predict_layers=1))
        assert da.generate(ended, ids, max_new_tokens=8).shape[1] == 7
        for ends in (end, [end, 60]):
            ended.generation_config = kind(eos_token_id=ends)
            for drafts in (0, 1):
                out = da.generate(ended, ids, max_new_tokens=8, mtp_depth=drafts)
                assert out[0, 6:].tolist() == free[:length]
        assert da.generate(ended, ids, max_new_tokens=8, eos_token_id=free[0]).shape[1] == 7
        ended.generation_config = kind(temperature=0.6)
        assert da.generate(ended, ids, max_new_tokens=8).shape[1] == 7


def test_the_folders_padding_fills_finished_rows(lm):
    ids = tokens(lm.config, 2, 6)
    free = da.generate(lm, ids, max_new_tokens=4, eos_token_id=[])
    end = int(free[0, 6])
    assert end != free[1, 6]
    padded = model(config("v3", num_nextn_predict_layers=1))
    padded.generation_config = {"eos_token_id": end, "pad_token_id": 60}
    assert da.generate(padded, ids, max_new_tokens=4)[0, 6:].tolist() == [end, 60, 60, 60]


# ---------------------------------------------------------------- not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("how", [{}, {"mtp_depth": 1}, {"temperature": 1.0}, {"temperature": 0.5, "mtp_depth": 2}])
def test_no_token_comes_from_logits_that_are_not_finite(how, value):
    lm, seen = model(config("v3", num_nextn_predict_layers=1)), []
    with torch.no_grad():
        lm.model.layers[1].self_attn.o_proj.weight[0, 0] = value
    for top in ({}, {"top_k": 5}, {"top_p": 0.9}):
        with pytest.raises(ValueError, match=r"finite logits, got .*model\.layers\.1\.self_attn\.o_proj\.weight"):
            da.generate(lm, tokens(lm.config, 2, 4), max_new_tokens=4, callback=seen.append, **how, **top)
    assert not seen


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_is_noticed_in_the_middle_of_a_text(drafts, temperature):
    """A token's embedding is NaN: the step after it raises, and everything up to it has been handed out."""
    lm, seen = model(config("v3", num_nextn_predict_layers=1)), []
    ids = tokens(lm.config, 1, 4)
    settings = {"max_new_tokens": 12, "temperature": temperature, "seed": 2, "eos_token_id": []}
    settings |= {"mtp_depth": drafts, "adaptive": False}
    text = da.generate(lm, ids, **settings)[0, 4:].tolist()
    poison = next(token for token in text[2:] if token not in text[:2] and token not in ids)
    with torch.no_grad():
        lm.model.embed_tokens.weight[poison] = torch.nan
    with pytest.raises(ValueError, match=r"finite logits, got .*embed_tokens"):
        da.generate(lm, ids, callback=lambda column: seen.append(int(column)), **settings)
    assert seen == text[: len(seen)] and 1 <= len(seen) <= text.index(poison) + 1


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("drop", [False, True])
def test_a_finished_row_does_not_count(drafts, drop):
    """Its end token is run with the others' next ones, and need not have an embedding."""
    lm = model(config("v3", num_nextn_predict_layers=1))
    ids = tokens(lm.config, 3, 4, seed=4)
    free = da.generate(lm, ids, max_new_tokens=10, eos_token_id=[])
    end = int(free[0, 5])
    settings = {"max_new_tokens": 10, "eos_token_id": end, "pad_token_id": 0, "mtp_depth": drafts}
    settings["adaptive"] = False  # the same drafts in every run: one that is the end token would need an embedding
    expected = da.generate(lm, ids, **settings)
    assert (expected[0] == 0).any() and not (expected[1:] == end).any() and not (ids == end).any()
    with torch.no_grad():
        lm.model.embed_tokens.weight[end] = torch.nan
    assert torch.equal(da.generate(lm, ids, drop_finished=drop, **settings), expected)


def test_masked_logits_are_finite_enough():
    """A hook that forbids tokens with -Inf leaves something to choose from."""
    lm = model(config("v3"))
    lm.lm_head.register_forward_hook(lambda _, args, out: out.index_fill(-1, torch.arange(30), -torch.inf))
    for temperature in (0.0, 1.0):
        out = da.generate(lm, tokens(lm.config, 1, 4), max_new_tokens=6, temperature=temperature, seed=0)
        assert (out[:, 4:] >= 30).all()


@pytest.mark.parametrize("settings", [{}, {"mtp_depth": 1}, {"temperature": 1.0}, {"record_routing": True}])
def test_what_selects_is_looked_at_before_anything_runs(settings):
    """NaN in a router's bias sends every token to its expert, and leaves the logits finite."""
    lm, seen = model(config("v3", num_nextn_predict_layers=1)), []
    for value in (torch.nan, torch.inf):
        for router, name in ((lm.model.layers[2].mlp.gate, "model.layers.2"), (lm.mtp[0].mlp.gate, "mtp.0")):
            before = router.e_score_correction_bias.clone()
            router.e_score_correction_bias[5] = value
            with pytest.raises(ValueError, match=f"expected finite values, got .* {name}.mlp.gate.e_score_correction"):
                da.generate(lm, tokens(lm.config, 1, 4), max_new_tokens=3, callback=seen.append, **settings)
            router.e_score_correction_bias.copy_(before)
    assert not seen
    lm.model.layers[2].mlp.gate.e_score_correction_bias[5] = -torch.inf  # an expert that is left out
    assert da.generate(lm, tokens(lm.config, 1, 4), max_new_tokens=3, **settings) is not None


@pytest.mark.parametrize("name", ["wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight"])
def test_an_indexer_with_nan_selects_no_keys(name):
    lm = model(config("v32"))
    with torch.no_grad():
        lm.get_parameter(f"model.layers.1.self_attn.indexer.{name}").view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match=rf"finite values, got .* model\.layers\.1\.self_attn\.indexer\.{name}"):
        da.generate(lm, tokens(lm.config, 1, 9), max_new_tokens=3)


def test_nan_that_no_token_reaches_changes_nothing():
    lm = model(config("v3"))
    ids = tokens(lm.config, 1, 4)
    text = da.generate(lm, ids, max_new_tokens=3)
    unused = next(token for token in range(61) if token not in text)
    with torch.no_grad():
        lm.model.embed_tokens.weight[unused] = torch.nan
    assert torch.equal(da.generate(lm, ids, max_new_tokens=3), text)


def test_the_message_does_not_blame_offloaded_parameters():
    """A parameter on device meta has no values to be wrong."""
    check = FiniteCheck(da.DeepseekLM(config("v3"), device="meta"), torch.device("cpu"), immediate=True)
    with pytest.raises(ValueError, match="every parameter is finite"):
        check(torch.tensor([False]), torch.tensor([False]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_behind_a_rejected_draft_decide_nothing(temperature):
    """A draft's embedding may be NaN, and with it the logits after it; nothing is taken from there."""
    logits = torch.full((1, 3, 5), -50.0)
    logits[0, 0, 2] = 50.0  # the first draft is another token
    logits[0, 1:] = torch.nan
    drawn_from = None if temperature == 0 else torch.eye(5)[[1, 1]][None]
    sampler = Sampler(1, temperature, generator=torch.Generator().manual_seed(0))
    accepted, follow, finite = accept(torch.tensor([[1, 1]]), drawn_from, logits, sampler)
    assert accepted.tolist() == [0] and follow.tolist() == [2] and finite.all()
    logits[0, 0] = torch.nan
    assert not accept(torch.tensor([[1, 1]]), drawn_from, logits, sampler)[2].all()
