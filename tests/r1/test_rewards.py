"""Rule rewards on hostile completions: what each one pays, and that text after the end never pays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_arch.r1.rewards import Accuracy, Format, Language, Overlong, Repetition
from deepseek_arch.r1.templates import END, TEMPLATES, Template

TAGS = TEMPLATES["zero-marks"]
BOXED = TEMPLATES["r1-marks"]
PREFILLED = TEMPLATES["r1-marks-prefilled"]
GOOD = "<think> two and two is four </think> <answer> 4 </answer>"
BOX = "<think> two and two is four </think> The answer is \\boxed{4} ."

# template, completion, expected accuracy, expected format; the reference is 4.
HOSTILE = [
    # R1-Zero's tags
    (TAGS, GOOD, 1, 1),
    (TAGS, "<think>so it is 4</think><answer>4</answer>", 1, 1),
    (TAGS, "\n <think>so it is 4</think>\n\n<answer>\n4\n</answer>\n", 1, 1),
    (TAGS, "", 0, 0),
    (TAGS, " ", 0, 0),
    (TAGS, "4", 0, 0),
    (TAGS, "<answer>4</answer>", 1, 0),
    (TAGS, "\\boxed{4}", 1, 0),
    (TAGS, "it is \\boxed{ 4 } .", 1, 0),
    (TAGS, "<think></think><answer>4</answer>", 1, 0),
    (TAGS, "<think> \n </think><answer>4</answer>", 1, 0),
    (TAGS, "<think> ... </think><answer>4</answer>", 1, 0),
    (TAGS, "<think>so</think><answer></answer>", 0, 0),
    (TAGS, "<think>so</think><answer> </answer>", 0, 0),
    (TAGS, "<think>so</think> 4", 0, 0),
    (TAGS, "<think>so</think> \\boxed{4}", 1, 0),
    (TAGS, "<think>so</think> \\boxed{3} \\boxed{4}", 0, 0),
    (TAGS, "<think>so</think><answer>\\boxed{4}</answer>", 1, 1),
    (TAGS, "<think>so</think><answer>\\boxed{3} \\boxed{4}</answer>", 0, 1),
    (TAGS, "<think>so</think><answer>3</answer><answer>4</answer>", 0, 0),
    (TAGS, "<think>so</think><answer>4</answer><answer>4</answer>", 0, 0),
    (TAGS, "<think>so</think><answer>4", 0, 0),
    (TAGS, "<think>so</think>4</answer>", 0, 0),
    (TAGS, "<think>so</think></answer>4<answer>", 0, 0),
    (TAGS, "<think>so <answer>4</answer> </think>", 0, 0),
    (TAGS, "<think>so <answer>4</answer> </think><answer>3</answer>", 0, 0),
    (TAGS, "<think>so <answer>3</answer> </think><answer>4</answer>", 0, 0),
    (TAGS, "<think>so</think></think><answer>4</answer>", 1, 0),
    (TAGS, "<think><think>so</think></think><answer>4</answer>", 1, 0),
    (TAGS, "<think>so</think><think>more</think><answer>4</answer>", 1, 0),
    (TAGS, "<think>so<answer>4</answer>", 1, 0),
    (TAGS, "so</think><answer>4</answer>", 1, 0),
    (TAGS, "Sure! <think>so</think><answer>4</answer>", 1, 0),
    (TAGS, "<think>so</think> therefore <answer>4</answer>", 1, 0),
    (TAGS, "<think>so</think><answer>4</answer> I am sure", 1, 0),
    (TAGS, "<THINK>so</THINK><ANSWER>4</ANSWER>", 0, 0),
    (TAGS, "< think >so</ think ><answer>4</answer>", 1, 0),
    (TAGS, "<think>it is \\boxed{4}", 0, 0),
    (TAGS, "<think>so</think><answer>4 or 5</answer>", 0, 1),
    (TAGS, "<think>so</think><answer>1, 2, 3, 4</answer>", 0, 1),
    (TAGS, "<think>so</think><answer>3 = 4</answer>", 0, 1),
    (TAGS, "<think>so</think><answer>3 = x = 4</answer>", 0, 1),
    (TAGS, "<think>so</think><answer>not 4</answer>", 0, 1),
    (TAGS, "<think>so</think><answer>４</answer>", 1, 1),  # full-width  # noqa: RUF001
    (TAGS, "<think>so</think><answer>4.0</answer>", 1, 1),
    (TAGS, "<think>so</think><answer>+4</answer>", 1, 1),
    (TAGS, "<think>so</think><answer>-4</answer>", 0, 1),
    (TAGS, "<think>so</think><answer>- 4</answer>", 0, 1),
    (TAGS, "<think>so</think><answer>8/2</answer>", 1, 1),
    (TAGS, "<think>so</think><answer>4/0</answer>", 0, 1),
    (TAGS, "<think>so</think><answer>4 4</answer>", 0, 1),
    (TAGS, "<think>so</think><answer>1e400</answer>", 0, 1),
    (TAGS, "<think>so</think><answer>0.4e1</answer>", 1, 1),
    (TAGS, "<think>so</think><answer>1e999999999999</answer>", 0, 1),
    (TAGS, "<think>so</think><answer>nan</answer>", 0, 1),
    (TAGS, "<think>so</think><answer>" + "4" * 100_000 + "</answer>", 0, 1),
    (TAGS, "<think>so</think><answer>3} \\boxed{4</answer>", 0, 1),
    (TAGS, GOOD + END + "<answer>5</answer>", 1, 1),
    (TAGS, "<think>so</think><answer>5</answer>" + END + GOOD, 0, 1),
    (TAGS, END + GOOD, 0, 0),
    # R1's form
    (BOXED, BOX, 1, 1),
    (BOXED, "<think>so</think>\\boxed{4}", 1, 1),
    (BOXED, "<think>so</think>The answer is 4", 0, 0),
    (BOXED, "<think>so \\boxed{4}</think>The answer is 4", 0, 0),
    (BOXED, "<think>perhaps \\boxed{3}? no</think>\\boxed{4}", 1, 1),
    (BOXED, "<think>so</think>\\boxed{4} \\boxed{4}", 0, 0),
    (BOXED, "<think>so</think>\\boxed{4} or \\boxed{5}", 0, 0),
    (BOXED, "<think>so</think>\\boxed{\\boxed{4}}", 1, 1),
    (BOXED, "<think>so</think>\\boxed{4", 0, 0),
    (BOXED, "<think>so</think>\\boxed{5 \\boxed{4}}", 0, 1),
    (BOXED, "<think>so</think>\\boxed{\\boxed{5}\\boxed{4}}", 0, 1),
    (BOXED, "<think>so</think>\\boxed{\\fbox{5} 4}", 0, 1),
    (BOXED, "<think>so</think>\\boxed{3 \\to 4}", 0, 1),
    (BOXED, "<think>so</think>\\boxed{3 \\Rightarrow 4}", 0, 1),
    (BOXED, "<think>so</think>\\boxed{3 \\sim 4}", 0, 1),
    (BOXED, "<think>so</think>\\boxed{3 \\equiv 4}", 0, 1),
    (BOXED, "<think>so</think>\\boxed{3 & 4}", 0, 1),
    (BOXED, "<think>so</think>\\boxed{3\\\\ \\hline 4}", 0, 1),
    (BOXED, "<think>so</think>\\boxed{3 \u2013 4}", 0, 1),
    (BOXED, "<think>so</think>\\boxed{x \\in \\{3\\} \\iff 4}", 0, 1),
    (BOXED, "<think>so</think>{\\boxed{4}", 1, 1),
    (BOXED, "<think>so</think>\\boxed {4}", 1, 1),
    (BOXED, "<think>so</think>\\boxed 4", 0, 0),
    (BOXED, "<think>so</think>\\boxed{}", 0, 0),
    (BOXED, "<think>so</think>\\boxed{\\text{4}}", 1, 1),
    (BOXED, "<think>so</think>\\boxed{{4}}", 1, 1),
    (BOXED, "<think>so", 0, 0),
    (BOXED, "<think>so \\boxed{4}", 0, 0),
    (BOXED, "\\boxed{4}", 1, 0),
    (BOXED, "so</think>\\boxed{4}", 1, 0),
    (BOXED, "<think>so</think></think>\\boxed{4}", 1, 0),
    (BOXED, "<think>so</think>\\boxed{3}</think>\\boxed{4}", 0, 0),
    (BOXED, "<think>so</think><answer>4</answer>", 0, 0),
    (BOXED, "<think></think>\\boxed{4}", 1, 0),
    (BOXED, BOX + END + "\\boxed{5}", 1, 1),
    # R1's template has written <think> already
    (PREFILLED, "two and two\n</think>\nIt is \\boxed{4}.", 1, 1),
    (PREFILLED, BOX, 1, 0),
    (PREFILLED, "</think>\\boxed{4}", 1, 0),
    (PREFILLED, "\\boxed{4}", 0, 0),
    (PREFILLED, "so \\boxed{4} </think>", 0, 0),
    (PREFILLED, "so </think> \\boxed{3} </think> \\boxed{4}", 0, 0),
]


def columns(count: int = 1, **changes) -> dict[str, list]:
    row = {"answer": "4", "language": "en", "kind": "reasoning", "grader": "math", "data": "{}"} | changes
    return {name: [value] * count for name, value in row.items()}


def pay(reward, completion, **changes):
    return reward(completions=[completion], prompts=["?"], completion_ids=[[1, 2]], **columns(**changes))[0]


PROGRAM, WRONG = "```python\nprint(4)\n```", "```python\nprint(5)\n```"


@pytest.mark.parametrize(
    ("template", "completion", "accuracy"),
    [
        (TAGS, f"<think>so</think><answer>{PROGRAM}</answer>", 1),
        (TAGS, f"<think>so</think>{PROGRAM}", 1),
        (TAGS, f"<think>so</think><answer>{PROGRAM}</answer><answer>{WRONG}</answer>", 0),
        (TAGS, f"<think>so</think><answer>{WRONG}</answer><answer>{PROGRAM}</answer>", 0),
        (TAGS, f"<think>so</think>{PROGRAM}<answer>{WRONG}</answer>", 0),
        (TAGS, f"<think>so</think>{PROGRAM}<answer>see above</answer>", 0),
        (TAGS, f"<think>so <answer>{PROGRAM}</answer></think><answer>{WRONG}</answer>", 0),
        (BOXED, f"<think>so</think>{PROGRAM}", 1),
        (BOXED, f"<think>{PROGRAM}</think>{WRONG}", 0),
        (BOXED, f"<think>so</think>{PROGRAM}\n{WRONG}", 0),
        (PREFILLED, PROGRAM, 0),
    ],
)
def test_the_only_final_program_counts(template, completion, accuracy):
    tests = '[{"input": "", "output": "4"}]'
    assert pay(Accuracy(template), completion, grader="code", answer=tests) == accuracy


def name_of(value) -> str | None:
    return value[:40] if isinstance(value, str) else next((k for k, v in TEMPLATES.items() if v is value), None)


def test_the_table_is_long_enough():
    assert len({(name_of(template), text) for template, text, *_ in HOSTILE}) >= 80


@pytest.mark.parametrize(("template", "completion", "accuracy", "form"), HOSTILE, ids=name_of)
def test_hostile_completions(template, completion, accuracy, form):
    pytest.importorskip("math_verify")
    assert pay(Accuracy(template), completion) == accuracy
    assert pay(Format(template), completion) == form
    message = [{"role": "assistant", "content": completion}]
    assert pay(Accuracy(template), message) == accuracy
    assert pay(Format(template), message) == form


def rules(template: Template) -> list:
    return [Accuracy(template), Format(template), Language(template), Repetition(template, size=2), Overlong(8, 4)]


PARTS = [*"4 5x的{}\\", "<answer>", "</answer>", "<think>", "</think>", "\\boxed{4}", " four "]
SUFFIXES = st.lists(st.sampled_from(PARTS), max_size=8).map("".join)


@given(st.sampled_from([row[:2] for row in HOSTILE]), SUFFIXES)
def test_no_reward_changes_by_text_after_the_end_token(row, suffix):
    template, completion = row
    for reward in rules(template):
        assert pay(reward, completion + END + suffix, grader="text") == pay(reward, completion, grader="text")


@given(st.sampled_from([text for template, text, *_ in HOSTILE if template is TAGS]), SUFFIXES)
def test_no_reward_rises_by_text_after_the_closed_answer(completion, suffix):
    """`</answer>` ends a response in R1-Zero's form. After an answer tag any text may only cost."""
    if "</answer>" not in completion:
        completion += "</answer>"
    for reward in rules(TAGS):
        assert pay(reward, completion + suffix, grader="text") <= pay(reward, completion, grader="text")


