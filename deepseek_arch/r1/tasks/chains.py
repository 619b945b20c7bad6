"""Walks along pointers: "Follow 7 2 , 2 6 , 6 7 . Start 7 , 2 steps .", answer 6, in English and Chinese.

A direct answer takes all steps in one forward pass, a list of steps takes one at a time: thinking pays. Each step is a
copy of something in the prompt, which small models learn within minutes, and every problem is new.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..problems import Problem, check_split
from ..rewards import number_of

__all__ = ["STYLES", "WORDS", "Chains", "Writer", "translate"]

WORDS = {
    "en": {"step": "step", "check": "let me check", "wait": "wait", "wrong": "that is wrong", "same": "the same",
           "answer": "the answer is"},
    "zh": {"step": "步", "check": "检查 一下", "wait": "等等", "wrong": "不 对", "same": "一样", "answer": "答案 是"},
}  # fmt: skip
_QUESTIONS = {
    "en": "Follow {table} . Start {start} , {steps} steps .",
    "zh": "沿着 {table} 。 开始 {start} , {steps} 步 。",
}
# What a base model's text holds: the form of a response and its share.
STYLES = {"direct": 0.24, "answer": 0.20, "jump": 0.12, "pairs": 0.14, "steps": 0.22, "check": 0.08}


@dataclass
class Chains:
    """Walks of `low` to `high` steps on a ring of `nodes` digits in a drawn order.

    One problem in eight, chosen by a hash of its ring and length, is kept for the test split in all languages.

    Attributes:
        nodes: from 2 to 10. Take more than `high`: on fewer, long walks go round and are short ones in truth.
        low, high: steps, at least 1.
        languages: of the questions, drawn with equal probability.
    """

    nodes: int = 6
    low: int = 3
    high: int = 5
    languages: Sequence[str] = ("en", "zh")
    name: str = field(default="chains", init=False)

    def __post_init__(self) -> None:
        if not 2 <= self.nodes <= 10 or not 1 <= self.low <= self.high:
            raise ValueError(
                f"expected 2 to 10 nodes and 1 <= low <= high, got {self.nodes} nodes and {self.low} to {self.high}"
            )
        unknown = set(self.languages) - set(WORDS)
        if unknown or not self.languages:
            raise ValueError(f"expected languages among {', '.join(WORDS)}, got {', '.join(self.languages)}")

    def draw(self, count: int, seed: int, split: str = "train") -> list[Problem]:
        """Returns `count` problems; see `ProblemSet.draw`."""
        rng = random.Random(f"chains {seed} {split}")
        return [self.one(rng, split) for _ in range(count)]

    def one(self, rng: random.Random, split: str = "train") -> Problem:
        """Returns a problem drawn with `rng`."""
        check_split(split)
        while True:
            ring = rng.sample(range(10), self.nodes)
            pairs = [[ring[i], ring[(i + 1) % self.nodes]] for i in range(self.nodes)]
            rng.shuffle(pairs)
            data = {"start": rng.choice(ring), "steps": rng.randint(self.low, self.high), "pairs": pairs}
            language = rng.choice(list(self.languages))
            kept = zlib.crc32(f"{data['start']} {data['steps']} {pairs}".encode()) % 8 == 0
            if kept == (split == "test"):
                return self._problem(data, language)

    def _problem(self, data: dict, language: str) -> Problem:
        table = " , ".join(f"{a} {b}" for a, b in data["pairs"])
        question = _QUESTIONS[language].format(table=table, start=data["start"], steps=data["steps"])
        return Problem(question, str(self.path(data)[-1]), language, "reasoning", "number", data)

    @staticmethod
    def path(data: dict) -> list[int]:
        """Returns the nodes of the walk, the first one included."""
        following = dict(data["pairs"])
        nodes = [data["start"]]
        for _ in range(data["steps"]):
            nodes.append(following[nodes[-1]])
        return nodes

    def grade(self, answer: str, problem: Problem) -> float | None:
        """Returns 1.0 for the node where the walk ends."""
        return float(number_of(answer) == number_of(problem.answer or ""))

    def forced_steps(self, problem: Problem) -> tuple[str, list[tuple[str, str]]]:
        """Returns the right step list, to measure single steps with: its opening, and for each step what precedes the
        node to copy, and the node."""
        word, path = WORDS[problem.language or "en"]["step"], self.path(dict(problem.data))
        steps = [(f" {word} {i} : {path[i - 1]}", f" {path[i]}") for i in range(1, len(path))]
        return "<think>", steps

    def refine(self, thought: str, answer: str, problem: Problem) -> tuple[str, str]:
        """Returns the thoughts in the language of the question, and a summary: what DeepSeek had V3 and people do."""
        language = problem.language or "en"
        return translate(thought, language), f"{WORDS[language]['answer']} \\boxed{{ {answer.strip()} }} ."

    def solve(self, problem: Problem) -> tuple[str, str]:
        """Returns right thoughts and the answer, as a person would write them."""
        lines, node = Writer(random.Random(0), problem.language or "en").steps(problem)
        return " . ".join(lines) + " .", str(node)

    def full_list(self, thought: str, problem: Problem) -> bool:
        """Returns True where the thoughts number all steps from the first to the last one."""
        numbers = [int(n) for n in re.findall(r"(?:step|步) (\d+) :", thought)]
        return numbers == list(range(1, problem.data["steps"] + 1))


class Writer:
    """Writes responses to `Chains`, good and bad ones: the text of a base model.

    Args:
        rng: draws everything.
        language: of most words.
        purity: share of the words in it; the others are in the other language.
        noise: probability of a wrong step.
    """

    def __init__(self, rng: random.Random, language: str, purity: float = 1.0, noise: float = 0.0) -> None:
        self.rng, self.language, self.purity, self.noise = rng, language, purity, noise

    def word(self, key: str) -> str:
        other = "zh" if self.language == "en" else "en"
        return WORDS[self.language if self.rng.random() < self.purity else other][key]

    def steps(self, problem: Problem, stride: int = 1, mend: float = 0.0, noise: float | None = None):
        """Returns the lines of a step list and the node that it ends at.

        Args:
            stride: steps taken in one line.
            mend: probability that a wrong step is noticed and taken again.
            noise: another probability of wrong steps than the writer's.
        """
        noise = self.noise if noise is None else noise
        following = dict(problem.data["pairs"])
        node, lines, done = problem.data["start"], [], 0
        while done < problem.data["steps"]:
            hop = min(stride, problem.data["steps"] - done)
            done, right = done + hop, node
            for _ in range(hop):
                right = following[right]
            said = right
            if self.rng.random() < noise * hop**2:
                said = self.rng.choice([other for other in following if other != right])
            lines.append(f"{self.word('step')} {done} : {node} {said}")
            if said != right and self.rng.random() < mend:
                lines.append(f"{self.word('wait')} {self.word('wrong')} , {node} {right}")
                said = right
            node = said
        return lines, node

    def response(self, problem: Problem, style: str) -> str:
        """Returns a response in one of `STYLES`, in R1-Zero's form or in a sloppy one."""
        if style == "direct":
            words = f"{self.word('answer')}"
            return (
                f"{words} \\boxed{{ {problem.answer} }} ." if self.rng.random() < 0.5 else f"{words} {problem.answer}"
            )
        if style == "answer":
            return f"<answer> {problem.answer} </answer>"
        if style == "jump":
            lines, node = self.steps(problem, stride=problem.data["steps"], noise=0.0)
        elif style == "pairs":
            lines, node = self.steps(problem, stride=2)
        else:
            lines, node = self.steps(problem, mend=0.8 if style == "check" else 0.0)
        if style == "check":
            lines, node = self._checked(problem, lines, node)
        thought = " . ".join(lines) + " ."
        if style != "check" and self.rng.random() < 0.25:
            words = self.word("answer")
            forms = (
                f"{thought} {words} {node}",
                f"<think> {thought} {words} {node}",
                f"{thought} <answer> {node} </answer>",
                f"<think> {thought} </think> {node}",
            )
            return self.rng.choice(forms)
        return f"<think> {thought} </think> <answer> {node} </answer>"

    def _checked(self, problem: Problem, lines: list[str], node: int) -> tuple[list[str], int]:
        """Returns the list with a second one behind it, and a third where the two differ."""
        again, second = self.steps(problem, mend=0.8, noise=self.noise / 2)
        lines = [*lines, self.word("check"), *again]
        if second == node:
            return [*lines, self.word("same")], node
        third, node = self.steps(problem, noise=0.0)
        return [*lines, f"{self.word('wait')} {self.word('wrong')}", *third], node


def translate(text: str, language: str) -> str:
    """Returns `text` with the words of `WORDS` in one language: the refinement of cold-start thoughts."""
    other = "zh" if language == "en" else "en"
    pairs = {WORDS[other][key]: WORDS[language][key] for key in WORDS[other]}
    for word in sorted(pairs, key=len, reverse=True):
        edge = r"(?<![A-Za-z])", r"(?![A-Za-z])"
        pattern = f"{edge[0]}{re.escape(word)}{edge[1]}" if other == "en" else re.escape(word)
        text = re.sub(pattern, pairs[word], text)
    return text
