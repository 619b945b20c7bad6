"""`deepseek-arch r1 ...`: a run of one stage from the command line, and what it says about mistakes."""

from __future__ import annotations

import io
import json
import sys

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")
pytest.importorskip("yaml")

from deepseek_arch.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
COMMAND = ("r1",)
COMMANDS = ("run", "stage", "eval", "collect", "report", "recipes", "plan", "chat", "serve")
TASK = ("--option", "nodes=4", "--option", "low=2", "--option", "high=3")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The first stage of the smoke recipe, run by the command."""
    out = tmp_path_factory.mktemp("run")
    with pytest.raises(SystemExit) as stopped:
        main(["r1", "run", "smoke", "--out", str(out), "--until", "base", "--quiet", "--seed", "3"])
    assert not stopped.value.code
    return out


def test_help_names_every_command(cli):
    code, out, _ = cli("--help")
    assert code == 0 and all(f" {command} " in out for command in COMMANDS)
    for command in COMMANDS:
        assert cli(command, "--help")[0] == 0


def test_recipes_are_listed(cli):
    code, out, _ = cli("recipes", "--json")
    listed = {recipe["name"]: recipe for recipe in json.loads(out)}
    assert code == 0 and {"box", "smoke", "deepseek-v3", "moonlight", "qwen-0.5b"} <= set(listed)
    assert "zero" in listed["box"]["stages"] and "box" in cli("recipes")[1]


def test_plans_are_printed(cli):
    code, out, _ = cli("plan", "qwen-0.5b", "--json")
    assert code == 0 and [plan["stage"] for plan in json.loads(out)] == ["data", "distill", "student_rl"]
    code, out, _ = cli("plan", "qwen-0.5b")
    assert code == 0 and "device hours" in out
    code, _, err = cli("plan", "smoke")
    assert code == 1 and "with a plan" in err


def test_a_run_is_gone_on_with_and_reported(cli, base):
    code, out, _ = cli("run", "smoke", "--out", base, "--until", "base", "--quiet", "--seed", "3")
    assert code == 0 and "base: done before" in out and str(base / "REPORT.md") in out
    (base / "REPORT.md").unlink()
    code, out, _ = cli("report", base, "--recipe", "smoke")
    assert code == 0 and (base / "REPORT.md").read_text(encoding="utf-8").startswith("# smoke")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--seed", "4"), "seed: 3 there, 4 now"),
        (("--seed", "3", "--set", "base.vocab_size=390"), "vocab_size: 400 there, 390 now"),
        (("--seed", "3", "--set", "base.vocab=390"), "got 'vocab'; did you mean 'vocab_size'"),
        (("--seed", "3", "--until", "nought"), "expected a stage among base, zero"),
    ],
)
def test_runs_that_cannot_be(cli, base, args, message):
    code, _, err = cli("run", "smoke", "--out", base, "--quiet", *args)
    assert code == 1 and message in err
    assert cli("run", "nought")[0] == 1


def test_a_checkpoint_is_measured(cli, base):
    model = base / "base" / "model"
    args = (model, "--template", "zero-marks", *TASK, "--problems", 6, "--samples", 2, "-n", 12)
    code, out, _ = cli("eval", *args, "--json")
    found = json.loads(out)
    assert code == 0 and found["reasoning"]["pass_at_1"]["count"] == 6 and found["reasoning"]["samples"] == 2
    assert {"mtp_acceptance", "max_violation"} <= set(found)
    code, out, _ = cli("eval", *args)
    assert code == 0 and "of 6 problems" in out and "drafts" in out
    for change, message in (
        (("--temperature", "0"), "above 0, got 0.0: greedy"),
        (("--task", "nought"), "expected a task among"),
        (("--template", "nought"), "expected a template among"),
    ):
        code, _, err = cli("eval", *args, *change)
        assert code == 1 and message in err
    assert cli("eval", model, "--option", "nodes")[0] == 2
    code, _, err = cli("eval", base, *TASK)
    assert code == 1 and err


def test_what_no_sample_is_good_enough_for(cli, base, tmp_path):
    args = ("--template", "zero-marks", *TASK, "--problems", 3, "--samples", 1, "-n", 8, "--out", tmp_path / "rows")
    code, _, err = cli("collect", base / "base" / "model", *args)
    assert code == 1 and "at least one sample to keep, got none of 3: {'samples': {'wrong': 3}}" in err


def test_a_stage_runs_from_its_file(cli, base, tmp_path):
    file = tmp_path / "sft.yaml"
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"question": "q", "prompt": "q", "completion": f" {i} ."}) + "\n" for i in range(8))
    )
    file.write_text(
        f"kind: finetune\nstart_from: {base / 'base'}\ndata_from: {tmp_path / 'rows.jsonl'}\nuse_cpu: true\n"
        "bf16: false\nmax_steps: 1\nsave_strategy: 'no'\nevaluation: {problems: 2, max_new_tokens: 8}\n"
    )
    code, out, _ = cli("stage", "sft", "--config", file, "--out", tmp_path / "sft", "--quiet", "--set", "max_steps=2")
    assert code == 0 and str(tmp_path / "sft") in out
    assert json.loads((tmp_path / "sft" / "metrics.json").read_text())["steps_trained"] == 2
    code, _, err = cli("stage", "sft", "--config", file, "--out", tmp_path / "sft", "--quiet")
    assert code == 1 and "fields.max_steps: 2 there, 1 now" in err


def test_a_chat_goes_on_until_its_input_ends(cli, base, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello !\n\nFollow 1 2 .\n"))
    code, out, _ = cli("chat", base / "base" / "model", "-n", 6, "--seed", 1)
    assert code == 0 and out.count("\n") >= 2
