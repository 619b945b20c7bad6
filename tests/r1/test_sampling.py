"""Rejection sampling: what is kept, why the rest is not, and in which proportions."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from deepseek_arch.r1.language import consistency
from deepseek_arch.r1.rollouts import Rollout
from deepseek_arch.r1.sampling import (
    CollectSettings,
    Filters,
    Row,
    balance_languages,
    collect,
    decontaminate,
    general_rows,
    mix,
    ngrams,
    read_rows,
    write_rows,
)
from deepseek_arch.r1.tasks import Chains, Chat, Table
from deepseek_arch.r1.templates import TEMPLATES

TASK = Chains(nodes=4, low=2, high=3)
ZERO, R1, PREFILLED = (TEMPLATES[name] for name in ("zero-marks", "r1-marks", "r1-marks-prefilled"))
SETTINGS = CollectSettings(problems=30, samples=4, max_new_tokens=99, seed=1)


class Cycle:
    """A policy that gives its responses in turn; they may hold `{answer}` and `{wrong}`."""

    end_tokens, pad_token = (0,), 1

    def __init__(self, responses, task=TASK):
        self.responses = responses
        self.answers = {ZERO.prompt(p.question): p.answer for p in task.draw(200, 1)}

    def encode(self, prompt):
        return [ord(c) for c in prompt]

    def decode(self, ids):
        return "".join(map(chr, ids)).rstrip("\0")

    def sample(self, prompts, sampling, record_routing=False):
        rows, ended = [], []
        for i, prompt in enumerate(prompts):
            text = self.responses[i % len(self.responses)]
            answer = self.answers["".join(map(chr, prompt))]
            text = text.replace("{answer}", answer).replace("{wrong}", str((int(answer) + 1) % 10))
            ended.append(not text.endswith("..."))
            rows.append([ord(c) for c in text.removesuffix("...")])
        return Rollout(list(prompts), rows, ended)


GOOD = "<think> 1 : 2 3 </think> <answer> {answer} </answer>"


def test_only_right_and_readable_samples_are_kept():
    policy = Cycle([
        "<think> step 步 </think> <answer> {answer} </answer>",
        "<think> 1 </think> <answer> {wrong} </answer>",
        "<answer> {answer} </answer>",
        GOOD,
    ])  # fmt: skip
    found = collect(policy, TASK, ZERO, R1, SETTINGS, Filters())
    assert found.counts == {"language": 30, "wrong": 30, "form": 30, "kept": 30}
    for row, problem in zip(found.rows, TASK.draw(30, 1), strict=True):
        assert row.question == problem.question and row.language == problem.language
        parsed = R1.parse(row.completion)
        assert parsed.answer.strip() == problem.answer and not parsed.faults
        assert row.prompt == R1.prompt(problem.question)


def test_a_problem_gives_no_more_rows_than_asked_for():
    found = collect(Cycle([GOOD]), TASK, ZERO, R1, replace(SETTINGS, keep=2), Filters())
    assert found.counts == {"kept": 60, "spare": 60}


@pytest.mark.parametrize(
    ("thought", "filters", "reason"),
    [
        ("a b c d " * 20, {"ngram": 4}, "repetition"),
        ("x " * 50, {"longest_paragraph": 20, "repeated": 1.0}, "paragraph"),
        ("```python\n1\n```", {"consistency": None}, "code"),
        ("1 : 2 3", {"max_tokens": 10}, "length"),
    ],
)
def test_filters_have_reasons(thought, filters, reason):
    policy = Cycle([f"<think> {thought} </think> <answer> {{answer}} </answer>"])
    found = collect(policy, TASK, ZERO, R1, replace(SETTINGS, samples=1), Filters(**filters))
    assert found.counts == {reason: 30}
    assert collect(Cycle([GOOD + "..."]), TASK, ZERO, R1, replace(SETTINGS, samples=1), Filters()).counts == {
        "cut off": 30
    }


def test_refinement_translates_thoughts_and_writes_a_summary():
    policy = Cycle(["<think> step 步 wait 等等 </think> <answer> {answer} </answer>"])
    found = collect(policy, TASK, ZERO, R1, replace(SETTINGS, samples=1, refine=True), Filters())
    assert len(found.rows) == 30 and {row.language for row in found.rows} == {"en", "zh"}
    for row, problem in zip(found.rows, TASK.draw(30, 1), strict=True):
        parsed = R1.parse(row.completion)
        assert consistency(parsed.prose, row.language) == 1.0
        assert parsed.answer.strip() == problem.answer
    table = Table([{"problem": "p", "answer": "1"}], test_share=0.0)
    with pytest.raises(ValueError, match="that can refine thoughts, got 'table'"):
        collect(policy, table, ZERO, R1, replace(SETTINGS, refine=True), Filters())
    with pytest.raises(ValueError, match="boxed answers, got style 'tags'"):
        collect(policy, TASK, ZERO, ZERO, SETTINGS, Filters())


def test_summaries_can_be_written_while_thoughts_stay():
    policy = Cycle(["<think> step 步 </think> <answer> {answer} </answer>"])
    settings = replace(SETTINGS, samples=1, summarize=True)
    found = collect(policy, TASK, ZERO, R1, settings, Filters(consistency=None))
    assert len(found.rows) == 30
    for row in found.rows:
        parsed = R1.parse(row.completion)
        assert parsed.thought == " step 步 " and consistency(parsed.summary, row.language) == 1.0
    # Without either the answer stands there as the policy wrote it: other spaces would make other tokens.
    (row, *_) = collect(policy, TASK, ZERO, R1, replace(settings, summarize=False), Filters(consistency=None)).rows
    assert re.search(r"</think> \\boxed\{ \d \}$", row.completion)


def test_written_rows_are_right_and_in_one_language():
    found = collect(Cycle(["no"]), TASK, ZERO, PREFILLED, replace(SETTINGS, written=10), Filters())
    assert found.counts == {"wrong": 120} and len(found.rows) == 10
    for row, problem in zip(found.rows, TASK.draw(10, 2), strict=True):
        parsed = PREFILLED.parse(row.completion)
        assert not parsed.faults and parsed.answer.strip() == problem.answer
        assert TASK.full_list(parsed.thought, problem)
        assert consistency(parsed.prose, row.language) == 1.0


def test_evaluations_are_kept_out_by_their_word_sequences():
    rows = [Row(text, text, "x") for text in ("a b c d e f", "B c D e x", "u v w", "")]
    assert [row.question for row in decontaminate(rows, ["z b c d e"], 4)] == ["u v w", ""]
    assert [row.question for row in decontaminate(rows, ["u v w"], 10)] == ["a b c d e f", "B c D e x", ""]
    assert ngrams("A b", 3) == {("a", "b")} and ngrams(" ", 3) == set()
    with pytest.raises(ValueError, match="size >= 1"):
        decontaminate(rows, [], 0)


def test_chinese_is_kept_out_by_its_characters():
    question = "小明有五个苹果,吃了两个,还剩几个?"
    rows = [Row(text, text, "x") for text in (f"请回答:{question}谢谢", "小明有五个梨,丢了两个,还剩几个?", "小明 A1")]
    assert [row.question for row in decontaminate(rows, [question], 10)] == [rows[1].question, "小明 A1"]
    assert ngrams("小明 A1,ばな", 2) == {("小", "明"), ("明", "a1,"), ("a1,", "ば"), ("ば", "な")}


def test_languages_are_balanced_by_the_rarest():
    rows = [Row(str(i), "p", "c", "zh" if i % 4 else "en") for i in range(40)] + [Row("any", "p", "c")]
    kept = balance_languages(rows)
    assert [sum(row.language == name for row in kept) for name in ("en", "zh", None)] == [10, 10, 1]


def test_general_rows_are_of_known_quality_and_never_harmful():
    chat = Chat()
    by_question = {p.question: p for p in chat.draw(200, 3)}
    for template in (R1, PREFILLED):
        rows = general_rows(chat, 200, 3, template)
        qualities = [
            chat.quality(template.parse(row.completion, needs_answer=False).summary, by_question[row.question])
            for row in rows
        ]
        assert set(qualities) == {0.0, 1.0, 2.0}
        thoughtful = [row for row in rows if not template.parse(row.completion, needs_answer=False).faults]
        brief = {row.question for row in rows} - {row.question for row in thoughtful}
        assert brief == {question for question, problem in by_question.items() if chat.simple(problem)}
        assert {"Hello !", "你 好 !"} < brief < set(by_question)


def test_general_rows_can_be_as_people_like_them_seldom():
    chat = Chat()
    by_question = {p.question: p for p in chat.draw(600, 3)}

    def share(best: float | None) -> float:
        rows = [row for row in general_rows(chat, 600, 3, R1, best=best) if row.kind == "general"]
        summaries = [(R1.parse(row.completion, needs_answer=False).summary, row.question) for row in rows]
        return sum(chat.quality(text, by_question[question]) == 2 for text, question in summaries) / len(rows)

    assert share(0.0) == 0.0 and share(1.0) == 1.0
    assert 0.05 < share(0.15) < 0.25 and share(None) > 0.3


def test_the_mixture_has_three_rows_of_reasoning_for_each_general_one():
    reasoning = [Row(f"r{i}", "p", "c") for i in range(90)]
    general = [Row(f"g{i}", "p", "c", kind="general") for i in range(50)]
    mixed = mix(reasoning, general, 3, 0)
    assert [sum(row.kind == kind for row in mixed) for kind in ("reasoning", "general")] == [90, 30]
    assert mixed == mix(reasoning, general, 3, 0) != mix(reasoning, general, 3, 1)
    few = mix(reasoning, general[:10], 3, 0)
    assert len(few) == 40
    for arguments, message in (((reasoning, general, 0, 0), "ratio above 0"), (([], general, 3, 0), "both kinds")):
        with pytest.raises(ValueError, match=message):
            mix(*arguments)


def test_rows_survive_a_file(tmp_path):
    rows = [Row("问", "p", "c\n\u2028x", "zh"), Row("q", [{"role": "user", "content": "q"}], "c", None, "general")]
    write_rows(rows, tmp_path / "rows.jsonl")
    assert read_rows(tmp_path / "rows.jsonl") == rows
    (tmp_path / "bad.jsonl").write_text('{"question": "q"}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_rows(tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    "make",
    [
        lambda: CollectSettings(samples=0),
        lambda: CollectSettings(written=-1),
        lambda: Filters(consistency=1.1),
        lambda: Filters(ngram=0),
    ],
)
def test_bad_settings_are_refused(make):
    with pytest.raises(ValueError, match="expected"):
        make()