@given(SUFFIXES)
def test_accuracy_and_format_do_not_rise_after_a_boxed_answer(suffix):
    for right in ("4", "5"):
        for template, completion in ((BOXED, BOX), (PREFILLED, BOX.removeprefix("<think>"))):
            for reward in (Accuracy(template), Format(template)):
                before, after = (
                    pay(reward, text, answer=right, grader="text") for text in (completion, completion + suffix)
                )
                assert after <= before


def test_rewards_that_do_not_apply_are_none():
    for kind in ("general", "harmless"):
        assert pay(Accuracy(TAGS), GOOD, kind=kind) is None
    assert pay(Accuracy(TAGS), GOOD, answer=None) is None
    assert pay(Language(TAGS), GOOD, language=None) is None
    # General prompts have no box to fill.
    assert pay(Format(BOXED), "<think>a greeting</think> Hello !", kind="general", answer=None) == 1


@pytest.mark.parametrize(
    ("text", "language", "share"),
    [
        ("<think>two and two is four</think><answer>4</answer>", "en", 1.0),
        ("<think>two and two is four</think><answer>4</answer>", "zh", 0.0),
        ("<think>两个加两个</think><answer>4</answer>", "zh", 1.0),
        ("<think>so 所以 now</think><answer>4</answer>", "en", 0.5),
        ("<think>设 x = 2</think><answer>4</answer>", "zh", 1.0),  # a variable is no English word
        ("<think>\\frac{1}{2} 一半</think><answer>4</answer>", "zh", 1.0),  # nor is a command
        ("<think>2 + 2 = 4</think><answer>4</answer>", "en", 0.0),  # no words, no reward
        ("<think>так и есть</think><answer>4</answer>", "en", 0.0),
        ("<think>so it is</think><answer>四</answer>", "en", 0.75),
        ("<think>the ```中文中文``` end</think><answer>4</answer>", "en", 2 / 6),
        ("<think>the end ```\n中文", "en", 0.5),
        ("<think>```python\nfor x in range(4):  # 循环\n```</think><answer>4</answer>", "zh", 1.0),
        ("<think>so தமிழ</think><answer>4</answer>", "en", 0.5),
        ("<think>十分</think><answer>4</answer> many English words after the end", "zh", 1.0),
    ],
)
def test_language_reward(text, language, share):
    assert pay(Language(TAGS), text, language=language) == pytest.approx(share)


