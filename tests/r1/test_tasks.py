"""Sources of problems: splits that do not meet, references that pass their own rules, and tables."""

from __future__ import annotations

import json
import random
import re
import sys

import pytest

from deepseek_arch.r1.problems import Problem, ProblemSet
from deepseek_arch.r1.rewards import Accuracy, Format, Language
from deepseek_arch.r1.tasks import Chains, Chat, Gym, Table, make_task, preference_pairs
from deepseek_arch.r1.tasks import gym as gym_module
from deepseek_arch.r1.tasks.chains import STYLES, Writer, translate
from deepseek_arch.r1.tasks.corpus import Corpus
from deepseek_arch.r1.templates import TEMPLATES


def reward(rule, text: str, problem: Problem):
    return rule(completions=[text], **{name: [value] for name, value in problem.columns().items()})[0]


@pytest.mark.parametrize("source", [Chains(), Chat()], ids=lambda source: source.name)
def test_problems_repeat_with_the_seed_and_splits_do_not_meet(source):
    assert isinstance(source, ProblemSet)
    assert source.draw(20, 3) == source.draw(20, 3)
    assert source.draw(20, 3) != source.draw(20, 4)
    # Everyday prompts but for descriptions: see `Chat.draw`.
    shared = {p.question for p in source.draw(900, 1) if p.data.get("topic") in ("hello", "harm", "translate")}
    train = {p.question for p in source.draw(2000, 1)} - shared
    test = {p.question for p in source.draw(2000, 2, "test")} - shared
    assert train and test and not train & test
    with pytest.raises(ValueError, match="split among"):
        source.draw(1, 0, "dev")


def test_a_walk_and_its_answer():
    data = {"start": 7, "steps": 4, "pairs": [[2, 6], [7, 2], [6, 7]]}
    problem = Chains(nodes=3)._problem(data, "en")
    assert problem.question == "Follow 2 6 , 7 2 , 6 7 . Start 7 , 4 steps ."
    assert Chains.path(data) == [7, 2, 6, 7, 2]
    assert problem.answer == "2"
    assert Chains().grade("2", problem) == 1 and Chains().grade("7", problem) == 0
    opening, steps = Chains().forced_steps(problem)
    text = opening + " .".join(before + node for before, node in steps)
    assert text == "<think> step 1 : 7 2 . step 2 : 2 6 . step 3 : 6 7 . step 4 : 7 2"
    assert Chains().full_list(text, problem)
    assert not Chains().full_list(text.replace("step 4", "step 5"), problem)


def test_right_step_lists_are_right_and_well_formed_and_wrong_ones_are_not():
    template, rng = TEMPLATES["zero-marks"], random.Random(0)
    for problem in Chains().draw(50, 0):
        writer = Writer(rng, problem.language)
        lines, node = writer.steps(problem)
        text = f"<think> {' . '.join(lines)} . </think> <answer> {node} </answer>"
        assert [reward(rule(template), text, problem) for rule in (Accuracy, Format, Language)] == [1, 1, 1]
        wrong, node = Writer(rng, problem.language, noise=1.0).steps(problem)
        assert len(wrong) == len(lines) and wrong != lines


def test_a_base_models_text_holds_every_skill_in_bad_form():
    template, rng = TEMPLATES["zero-marks"], random.Random(1)
    right = formed = mixed = 0
    for problem in Chains().draw(300, 5):
        style = rng.choices(list(STYLES), list(STYLES.values()))[0]
        text = Writer(rng, problem.language, rng.choice((1.0, 0.7, 0.5)), 0.06).response(problem, style)
        right += reward(Accuracy(template), text, problem)
        formed += reward(Format(template), text, problem)
        mixed += 0 < reward(Language(template), text, problem) < 1
    assert 100 < right < 290 and 60 < formed < 240 and mixed > 50


