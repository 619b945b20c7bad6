"""Measures of a policy, by hand-made policies whose numbers are known."""

from __future__ import annotations

import math
import random

import pytest
import torch

from deepseek_arch.r1.evaluation import (
    EvaluationSettings,
    evaluate,
    evaluate_general,
    expert_violation,
    mean_interval,
    mtp_acceptance,
    reflections,
    vote,
)
from deepseek_arch.r1.gate import Gate, GateError, measure, step_accuracy
from deepseek_arch.r1.rollouts import Rollout, Sampling
from deepseek_arch.r1.tasks import Chains, Chat, Table
from deepseek_arch.r1.templates import TEMPLATES

TASK = Chains(nodes=4, low=2, high=3)
ZERO, R1 = TEMPLATES["zero-marks"], TEMPLATES["r1-marks"]


class Scripted:
    """A policy that answers with what `respond(question, number)` gives; a token is a character."""

    end_tokens, pad_token = (0,), 1

    def __init__(self, respond, routing=None, drafts=((4, 3),)):
        self.respond, self.routing, self.drafts, self.asked = respond, routing, drafts, []

    def encode(self, prompt):
        return [ord(c) for c in prompt]

    def decode(self, ids):
        return "".join(chr(i) for i in ids if i != 0)

    def sample(self, prompts, sampling, record_routing=False):
        self.asked.append((len(prompts), sampling))
        texts = [self.respond("".join(map(chr, prompt)), i) for i, prompt in enumerate(prompts)]
        rollout = Rollout(list(prompts), [[*self.encode(text), 0] for text in texts], [True] * len(texts))
        if sampling.mtp_depth:
            rollout.drafted, rollout.accepted = map(list, zip(*self.drafts, strict=True))
        if record_routing:
            rollout.routing = [self.routing] * len(texts)
        return rollout

    def predict(self, rows):
        return [[*row[1:], 0] for row in rows]


def solver(share_right: float):
    """Right in this share of the problems, in all of their samples."""
    problems = {ZERO.prompt(p.question): p for split in ("train", "test") for p in TASK.draw(400, 999, split)}

    def respond(prompt, number):
        problem = problems[prompt]
        right = (sum(map(ord, problem.question)) % 100) / 100 < share_right
        answer = problem.answer if right else str((int(problem.answer) + 1) % 10)
        word = "step" if problem.language == "en" else "步"
        return f"<think> {word} {word} wait </think> <answer> {answer} </answer>"

    return respond


def test_the_interval_is_over_problems():
    found = mean_interval([1.0, 0.0, 1.0, 0.0])
    # The sample variance of two ones and two zeros is 1/3.
    assert found.mean == 0.5 and found.half_width == pytest.approx(1.96 * math.sqrt(1 / 3 / 4))
    assert mean_interval([0.25]).half_width == math.inf
    with pytest.raises(ValueError, match="at least one problem"):
        mean_interval([])


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng, hits = random.Random(1), 0
    for _ in range(1000):
        found = mean_interval([float(rng.random() < 0.4) for _ in range(200)])
        hits += abs(found.mean - 0.4) <= found.half_width
    # 950 expected, with a standard deviation of 7.
    assert 915 <= hits <= 985


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["3", "4", "3"], "3"),
        (["4", "3"], "4"),
        (["1/2", "0.5", "3", None], "1/2"),
        ([" Yes", "yes ", "no"], " Yes"),
        ([None, None], None),
        ([], None),
        ([None, None, "7"], "7"),
    ],
)
def test_votes(answers, winner):
    assert vote(answers) == winner


def test_reflections_are_words_and_not_parts_of_them():
    assert reflections("Wait , let me check . However , 等等 , 检查") == 5
    assert reflections("checking waiter butter") == 0


