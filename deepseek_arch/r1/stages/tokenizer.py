"""A small tokenizer with DeepSeek's marks and chat template, trained on the box's own text."""

from __future__ import annotations

import random
from typing import Any

from ..checks import require
from ..tasks import Chat
from ..tasks.corpus import Corpus
from ..templates import ASSISTANT, BEGIN, END, TAGS, USER

__all__ = ["CHAT_TEMPLATE", "PAD", "train_tokenizer"]

PAD = "<｜▁pad▁｜>"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '" + USER + "' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    # As DeepSeek's: the thoughts of earlier turns are not shown again.
    "{{ '" + ASSISTANT + "' + message['content'].split('</think>')[-1].strip() + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)


def train_tokenizer(corpora: list[Corpus], vocab_size: int, documents: int = 4000) -> Any:
    """Returns a byte-level BPE tokenizer of transformers; digits are single tokens, with the space before them or not.

    Args:
        corpora: that documents are taken from in turn, and the everyday responses of all kinds.
        vocab_size: tokens, the four tags not counted.
    """
    tokenizers, transformers = require("tokenizers"), require("transformers")
    pre, rng = tokenizers.pre_tokenizers, random.Random(0)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    pattern = tokenizers.Regex(r" ?\d| ?[A-Za-z]+| ?[\u4e00-\u9fff]+| ?[^\sA-Za-z\d\u4e00-\u9fff]+|\s+")
    split = pre.Split(pattern, "isolated")
    tokenizer.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    marks = [PAD, BEGIN, END, USER, ASSISTANT]
    texts = ["".join(corpora[i % len(corpora)].document(i)) for i in range(documents)]
    chat = Chat()
    for _ in range(documents // 4):
        problem = chat.one(rng)
        texts.append(problem.question + " " + chat.thought(problem) + " " + rng.choice(chat.responses(problem))[0])
    for mark in (*marks, *TAGS):
        texts = [text.replace(mark, " ") for text in texts]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=marks, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD, padding_side="left"
    )
    # Not special: special tokens are left out of the texts that rewards read (TRAPS T8).
    fast.add_tokens([tokenizers.AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    fast.chat_template = CHAT_TEMPLATE
    return fast
