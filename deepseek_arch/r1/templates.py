"""Prompts of R1's stages, and the forms of their responses.

Two forms are known. "tags" is R1-Zero's, `<think> ... </think> <answer> ... </answer>`. "boxed" is R1's,
`<think> ... </think>` followed by a summary with the answer in `\\boxed{}`; R1's chat template writes the opening tag
itself ("prefilled"), and then the completion starts within the thoughts (TRAPS T6).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

__all__ = ["ASSISTANT", "BEGIN", "END", "TAGS", "TEMPLATES", "USER", "Parsed", "Template", "boxes", "up_to_end"]

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")

# Table 1 of arXiv 2501.12948.
ZERO_PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think>...</think> and <answer>...</answer> tags, respectively, i.e., "
    "<think> reasoning process here </think> <answer> answer here </answer>. User: {question}. Assistant:"
)

_TAG = re.compile("(" + "|".join(TAGS) + ")")
_BRACES = re.compile(r"\\boxed\s*\{|\\[{}\\]|[{}]")


@dataclass(frozen=True)
class Parsed:
    """One response in parts.

    Attributes:
        thought: text between the thinking tags, or None where a response has none.
        summary: text behind the thoughts, or all of a response without any; None while it is still thinking.
        answer: text of the only final answer; None where there is none, or more than one.
        faults: what is wrong with the form, among "tags", "outside", "thought", "summary" and "answer"; empty for a
            well-formed response.
    """

    thought: str | None
    summary: str | None
    answer: str | None
    faults: tuple[str, ...] = ()

    @property
    def prose(self) -> str:
        """The thoughts and the summary."""
        return "\n".join(part for part in (self.thought, self.summary) if part)


@dataclass(frozen=True)
class Template:
    """The prompt of a stage and the form of its responses.

    Attributes:
        style: "tags" or "boxed".
        text: the prompt with `{question}` in it, or None for a conversation that the tokenizer's chat template renders.
        prefilled: True where the prompt ends within the thoughts.
    """

    style: str
    text: str | None = None
    prefilled: bool = False

    def __post_init__(self) -> None:
        if self.style not in ("tags", "boxed"):
            raise ValueError(f"expected style 'tags' or 'boxed', got {self.style!r}")

    def prompt(self, question: str) -> str | list[dict[str, Any]]:
        """Returns the prompt for `question`: text, or a conversation of one message."""
        if self.text is None:
            return [{"role": "user", "content": question}]
        # Not str.format: questions and templates may hold braces.
        return self.text.replace("{question}", question)

    def parse(self, text: str, needs_answer: bool = True) -> Parsed:
        """Takes a completion apart, in time linear in its length.

        Args:
            text: what was generated after the prompt. Everything from the first end-of-sentence mark on is ignored.
            needs_answer: whether a "boxed" response without a box is ill-formed; False for general prompts.
        """
        text = up_to_end(text)
        parts = _TAG.split(text)
        pieces, tags = parts[0::2], parts[1::2]
        thought, summary = self._sections(text)
        if self.style == "tags":
            return Parsed(thought, summary, _tagged_answer(text, pieces, tags), self._tag_faults(pieces, tags))
        found = [] if summary is None else boxes(summary)
        answer = found[0] if len(found) == 1 else None
        return Parsed(thought, summary, answer, self._box_faults(pieces, tags, found, needs_answer))

    def _sections(self, text: str) -> tuple[str | None, str | None]:
        """Returns the thoughts and what stands behind them."""
        if self.style == "tags":  # what stands behind the answer is no part of the response
            text = text.partition("</answer>")[0]
        head, closed, tail = text.partition("</think>")
        before, opened, inside = head.partition("<think>")
        if closed:
            return (inside if opened else before), tail
        if opened or self.prefilled:
            return (inside if opened else before), None
        return None, text

    def _tag_faults(self, pieces: list[str], tags: list[str]) -> tuple[str, ...]:
        expected = list(TAGS[1:] if self.prefilled else TAGS)
        if tags != expected:
            return ("tags",)
        outside = [] if self.prefilled else pieces[:1]
        thought, between, answer, after = pieces[-4:]
        faults = {
            "outside": any(piece.strip() for piece in (*outside, between, after)),
            "thought": not _has_words(thought),
            "answer": not answer.strip(),
        }
        return tuple(name for name, wrong in faults.items() if wrong)

    def _box_faults(self, pieces: list[str], tags: list[str], found: list[str], needs_answer: bool) -> tuple[str, ...]:
        expected = list(TAGS[1:2] if self.prefilled else TAGS[:2])
        if tags != expected:
            return ("tags",)
        thought, summary = pieces[-2:]
        faults = {
            "outside": not self.prefilled and bool(pieces[0].strip()),
            "thought": not _has_words(thought),
            "summary": not _has_words(summary),
            "answer": needs_answer and (len(found) != 1 or not found[0].strip()),
        }
        return tuple(name for name, wrong in faults.items() if wrong)


def up_to_end(text: str) -> str:
    """Returns `text` before its first end-of-sentence mark."""
    return text.partition(END)[0]


def boxes(text: str) -> list[str]:
    r"""Returns the contents of the outermost `\boxed{}` groups with balanced braces, in order.

    A box that is all there is in another one is opened as well.
    """
    found = []
    for content in _outermost(text):
        inner = _outermost(content) if content.strip().startswith("\\boxed") else []
        found.append(inner[0] if len(inner) == 1 and content.strip().endswith("}") else content)
    return found


def _outermost(text: str) -> list[str]:
    """Returns what the outermost boxes hold, in one pass over `text`."""
    found: list[str] = []
    opened: list[int | None] = []  # where a box's content starts; None for any other group
    depth = 0  # boxes among the open groups
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "}":
            start = opened.pop() if opened else None
            if start is not None:
                depth -= 1
                if not depth:
                    found.append(text[start : match.start()])
        elif token == "{":
            opened.append(None)
        elif token.startswith("\\boxed"):
            opened.append(match.end())
            depth += 1
    return found


def _tagged_answer(text: str, pieces: list[str], tags: list[str]) -> str | None:
    """Returns the answer of a response in R1-Zero's form, however ill-formed the rest is."""
    if "<answer>" in tags or "</answer>" in tags:
        at = tags.index("<answer>") if "<answer>" in tags else -1
        single = tags.count("<answer>") == tags.count("</answer>") == 1 and at >= 0
        # A pair with another tag inside, or thoughts that end behind it, is no final answer.
        if not single or tags[at + 1 : at + 2] != ["</answer>"] or "</think>" in tags[at:]:
            return None
        inside = pieces[at + 1]
        found = boxes(inside)
        return inside if not found else found[0] if len(found) == 1 else None
    if "<think>" in tags and "</think>" not in tags:
        return None
    found = boxes(text.partition("</think>")[2] if "</think>" in tags else text)
    return found[0] if len(found) == 1 else None


def _has_words(text: str) -> bool:
    """Returns True for a text with a letter or a digit."""
    return any(character.isalnum() for character in text)


TEMPLATES: dict[str, Template] = {
    "zero": Template("tags", ZERO_PROMPT),
    "zero-marks": Template("tags", BEGIN + USER + "{question}" + ASSISTANT),
    "r1-marks": Template("boxed", BEGIN + USER + "{question}" + ASSISTANT),
    "r1-marks-prefilled": Template("boxed", BEGIN + USER + "{question}" + ASSISTANT + "<think>\n", prefilled=True),
    "r1-chat": Template("boxed", None),
    "r1-chat-prefilled": Template("boxed", None, prefilled=True),
}
"""By name. "zero" is the paper's prompt for a base model; "marks" are DeepSeek's special tokens without any words."""
