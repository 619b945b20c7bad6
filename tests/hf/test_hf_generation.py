"""`generate` gives transformers' own tokens, by every road."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, GenerationConfig
from twins import native, ours

from support import small_models
from support.small_models import tokens

NEW = 10
# Token 60 is not drawn into prompts, so that padding cannot be taken for text.
PAD = 60


@pytest.fixture(scope="module")
def pair():
    model = ours(small_models.config("v3", rope_scaling=small_models.YARN))
    return model, native(model)


@pytest.fixture(scope="module")
def prompt(pair):
    ids = tokens(pair[0].config.to_core().replace(vocab_size=PAD), 3, 8, seed=3)
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 5, 1)):
        ids[row, :pad], mask[row, :pad] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, prompt, **how):
    torch.manual_seed(0)
    return model.generate(**prompt, **{"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD, **how})


ROADS = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "several of each": {"do_sample": True, "num_return_sequences": 2},
    "stop token": {"eos_token_id": [5, 17, 40]},
    "penalty": {"repetition_penalty": 1.5},
}


@pytest.mark.parametrize("road", ROADS)
def test_tokens_equal_the_native_ones_for_a_left_padded_batch(pair, prompt, road):
    got, expected = (generate(model, prompt, **ROADS[road]) for model in pair)
    assert torch.equal(got, expected)
    assert got.shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.parametrize("kind", ["v2", "v2-lite", "glm"])
def test_other_families_generate_the_native_tokens(kind):
    model = ours(small_models.config(kind))
    prompt = {"input_ids": tokens(model.config.to_core().replace(vocab_size=PAD), 2, 6)}
    assert torch.equal(generate(model, prompt), generate(native(model), prompt))


def test_a_padded_row_generates_what_it_would_alone(pair, prompt):
    together = generate(pair[0], prompt)
    alone = generate(pair[0], {"input_ids": prompt["input_ids"][1:2, 5:]})
    assert torch.equal(together[1, -NEW:], alone[0, -NEW:])


def test_eager_attention_generates_the_same_and_shows_its_weights(pair, prompt):
    model = pair[0]
    expected = generate(model, prompt)
    model.set_attn_implementation("eager")
    try:
        out = generate(model, prompt, output_attentions=True, return_dict_in_generate=True)
    finally:
        model.set_attn_implementation("sdpa")
    assert torch.equal(out.sequences, expected)
    last = out.attentions[-1]  # of the last step, one per layer
    assert len(last) == model.config.num_hidden_layers
    sums = last[0].sum(-1)
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)
    assert last[0][1, :, :, :5].abs().max() == 0  # padding gets nothing


@pytest.mark.parametrize("how", ["draft model", "prompt lookup"])
def test_assisted_generation_gives_the_greedy_tokens(pair, prompt, how):
    """Drafts that are refused are cropped from the cache."""
    model = pair[0]
    one = {"input_ids": prompt["input_ids"][:1]}
    draft = ours(small_models.config("v2-lite", num_hidden_layers=1))
    assistance = {"assistant_model": draft} if how == "draft model" else {"prompt_lookup_num_tokens": 3}
    assert torch.equal(generate(model, one, **assistance), generate(model, one))


def test_our_models_draft_for_native_ones(pair, prompt):
    one = {"input_ids": prompt["input_ids"][:1]}
    draft = ours(small_models.config("v3", num_hidden_layers=2))
    assert torch.equal(generate(pair[1], one, assistant_model=draft), generate(pair[1], one))


def test_a_conversation_goes_on_from_its_cache(pair):
    model = pair[0]
    first, second = tokens(model.config.to_core(), 1, 5, seed=1), tokens(model.config.to_core(), 1, 4, seed=2)
    cache = DynamicCache(config=model.config)
    turn = generate(model, {"input_ids": first}, past_key_values=cache)
    whole = torch.cat((turn, second), 1)
    expected = generate(model, {"input_ids": whole})
    assert torch.equal(generate(model, {"input_ids": whole}, past_key_values=cache), expected)


def test_the_cache_holds_latents_not_heads(pair):
    """kv_lora_rank + qk_rope_head_dim values a token and layer, whatever the number of heads (TRAPS B7)."""
    model = pair[0]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros(1, 7, dtype=torch.long), past_key_values=cache)
    assert cache.layers[0].keys.shape == (1, 1, 7, model.config.kv_lora_rank)
    assert cache.layers[0].values.shape == (1, 1, 7, model.config.qk_rope_head_dim)


@pytest.mark.parametrize("depths", [1, 2])
def test_mtp_modules_draft_for_any_number_of_rows(depths):
    """TRAPS F10, F13: greedy tokens are those of plain decoding; the layers are the model's own."""
    model = ours(small_models.config("v3", num_nextn_predict_layers=depths))
    core = model.config.to_core()
    ids, mask = small_models.tokens(core, 3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[1, :4] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **settings)
    for drafts in (None, 1, 3):
        got = model.generate(ids, use_mtp=True, num_assistant_tokens=drafts, **settings)
        assert torch.equal(got, expected)
    calls = []
    model.mtp[0].register_forward_hook(lambda *args: calls.append(1))
    model.generate(input_ids=ids, generation_config=GenerationConfig(max_new_tokens=9, use_mtp=True))
    assert calls
    sampled = [model.generate(ids, use_mtp=True, do_sample=True, max_new_tokens=5) for _ in range(2)]
    assert not torch.equal(*sampled)