def test_an_evaluation_measures_what_it_says():
    policy = Scripted(solver(0.5))
    found = evaluate(policy, TASK, ZERO, EvaluationSettings(200, 3, max_new_tokens=77))
    questions = [p.question for p in TASK.draw(200, 999, "test")]
    expected = sum((sum(map(ord, q)) % 100) / 100 < 0.5 for q in questions) / 200
    assert found.pass_at_1.mean == found.voted == found.any_right == found.strict == pytest.approx(expected)
    assert found.pass_at_1.count == 200 and found.samples == 3 and found.formatted == 1.0 and found.ended == 1.0
    assert found.reflections == 1.0 and found.consistency < 1
    ((count, sampling),) = policy.asked
    assert count == 600 and (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (0.6, 0.95, 77)
    assert len(found.transcripts) == 20 and found.transcripts[0].question == questions[0]
    assert "transcripts" not in found.to_dict()


def test_pass_at_1_is_the_mean_of_samples_and_the_vote_is_not():
    def respond(prompt, number):  # two of three samples are right
        problem = by_prompt[prompt]
        answer = problem.answer if number % 3 else str((int(problem.answer) + 1) % 10)
        return f"<answer> {answer} </answer>"

    by_prompt = {ZERO.prompt(p.question): p for p in TASK.draw(20, 999, "test")}
    found = evaluate(Scripted(respond), TASK, ZERO, EvaluationSettings(20, 3))
    assert found.pass_at_1.mean == pytest.approx(2 / 3) and found.pass_at_1.half_width == pytest.approx(0)
    assert found.voted == found.any_right == 1.0 and found.strict == found.formatted == 0.0
    assert found.consistency is None


def test_thoughts_and_summaries_are_read_for_their_language_apart():
    def respond(prompt, number):
        return "<think> step 1 : 4 步 </think> 答案 是 \\boxed{ 4 } ."

    english = Chains(languages=("en",))
    found = evaluate(Scripted(respond), english, TEMPLATES["r1-marks"], EvaluationSettings(8))
    assert (found.consistency, found.summary_consistency) == (0.5, 0.0)


def test_evaluations_that_mean_nothing_are_refused():
    for changes, message in (
        ({"temperature": 0.0}, "above 0, got 0.0: greedy"),
        ({"problems": 0}, "problems >= 1"),
        ({"samples": 0}, "samples >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            EvaluationSettings(**changes)
    with pytest.raises(ValueError, match="task with answers, got 'chat'"):
        evaluate(Scripted(lambda *_: ""), Chat(), ZERO)


def test_everyday_responses_are_looked_up():
    chat = Chat()
    by_prompt = {R1.prompt(p.question): p for p in chat.draw(100, 999, "test")}

    def best(prompt, number):
        return "<think> a thought </think> " + chat.responses(by_prompt[prompt])[0][0]

    found = evaluate_general(Scripted(best), chat, R1, EvaluationSettings(100))
    assert found.quality.mean == 2.0 and found.known == 1.0 and found.refused == 1.0
    worst = evaluate_general(Scripted(lambda *_: "<think> and so on"), chat, R1, EvaluationSettings(100))
    assert worst.quality.mean == -1.0 and worst.known == 0.0 and worst.refused == 0.0


def test_expert_violation_is_of_the_worst_layer():
    balanced = torch.tensor([[0, 1], [2, 3]])
    routing = torch.stack([balanced, torch.tensor([[0, 1], [0, 1]])], 1)  # [T = 2, L = 2, K = 2]
    policy = Scripted(lambda *_: "a", routing)
    assert expert_violation(policy, [[5]], Sampling(4), 4) == pytest.approx(1.0)
    policy.routing = balanced[:, None]
    assert expert_violation(policy, [[5]], Sampling(4), 4) == 0.0


def test_acceptance_is_by_position():
    policy = Scripted(lambda *_: "a", drafts=((4, 3), (2, 1), (0, 0)))
    assert mtp_acceptance(policy, [[5]], Sampling(4), 3) == [0.75, 0.5, None]
    assert policy.asked[0][1].mtp_depth == 3


def test_the_gate_measures_steps_and_lists():
    problems = {ZERO.prompt(p.question): p for p in TASK.draw(8, 555)}

    def lists(prompt, number):  # one sample in four lists all steps, and one all of them to a wrong answer
        thought, answer = TASK.solve(problems[prompt])
        answer = answer if number % 4 == 0 else "none"
        return f"<think> {thought} </think> <answer> {answer} </answer>" if number % 4 < 2 else "so"

    policy = Scripted(lists)
    gate = Gate(steps=0.9, full_lists=0.25, pass_at=1.0, samples=4, problems=8)
    found = measure(policy, TASK, ZERO, gate, 64)
    assert found.steps == 1.0 and found.full_lists == 0.25 and found.pass_at == 1.0
    for changes, message in (
        ({"full_lists": 0.3}, r"full_lists 0.250 < 0.3"),
        ({"samples": 1, "pass_at": 1.0, "full_lists": 0.5}, "full_lists 0.250 < 0.5"),
    ):
        with pytest.raises(GateError, match=message):
            measure(Scripted(lists), TASK, ZERO, Gate(**({"samples": 4, "problems": 8} | changes)), 64)

    class Chance(Scripted):
        def predict(self, rows):
            return [[ord("x")] * len(row) for row in rows]

    with pytest.raises(GateError, match=r"got steps 0.000 < 0.9: train it longer"):
        measure(Chance(lists), TASK, ZERO, gate, 64)
    assert step_accuracy(Chance(lists), list(problems.values()), ZERO, TASK.forced_steps) == 0.0


def test_a_task_without_steps_is_gated_by_its_samples_alone():
    table = Table([{"problem": f"What is {i} plus 1?", "answer": str(i + 1)} for i in range(40)])
    policy = Scripted(lambda *_: "<think> so </think> <answer> 7 </answer>")
    with pytest.raises(GateError, match=r"pass@16 0\.0"):
        measure(policy, table, ZERO, Gate(problems=16), 64)
    found = measure(policy, table, ZERO, Gate(problems=16, pass_at=None), 64)
    assert found.steps is None and found.full_lists is None


@pytest.mark.parametrize("changes", [{"steps": 1.5}, {"pass_at": -0.1}, {"samples": 0}])
def test_gates_that_mean_nothing_are_refused(changes):
    with pytest.raises(ValueError, match="expected"):
        Gate(**changes)