def test_language_reads_the_summary_too_unless_told_otherwise():
    text = "<think>so it is four</think> 答案 是 \\boxed{4}"
    assert pay(Language(BOXED, reads="thought"), text) == 1.0
    assert pay(Language(BOXED), text) == pytest.approx(4 / 7)
    chosen = Language(BOXED, kinds=["reasoning"])
    assert pay(chosen, text) == pytest.approx(4 / 7) and pay(chosen, text, kind="general") is None


def test_repetition_is_free_up_to_a_share_and_costs_one_at_most():
    reward = Repetition(TAGS, size=3, free=0.2)
    assert pay(reward, "one two three four five six seven") == 0
    assert pay(reward, "go on and on " * 500) == pytest.approx(-1, abs=0.01)
    assert -1 < pay(reward, "a b c d e f a b c d e f") < 0
    assert pay(reward, "好" * 2000) == pytest.approx(-1, abs=0.01)


def test_overlong_falls_linearly_to_the_limit():
    reward = Overlong(limit=10, margin=4)

    def paid(length: int) -> float:
        return reward(completions=["x"], completion_ids=[[0] * length])[0]

    assert [paid(n) for n in (0, 6, 8, 10, 50)] == [0, 0, -0.5, -1, -1]
    with pytest.raises(ValueError, match="completion_ids"):
        reward(completions=["x"])