def test_a_corpus_can_hold_fewer_lists_of_all_steps():
    def lists(**options) -> float:
        corpus, chains = Corpus(Chains(6, 3, 5), seed=1, **options), Chains()
        found = []
        for number in range(1500):
            prompt, rest = corpus.document(number)
            steps = re.search(r"(\d+) (?:steps|步)", prompt)
            if steps:
                found.append(chains.full_list(rest, Problem("q", data={"steps": int(steps[1])})))
        return sum(found) / len(found)

    # Those that check themselves number their steps twice and do not count as lists here.
    assert lists() == pytest.approx(STYLES["steps"], abs=0.04)
    assert lists(lists=0.15) == pytest.approx(STYLES["steps"] / 2, abs=0.03)
    assert lists(lists=0.0) < 0.02
    assert Corpus(Chains(), purities=[1.0, 0.9, 0.7, 0.5]).document(3) == Corpus(Chains()).document(3)
    assert Corpus(Chains(), lists=None).document(3) == Corpus(Chains()).document(3)


def test_translation_of_thoughts_keeps_numbers_and_leaves_one_language():
    for language in ("en", "zh"):
        for problem in Chains(languages=[language]).draw(30, 2):
            lines, _ = Writer(random.Random(3), language, purity=0.3, noise=0.3).steps(problem, mend=1.0)
            text = translate(" . ".join(lines), language)
            thought = f"<think> {text} </think> <answer> 1 </answer>"
            assert reward(Language(TEMPLATES["zero-marks"]), thought, problem) == 1.0
            assert [c for c in text if c.isdigit()] == [c for c in " . ".join(lines) if c.isdigit()]


def test_chat_knows_the_quality_of_its_responses():
    chat = Chat()
    kinds = set()
    for problem in chat.draw(200, 0):
        kinds.add(problem.kind)
        responses = chat.responses(problem)
        values = [value for _, value in responses]
        assert values == sorted(values, reverse=True) and len(set(values)) == len(values) >= 2
        assert chat.quality(f" {responses[0][0]}\n", problem) == 2
        assert chat.quality("something else", problem) is None
        assert chat.grade("x", problem) is None and problem.answer is None
    assert kinds == {"general", "harmless"}
    assert {p.kind for p in Chat(kinds=["general"]).draw(50, 0)} == {"general"}


def test_everyday_tests_ask_for_nothing_that_cannot_be_known():
    drawn = {split: {p.question for p in Chat().draw(1000, 3, split)} for split in ("train", "test")}
    told = {split: {q for q in questions if q.startswith(("Tell", "说说"))} for split, questions in drawn.items()}
    assert not told["train"] & told["test"] and len(told["test"]) >= 10
    # A description has words of others; a translation that was never shown has nothing to be told from.
    assert drawn["test"] - told["test"] <= drawn["train"]
    assert any(q.startswith("Translate") for q in drawn["test"])


def test_preference_pairs_are_ordered_but_for_the_share_of_errors():
    chat = Chat()
    pairs = preference_pairs(chat, 400, 0, wrong=0.1)
    right = sum(chat.quality(chosen, p) > chat.quality(rejected, p) for p, chosen, rejected in pairs)
    assert 330 <= right <= 385


def test_garbled_responses_are_rejected_for_what_they_were():
    chat = Chat()
    pairs = preference_pairs(chat, 400, 0, wrong=0.0, garbled=0.5)
    garbled = [(p, chosen, rejected) for p, chosen, rejected in pairs if chat.quality(rejected, p) is None]
    assert 160 <= len(garbled) <= 240
    assert all(chosen != rejected and chat.quality(chosen, p) >= 0 for p, chosen, rejected in garbled)
    assert preference_pairs(chat, 50, 0) == preference_pairs(chat, 50, 0, garbled=0.0)


def rows(count: int) -> list[dict]:
    return [{"problem": f"What is {i} + 1 ?", "answer": str(i + 1)} for i in range(count)]


