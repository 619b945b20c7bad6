"""Responses as they are generated, thoughts and answer apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checks import check_lengths
from ..rollouts import Sampling

__all__ = ["Reasoner", "Reply", "Splitter", "TokenReader"]

OPENED, CLOSED = "<think>", "</think>"


class Splitter:
    """Takes a growing text apart into thoughts and answer, tags left out.

    Args:
        emit: is given "reasoning_content" or "content", and the next piece of it.
        thinking: whether the text starts within the thoughts, as behind a prompt that opens them.
    """

    def __init__(self, emit: Callable[[str, str], object], thinking: bool = False) -> None:
        self.emit, self.thinking = emit, thinking
        self.parts = {"reasoning_content": "", "content": ""}
        self._waiting, self._started, self._closed = "", False, False

    def add(self, text: str, final: bool = False) -> None:
        """Adds the next piece of the text; `final` for the last one."""
        self._waiting += text
        while True:
            tag = CLOSED if self.thinking else OPENED
            # A second opening tag, or one behind the first words or the thoughts, is text like any other.
            sought = self.thinking or not (self._closed or self._started)
            at = self._waiting.find(tag) if sought else -1
            if at < 0 or (not self.thinking and self._waiting[:at].strip()):
                break
            self._give(self._waiting[:at])
            self._waiting = self._waiting[at + len(tag) :]
            self._closed, self.thinking = self.thinking, not self.thinking
            self._started = False
        held = 0 if final or not sought else _overlap(self._waiting, tag)
        ready = self._waiting[: len(self._waiting) - held]
        self._waiting = self._waiting[len(ready) :]
        self._give(ready)

    def _give(self, text: str) -> None:
        if not self._started:
            text = text.lstrip()  # the line between a tag and its text
        if text:
            kind = "reasoning_content" if self.thinking else "content"
            self._started = True
            self.parts[kind] += text
            self.emit(kind, text)


def _overlap(text: str, tag: str) -> int:
    """Returns the characters at the end of `text` that may be the start of `tag`."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


class TokenReader:
    """Turns tokens into text as they come, each decoded a bounded number of times however long the text grows.

    A token is decoded together with those of the piece before it, since tokenizers drop a leading space at the start
    of a text. The bytes of one character may come in several tokens, which are held back until it is whole.

    Args:
        decode: returns the text of tokens.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.decode, self.count = decode, 0
        self._before: list[int] = []
        self._new: list[int] = []

    def add(self, tokens: Sequence[int]) -> str:
        """Returns the text that became whole."""
        self._new.extend(tokens)
        self.count += len(tokens)
        text = self.rest()
        if text.endswith("\ufffd"):
            return ""
        self._before, self._new = self._new, []
        return text

    def rest(self) -> str:
        """Returns the text that was held back, as far as it can be read."""
        return self.decode([*self._before, *self._new])[len(self.decode(self._before)) :]


@dataclass(frozen=True)
class Reply:
    """A response.

    Attributes:
        reasoning_content, content: thoughts and answer.
        finish_reason: "stop", or "length" for one that was cut off.
        prompt_tokens, completion_tokens: how many there were.
    """

    reasoning_content: str
    content: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class Reasoner:
    """A policy that answers conversations; greedy decoding makes reasoning models repeat themselves.

    Args:
        policy: a `stages.Policy` whose tokenizer has a chat template.
        max_new_tokens: of a response, at most, unless a request says fewer.
        temperature, top_p: unless a request says otherwise; the paper's.
        mtp_depth: tokens that prediction layers draft in a step.

    Raises:
        ValueError: a tokenizer without a chat template.
    """

    def __init__(
        self,
        policy: Any,
        max_new_tokens: int = 32_768,
        temperature: float = 0.6,
        top_p: float = 0.95,
        mtp_depth: int = 0,
    ) -> None:
        if not getattr(policy.tokenizer, "chat_template", None):
            raise ValueError("expected a tokenizer with a chat template, got one without")
        self.policy, self.mtp_depth = policy, mtp_depth
        self.max_new_tokens, self.temperature, self.top_p = max_new_tokens, temperature, top_p

    def respond(
        self,
        messages: Sequence[Mapping[str, str]],
        emit: Callable[[str, str], object] = lambda kind, text: None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Reply:
        """Answers a conversation, whose last message is the user's.

        Args:
            emit: is given "reasoning_content" or "content", and the next piece of it, as it comes.

        Raises:
            ValueError: messages without role and text, or a conversation that is too long.
        """
        _check_messages(messages)
        text = self._prompt([dict(message) for message in messages])
        prompt = self.policy.encode(text)
        sampling = Sampling(
            self.max_new_tokens if max_new_tokens is None else max_new_tokens,
            self.temperature if temperature is None else temperature,
            None,
            self.top_p if top_p is None else top_p,
            self.policy.end_tokens,
            self.policy.pad_token,
            seed,
            self.mtp_depth,
        )
        positions = getattr(self.policy.model.config, "max_position_embeddings", None)
        check_lengths(len(prompt), sampling.max_new_tokens, positions)
        splitter = Splitter(emit, text.rstrip().endswith(OPENED))
        reader = TokenReader(self.policy.decode)
        ended = self.policy.stream(prompt, sampling, lambda tokens: splitter.add(reader.add(tokens)))
        splitter.add(reader.rest(), final=True)
        reason = "stop" if ended else "length"
        return Reply(**splitter.parts, finish_reason=reason, prompt_tokens=len(prompt), completion_tokens=reader.count)

    def _prompt(self, messages: list[dict[str, str]]) -> str:
        try:
            return str(self.policy.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # templates raise errors of Jinja, and those of whatever they do with a message
            raise ValueError(f"expected a conversation that the chat template takes, got {error}") from error


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"expected messages, got {str(messages)[:60]!r}")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str) or "role" not in message:
            raise ValueError(f"expected messages with role and text, got {str(message)[:60]!r}")
    if messages[-1]["role"] != "user":
        raise ValueError(f"expected a last message of the user, got one of {messages[-1]['role']!r}")