UNITS = ["a", "go on ", "\\boxed{", "<think>", "{", "好", "```", "</think>\\boxed{4}"]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("template", [TAGS, BOXED, PREFILLED], ids=["tags", "boxed", "prefilled"])
def test_a_million_characters_take_linear_time(template, unit):
    """A quadratic rule would take hours here."""
    text = "<think>" + unit * (10**6 // len(unit))
    for reward in rules(template):
        assert -1 <= pay(reward, text, grader="text") <= 1


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="template among"):
        Accuracy("no such template")
    with pytest.raises(ValueError, match="'thought' or 'all'"):
        Language(TAGS, reads="summary")
    assert Format(TAGS, kinds=["reasoning"])(completions=["x"], answer=["4"], kind=["general"], grader=["math"]) == [
        None
    ]
    with pytest.raises(ValueError, match="list of kinds"):
        Language(TAGS, kinds="reasoning")
    with pytest.raises(ValueError, match="no 'answer'"):
        Accuracy(TAGS)(completions=["x"])
    with pytest.raises(ValueError, match="response template"):
        pay(Format(BOXED), [{"role": "assistant", "content": "4", "reasoning_content": "so"}])
    with pytest.raises(ValueError, match="messages that end with text"):
        pay(Format(BOXED), [])
    with pytest.raises(ValueError, match="grader among"):
        pay(Accuracy(TAGS), GOOD, grader="magic")
    with pytest.raises(ValueError, match="language among"):
        pay(Language(TAGS), GOOD, language="xx")
    with pytest.raises(ValueError, match="margin"):
        Overlong(4, 8)
    with pytest.raises(ValueError, match="size"):
        Repetition(TAGS, size=0)