def test_tables_split_by_question_and_start_anew():
    table = Table(rows(100), test_share=0.2)
    train, test = ({p.question for p in table.draw(100, 0, split)} for split in ("train", "test"))
    assert not train & test and len(train | test) == 100 and 5 < len(test) < 40
    assert len(table.draw(250, 0)) == 250
    assert table.grade("5", table.draw(1, 0)[0]) in (0.0, 1.0)


def test_tables_from_files_and_solutions(tmp_path):
    file = tmp_path / "a.jsonl"
    lines = [
        {"q": "a ?", "s": "First 2 + 2.\n#### 4", "l": "en"},
        {"q": "b ?", "s": "so \\boxed{3} hence \\boxed{\\frac{1}{2}} .", "l": "zh"},
        {"q": "c ?", "s": 7, "l": "en"},
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    table = make_task("jsonl", {"path": file, "question": "q", "answer": "s", "language": "{l}", "test_share": 0})
    found = {p.question: (p.answer, p.language) for p in table.draw(3, 0)}
    assert found == {"a ?": ("4", "en"), "b ?": ("\\frac{1}{2}", "zh"), "c ?": ("7", "en")}
    file.write_text("{}\nnot json\n")
    with pytest.raises(ValueError, match="in line 2"):
        Table.from_jsonl(file)


def test_data_sets_of_the_hub_are_read_from_a_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows(5)).to_json(str(tmp_path / "train.jsonl"))
    table = make_task("dataset", {"path": str(tmp_path), "test_share": 0})
    assert len({p.question for p in table.draw(5, 0)}) == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Table([]), "at least one row"),
        (lambda: Table([{"problem": "x ?"}]), "column 'answer'"),
        (lambda: Table([{"problem": "x ?", "answer": None}]), "an answer in column"),
        (lambda: Table([{"problem": "x ?", "answer": " "}]), "an answer in column"),
        (lambda: Table(rows(3), grader="magic"), "grader among"),
        (lambda: Table(rows(3), test_share=1.0), "test_share"),
        (lambda: Table(rows(3), test_share=0.0).draw(1, 0, "test"), "test split"),
        (lambda: Chains(nodes=11), "2 to 10 nodes"),
        (lambda: Chains(low=3, high=2), "low <= high"),
        (lambda: Chains(languages=["fr"]), "languages among"),
        (lambda: Chat(kinds=["reasoning"]), "kinds"),
        (lambda: Corpus(Chains(), lists=1.0), "lists in"),
        (lambda: Corpus(Chains(), purities=[]), "purities in"),
        (lambda: Corpus(Chains(), general=0.9), "general in"),
        (lambda: Corpus(Chains(), purities=[0.5, 1.1]), "purities in"),
        (lambda: Corpus(Chains(), "steps", purities=[0.5]), "None without text 'mixture'"),
        (lambda: Corpus(Chains(), "steps", lists=0.5), "None without text 'mixture'"),
        (lambda: make_task("magic"), "task among"),
        (lambda: make_task("chains", {"hops": 3}), "options of the task"),
        (lambda: Problem(" "), "question with text"),
        (lambda: Problem("x", answer=3), "string or None"),
        (lambda: Problem("x", kind="fun"), "kind among"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# A data set as reasoning-gym makes them, with its scores for answers that are not quite right.
LIBRARY = """
import os, random, time

class Sums:
    def __init__(self, size, seed):
        self.size, self.seed = size, seed

    def __getitem__(self, i):
        a = random.Random(f"{self.seed} {i}").randrange(1000)
        return {"question": f"{a} + 1 = ?", "answer": None if a % 2 else str(a + 1), "metadata": {"a": a}}

    def score_answer(self, answer, entry):
        right = str(entry["metadata"]["a"] + 1)
        if answer == "sleep":
            time.sleep(60)
        if answer == "end":
            os._exit(0)
        if answer == "write":
            with open(os.environ["WRITTEN"], "w") as file:
                file.write("text")
            return 1.0
        if answer == "raise":
            raise SystemExit
        return 1.0 if answer in (right, "any") else 0.07 if right in answer else 0.01

def create_dataset(name, **options):
    if name != "sums":
        raise ValueError(f"Dataset '{name}' not registered")
    return Sums(**options)
"""


@pytest.fixture
def library(monkeypatch, tmp_path):
    (tmp_path / "reasoning_gym.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "reasoning_gym", raising=False)
    gym_module._process.close()
    yield tmp_path
    gym_module._process.close()
    sys.modules.pop("reasoning_gym", None)


def test_gym_pays_for_full_scores_only(library):
    gym = Gym("sums")
    train, test = gym.draw(40, 0), gym.draw(40, 1, "test")
    assert not {p.question for p in train} & {p.question for p in test}
    rule = Accuracy(TEMPLATES["r1-marks"], problems=gym)
    for problem in train:
        right = problem.data["entry"]["metadata"]["a"] + 1
        assert reward(rule, f"<think>so</think> \\boxed{{{right}}}", problem) == 1
        assert reward(rule, f"<think>so</think> \\boxed{{about {right}}}", problem) == 0
        assert reward(rule, "<think>so</think> nothing", problem) == 0
    with pytest.raises(ValueError, match="data set of reasoning-gym"):
        Gym("magic")


@pytest.mark.parametrize("answer", ["sleep", "end", "write", "raise"])
def test_gym_scores_in_a_process_of_its_own(library, monkeypatch, answer):
    written = library / "written"
    monkeypatch.setenv("WRITTEN", str(written))
    gym = Gym("sums")
    problem = gym.draw(1, 0)[0]
    assert gym.grade("any", problem) == 1.0  # it has started
    with monkeypatch.context() as patch:
        patch.setattr(gym_module._process, "seconds", 1.0)
        assert gym.grade(answer, problem) == 0.0
    assert not written.exists() or not written.read_text()
    assert gym.grade("any", problem) == 1.0


def test_gym_whose_library_does_not_start_says_so(library):
    gym = Gym("sums")
    (library / "reasoning_gym.py").write_text("raise ImportError")
    with pytest.raises(RuntimeError, match="expected reasoning-gym to start in a process of its own"):
        gym.grade("1", Problem("?", "7", grader="gym", data={"entry": {}}))


@pytest.mark.parametrize(
    "answer",
    ["__import__('os').getpid()", "eval('7')", "open ('x', 'w')", "sympify(chr(55))", "(lambda: 7)()", "9**9**9**9",
     "9**(9**9)", "7" + " " * 30_000],
)  # fmt: skip
def test_gym_scores_no_answer_that_would_run_as_a_program(monkeypatch, answer):
    """Scores like countdown's evaluate the answer."""
    gym = object.__new__(Gym)
    gym.dataset, gym.options = "sums", {}
    monkeypatch.setattr(gym_module._process, "judge", lambda *arguments: True)
    problem = Problem("?", "7", grader="gym", data={"entry": {}})
    assert gym.grade(answer, problem) == 0.0
    for harmless in ("(3 + 4) * 2**3", "input: 5 __ 3", "open the door", "max(3, 4)"):
        assert gym.grade(harmless, problem) == 1.0


def test_gym_without_reasoning_gym_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match="pip install reasoning-gym"):
        Gym("chain_sum")


@pytest.mark.parametrize("dataset", ["chain_sum", "countdown", "knights_knaves"])
def test_gym_itself(dataset):
    pytest.importorskip("reasoning_gym")
    gym = Gym(dataset)
    problems = gym.draw(4, 0) + gym.draw(2, 0, "test")
    assert len({p.question for p in problems}) == 6
    for problem in problems:
        if problem.answer:
            assert gym.grade(problem.answer, problem) == 1
        assert gym.grade("nothing", problem) == 0