def test_drafting_says_what_it_does_not_go_with():
    model = ours(small_models.config("v3", num_nextn_predict_layers=1))
    ids = small_models.tokens(model.config.to_core(), 1, 4)
    with pytest.raises(ValueError, match="got num_beams"):
        model.generate(ids, use_mtp=True, max_new_tokens=3, num_beams=2)
    with pytest.raises(ValueError, match="got output_scores"):
        model.generate(ids, use_mtp=True, max_new_tokens=3, return_dict_in_generate=True, output_scores=True)
    plain = ours(small_models.config("v3"))
    with pytest.raises(ValueError, match="num_nextn_predict_layers 0"):
        plain.generate(ids, use_mtp=True, max_new_tokens=3)


class Received:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        assert not self.ended
        self.pieces.append(value)

    def end(self):
        self.ended = True


@pytest.mark.parametrize("drafts", [1, 3])
def test_drafting_streams_and_returns_a_dict(drafts):
    """A streamer gets the prompts, then every new column once and in order, as without drafts."""
    model = ours(small_models.config("v3", num_nextn_predict_layers=1))
    ids = small_models.tokens(model.config.to_core(), 1, 5)
    plain, drafted = Received(), Received()
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    expected = model.generate(ids, streamer=plain, **settings)
    got = model.generate(ids, streamer=drafted, use_mtp=True, num_assistant_tokens=drafts, **settings)
    assert type(got) is type(expected) and torch.equal(got.sequences, expected.sequences)
    assert plain.ended and drafted.ended
    assert [piece.tolist() for piece in drafted.pieces] == [piece.tolist() for piece in plain.pieces]


def test_text_is_streamed(tokenizer, capsys):
    from transformers import TextStreamer

    model = ours(small_models.config("v3", num_nextn_predict_layers=1))
    ids = small_models.tokens(model.config.to_core(), 1, 5)
    out = model.generate(ids, streamer=TextStreamer(tokenizer), use_mtp=True, max_new_tokens=6, do_sample=False)
    assert capsys.readouterr().out.split() == tokenizer.decode(out[0]).split()


def test_drafting_drops_no_setting_in_silence(monkeypatch):
    """Neither the model's own, nor those in any place where transformers takes them."""
    model = ours(small_models.config("v3", num_nextn_predict_layers=1))
    ids = small_models.tokens(model.config.to_core(), 1, 4)
    own = GenerationConfig(use_mtp=True, max_new_tokens=3, num_assistant_tokens=3)
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(
            "deepseek_arch.hf.mtp_generation.generate",
            lambda core, ids, *args, **how: asked.append(how["mtp_depth"]) or ids,
        )
        model.generate(ids, own)  # by position, and with the depth that it asks for
        model.generate(ids, use_mtp=True, max_new_tokens=3)
        model.generation_config.num_assistant_tokens = 2
        model.generate(ids, use_mtp=True, max_new_tokens=3)
        model.generation_config.num_assistant_tokens = None
    assert asked == [3, 1, 2]
    with pytest.raises(ValueError, match="num_assistant_tokens >= 1"):
        model.generate(ids, use_mtp=True, max_new_tokens=3, num_assistant_tokens=0)
    with pytest.raises(ValueError, match="by position"):
        model.generate(ids, None, [], use_mtp=True)
    model.generation_config.repetition_penalty = 50.0
    with pytest.raises(ValueError, match="got repetition_penalty"):
        model.generate(ids, use_mtp=True, max_new_tokens=3)


def test_drafting_takes_padding_for_padding():
    model = ours(small_models.config("v3", num_nextn_predict_layers=1))
    ids = small_models.tokens(model.config.to_core().replace(vocab_size=PAD), 2, 6)
    ids[1, :3] = PAD
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    assert torch.equal(model.generate(ids, use_mtp=True, **settings), model.generate(ids, **settings))


@pytest.mark.parametrize("settings", [{}, {"do_sample": True}, {"num_beams": 2}, {"use_cache": False}])
def test_no_token_comes_from_logits_that_are_not_finite(settings):
    model = ours(small_models.config("v3"))
    ids = tokens(small_models.config("v3"), 2, 5)
    model.lm_head.weight.data[7, 3] = float("nan")
    with pytest.raises(ValueError, match=r"expected finite logits, got NaN .* lm_head.weight is not finite"):
        model.generate(ids, max_new_tokens=3, **{"do_sample": False} | settings)
