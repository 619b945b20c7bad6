"""Rewards of trained models: what they read, when they are silent, and scores that do not depend on the batch."""

from __future__ import annotations

import types

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import tokenizers
from transformers import PreTrainedTokenizerFast

import deepseek_arch.hf as dhf
from deepseek_arch.r1.rewards import ModelReward
from deepseek_arch.r1.templates import END, TEMPLATES
from support import small_models

WORDS = ["<pad>", "<end>", "<unk>", *"abcdefghij", "<think>", "</think>"]


@pytest.fixture(scope="module")
def tokenizer():
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", padding_side="left"
    )
    made.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}<think>\n"
    return made


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = dhf.as_arch_config(small_models.config("v3", pad_token_id=0))
    config.num_labels = 1
    made = dhf.DeepseekForSequenceClassification(config)
    torch.nn.init.normal_(made.score.weight)
    return made.eval()


def helpful(model, tokenizer, **options) -> ModelReward:
    return ModelReward(model, tokenizer, TEMPLATES["r1-marks"], **options)


PROMPT = "a b "


def pay(reward, completions, prompts=None, kind="general", **more):
    count = len(completions)
    kinds = [kind] * count if isinstance(kind, str) else kind
    return reward(completions=completions, prompts=prompts or [PROMPT] * count, kind=kinds, **more)


def test_the_summary_is_read_with_the_end_token_and_nothing_else(model, tokenizer):
    reward = helpful(model, tokenizer)
    assert reward.read(PROMPT, "<think> c d </think> e f") == "a b e f<end>"
    assert reward.read(PROMPT, "<think> c d </think> e f" + END + "g") == "a b e f<end>"
    assert reward.read([{"role": "user", "content": "a b"}], "<think> c </think> e") == "a b e<end>"
    assert reward.read(PROMPT, "<think> c d") is None
    everything = helpful(model, tokenizer, reads="all")
    assert everything.read(PROMPT, "<think> c d </think> e") == "a b <think> c d </think> e<end>"


def test_scores_are_those_of_each_text_alone(model, tokenizer):
    texts = ["<think> c </think> " + " ".join("efghij"[: 1 + i % 6]) for i in range(7)]
    alone = [pay(helpful(model, tokenizer), [text])[0] for text in texts]
    assert len(set(alone)) == 6
    for batch_size in (2, 64):
        assert pay(helpful(model, tokenizer, batch_size=batch_size), texts) == pytest.approx(alone, abs=1e-5)
    ids = tokenizer("a b e f <end>", return_tensors="pt", add_special_tokens=False).input_ids
    assert alone[1] == pytest.approx(float(model(input_ids=ids).logits.detach()), abs=1e-5)
    bounded = pay(helpful(model, tokenizer, bounded=True), texts)
    assert bounded == pytest.approx(torch.tensor(alone).sigmoid().tolist(), abs=1e-5)


def test_thoughts_change_nothing_for_the_summary_and_something_for_all(model, tokenizer):
    texts = ["<think> c </think> e", "<think> d d d </think> e"]
    first, second = pay(helpful(model, tokenizer), texts)
    assert first == second
    first, second = pay(helpful(model, tokenizer, reads="all"), texts)
    assert first != second


def test_a_response_without_a_summary_is_no_better_than_the_worst(model, tokenizer):
    texts = ["<think> c </think> e", "<think> c c", "<think> c </think> f", "<think> c </think> "]
    scores = pay(helpful(model, tokenizer), texts)
    assert scores[1] == scores[3] == min(scores[0], scores[2])


def test_it_is_silent_for_other_kinds_and_in_the_first_steps(model, tokenizer):
    texts = ["<think> c </think> e"] * 3
    scores = pay(helpful(model, tokenizer), texts, kind=["general", "reasoning", "harmless"])
    assert scores[0] is not None and scores[1:] == [None, None]
    late = helpful(model, tokenizer, active_from=0.75)
    for step, silent in ((0, True), (74, True), (75, False), (100, False)):
        state = types.SimpleNamespace(global_step=step, max_steps=100)
        assert all(score is None for score in pay(late, texts, trainer_state=state)) == silent


def test_bad_models_and_tokenizers_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="'summary' or 'all'"):
        helpful(model, tokenizer, reads="thought")
    with pytest.raises(ValueError, match="active_from"):
        helpful(model, tokenizer, active_from=2)
    with pytest.raises(ValueError, match="prompts"):
        helpful(model, tokenizer)(completions=["x"], kind=["general"])
    two = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=61, num_labels=2))
    with pytest.raises(ValueError, match="one label"):
        helpful(two, tokenizer)
    small = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=5, num_labels=1))
    with pytest.raises(ValueError, match="reward model for 15 tokens"):
        helpful(small, tokenizer)
    same = types.SimpleNamespace(eos_token_id=1, pad_token_id=1)
    with pytest.raises(ValueError, match="pad token other than its end token"):
        helpful(model, same)
