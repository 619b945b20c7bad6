"""The whole recipe for a few steps: every stage runs, a killed run ends as an uninterrupted one, mistakes are told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")
pytest.importorskip("yaml")

from deepseek_arch.r1.pipeline import load_recipe, recipes, run, run_single, runner, write_report
from deepseek_arch.r1.pipeline.recipe import RECIPES, read_yaml
from deepseek_arch.r1.pipeline.runner import check_recipe
from deepseek_arch.r1.stages import STAGES, Policy, context, training
from deepseek_arch.r1.stages.checking import check_stage

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

RESULTS = ("metrics.json", "log.jsonl", "samples.jsonl", "data.jsonl", "model/model.safetensors")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """All stages, with the CPU seconds that they took."""
    out = tmp_path_factory.mktemp("smoke")
    said, started = [], time.process_time()
    outcomes = run(load_recipe("smoke"), out, say=said.append)
    return {"out": out, "outcomes": outcomes, "said": said, "seconds": time.process_time() - started}


def metrics(out: Path, stage: str) -> dict:
    return json.loads((out / stage / "metrics.json").read_text(encoding="utf-8"))


def test_every_stage_runs(smoke):
    recipe = load_recipe("smoke")
    assert {fields["kind"] for fields in recipe.stages.values()} == set(STAGES)
    assert [outcome.stage for outcome in smoke["outcomes"]] == list(recipe.stages)
    assert not any(outcome.skipped for outcome in smoke["outcomes"])
    assert smoke["seconds"] < 90  # of this process's cores, which other processes cannot add to
    for outcome in smoke["outcomes"]:
        names = {path.name for path in outcome.folder.iterdir()}
        assert {"manifest.json", "metrics.json", "timing.json"} <= names
        assert not {"work", "started.json"} & names
        model = recipe.stages[outcome.stage]["kind"] != "collect"
        assert ("model" in names) == model and ("data.jsonl" in names) != model
    assert len(smoke["said"]) == 2 * len(recipe.stages)


def test_models_are_written_in_the_published_layout(smoke):
    import deepseek_arch as da
    from deepseek_arch.checkpoint import inspect_checkpoint

    folder = smoke["out"] / "align" / "model"
    assert inspect_checkpoint(folder).ok
    model = da.load(folder)
    assert len(model.mtp) == 1
    policy = Policy.load(folder)
    assert policy.decode(policy.encode("<think> 步 </think>")) == "<think> 步 </think>"
    moved = metrics(smoke["out"], "zero")
    assert moved["steps_trained"] == 2 and 0 <= moved["mtp_acceptance"] <= 1 and moved["max_violation"] >= 0


def test_stages_start_from_what_they_say(smoke):
    from safetensors.torch import load_file

    def weights(stage):
        return load_file(smoke["out"] / stage / "model" / "model.safetensors")

    base, zero, cold = weights("base"), weights("zero"), weights("cold_start")
    name = "model.layers.0.self_attn.o_proj.weight"
    assert (base[name] != cold[name]).any()
    # Trained on nothing: no reward was paid, and Adam without gradients moves nothing.
    assert (base[name] == zero[name]).all()
    assert set(base) == set(cold) and "model.embed_tokens.weight" in weights("distill")


def test_the_report_has_every_stage(smoke):
    text = (smoke["out"] / "REPORT.md").read_text(encoding="utf-8")
    for part in ("# smoke", "## Stages", "## Reward models", "## Collected data", "AIME 2024", "## Transcripts"):
        assert part in text
    for name in load_recipe("smoke").stages:
        assert f"\n| {name} |" in text, name
    assert "### zero" in text and "| 2 | 0." in text
    results = json.loads((smoke["out"] / "results.json").read_text(encoding="utf-8"))
    assert results["recipe"] == "smoke" and list(results["stages"]) == list(load_recipe("smoke").stages)
    assert results["stages"]["zero"]["metrics"] == metrics(smoke["out"], "zero")
    assert [point["step"] for point in results["stages"]["zero"]["curve"]] == [0, 1, 2]
    alone = write_report(smoke["out"])
    assert alone.read_text(encoding="utf-8").startswith("# Results")
    with pytest.raises(ValueError, match="at least one stage"):
        write_report(smoke["out"] / "base")


def test_the_preference_reward_comes_in_late(smoke):
    log = [json.loads(line) for line in (smoke["out"] / "align" / "log.jsonl").read_text().split("\n") if line]
    paid = [entry["rewards/helpful/mean"] for entry in log if "rewards/helpful/mean" in entry]
    assert len(paid) == 2 and paid[0] is None and paid[1] is not None


def test_curves_show_the_preference_models_score_beside_the_quality(smoke):
    results = json.loads((smoke["out"] / "results.json").read_text(encoding="utf-8"))
    curve = results["stages"]["hacked"]["curve"]
    assert [point["step"] for point in curve] == [0, 1, 2, 3]
    assert all(-2 <= point["quality"] <= 2 and point["score"] == point["score"] for point in curve)
    assert curve[-1]["quality"] == results["stages"]["hacked"]["metrics"]["general"]["quality"]["mean"]
    assert "score" not in results["stages"]["zero"]["curve"][0]


def test_a_finished_run_is_left_alone(smoke):
    before = {path: path.stat().st_mtime_ns for path in smoke["out"].rglob("*.safetensors")}
    outcomes = run(load_recipe("smoke"), smoke["out"], say=lambda line: None)
    assert all(outcome.skipped for outcome in outcomes)
    assert before == {path: path.stat().st_mtime_ns for path in smoke["out"].rglob("*.safetensors")}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a copy of this process")
def test_a_run_that_is_killed_again_and_again_ends_as_an_uninterrupted_one(smoke, tmp_path):
    """Killed before the fifth, ninth, thirteenth, fifth ... file or checkpoint; each time the same call goes on."""
    recipe = load_recipe("smoke")
    kills = 0
    for _ in range(40):
        process = os.fork()
        if not process:
            _run_and_die(recipe, tmp_path, 5 + 4 * (kills % 3))
        status = os.waitpid(process, 0)[1]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        kills += 1
    assert kills >= 5 and (tmp_path / "cold_start" / "manifest.json").is_file()
    for stage in ("base", "zero", "cold_data", "cold_start", "reason"):
        for name in RESULTS:
            first, second = smoke["out"] / stage / name, tmp_path / stage / name
            assert first.is_file() == second.is_file()
            if first.is_file():
                assert first.read_bytes() == second.read_bytes(), f"{stage}/{name}"


def _run_and_die(recipe, out, after):
    """Runs in a process of its own, which kills itself before the write number `after`."""
    left = [after]

    def counted(function):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    try:
        context._write = counted(context._write)
        training.MarkComplete.on_save = counted(training.MarkComplete.on_save)
        runner.shutil.rmtree = counted(shutil.rmtree)
        run(recipe, out, until="reason", say=lambda line: None)
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def test_a_phase_that_ended_early_is_not_trained_on_after_a_kill(tmp_path, monkeypatch):
    """Killed between the checkpoint of its last step and the note that it is done."""
    fields = dict(load_recipe("smoke").stages["base"])
    fields["phases"] = [fields["phases"][0] | {"max_steps": 4, "until_steps": 0.0}]  # reached at the first look

    def killed(policy, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Policy, "save", killed)
        run_single("base", fields, tmp_path / "killed")
    assert (tmp_path / "killed" / "work" / "phase-0" / "checkpoint-1").is_dir()
    for name in ("killed", "whole"):
        run_single("base", fields, tmp_path / name)
    assert '"step": 1' in (tmp_path / "whole" / "log.jsonl").read_text()
    for name in RESULTS:
        if name != "data.jsonl":
            assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("changes", "seed", "message"),
    [
        (["zero.learning_rate=1e-2"], None, "stage 'zero'.*learning_rate: 0.001 there, 0.01 now"),
        ([], 1, "stage 'base'.*seed: 0 there, 1 now"),
        (["base.vocab_size=390"], None, "stage 'base'.*vocab_size: 400 there, 390 now"),
    ],
)
def test_results_of_another_configuration_are_not_mixed(smoke, changes, seed, message):
    with pytest.raises(ValueError, match=message):
        run(load_recipe("smoke", changes, seed), smoke["out"], say=lambda line: None)


def test_a_later_start_needs_what_is_before(smoke, tmp_path):
    recipe = load_recipe("smoke")
    with pytest.raises(ValueError, match="stage 'base' to be done before 'zero'"):
        run(recipe, tmp_path, first="zero")
    assert [o.stage for o in run(recipe, smoke["out"], "helpful", "data", say=lambda line: None)] == [
        "data", "finetune", "helpful"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="'data' to come before 'zero'"):
        run(recipe, smoke["out"], "zero", "data")
    with pytest.raises(ValueError, match=r"stage among base, .*, got 'nought'"):
        run(recipe, tmp_path, "nought")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("zero.max_stps=3", "'max_stps'; did you mean 'max_steps'"),
        ("zero.gate.stps=0.5", "fields in gate, got 'stps'; did you mean 'steps'"),
        ("zero.reward_funcs=[accuracy, helpful]", "rewards among accuracy, format, .*, got 'helpful'"),
        ("zero.template=none", "template among zero, .*, got 'none'"),
        ("zero.kind=train", "kind among pretrain, .*, got 'train'"),
        ("zero.start_from=reason", "inputs of stage 'zero' before it, got 'reason' behind it"),
        ("zero.start_from=nowhere", "inputs of stage 'zero' among base or paths, got 'nowhere'"),
        ("zero.task={name: chains, nods: 3}", "options of the task 'chains'"),
        ("zero.evaluation.temperature=0", "temperature above 0, got 0"),
        ("zero.output_dir=elsewhere", "known fields in stage 'zero', got 'output_dir'"),
        ("collect.x=1", "stage among base, .*, got 'collect'"),
        ("zero.max_steps", "stage.field=value, got 'zero.max_steps'"),
        ("zero.num_generations=1", "stage 'zero' that can be run: .*(at least 2|greater than 1)"),
        ("zero.num_generations=7", "stage 'zero' that can be run: .*divisible"),
        ("zero.max_steps=0", "stage 'zero' that can be run: expected max_steps >= 1"),
        ("zero.learning_rate=much", "expected a number for learning_rate, got 'much'"),
        ("zero.rollout_engine=hf", "stage 'zero' that can be run: expected rollout_engine='native'"),
        ("zero.reward_options={format: {size: 1}}", "stage 'zero' that can be run: .*'size'"),
        ("zero.reward_funcs=[]", "at least one reward"),
        ("zero.reward_weights=[1.0]", "a weight for each of 2 rewards, got 1"),
        ("zero.lora={ranks: 1}", "stage 'zero' that can be run: .*'ranks'"),
        ("zero.task={name: chat}", "a task with answers, got 'chat'"),
        ("zero.task={name: jsonl, path: /nowhere/x.jsonl}", "nowhere"),
        ("align.judges.helpful.size=1", "options of the reward 'helpful', got 'size'"),
        ("base.model.hiden_size=1", "stage 'base' that can be run: .*'hiden_size'"),
        ("base.phases=[{trainer: {learning_rates: 1}}]", "stage 'base' that can be run: .*learning_rates"),
        ("student.model.hiden_size=1", "fields of Qwen2Config, got 'hiden_size'"),
        ("distill.num_train_epochs=some", "a number for num_train_epochs, got 'some'"),
        ("zero.seed=some", "seed that is an integer in stage 'zero', got 'some'"),
    ],
)
def test_mistakes_in_a_recipe_are_told_before_anything_is_trained(tmp_path, change, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(load_recipe("smoke", [change]), tmp_path / "out")
    assert not (tmp_path / "out" / "base").exists()


def test_a_gate_refuses_a_base_that_cannot_do_single_steps(smoke, tmp_path):
    fields = dict(load_recipe("smoke").stages["zero"]) | {
        "gate": {"samples": 2, "problems": 4},
        "start_from": str(smoke["out"] / "base"),
    }
    with pytest.raises(ValueError, match=r"got steps 0\.\d+ < 0.9, full_lists 0.000 < 0.03, pass@2 0.000 < 0.5"):
        run_single("zero", fields, tmp_path / "zero")


def test_full_disks_and_second_runs_are_told(smoke, tmp_path, monkeypatch):
    import fcntl

    with open(smoke["out"] / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="one run at a time"):
            run(load_recipe("smoke"), smoke["out"])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(runner.shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(OSError, match=r"at least 256 MiB free for .*, got 1"):
        run(load_recipe("smoke"), tmp_path)


def test_yaml_reads_numbers_as_they_are_meant(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: 3e-6\nb: 1e5\nc: 3.0e-6\nd: 3\ne: e3\nf: 12e\n")
    assert read_yaml(path) == {"a": 3e-6, "b": 1e5, "c": 3e-6, "d": 3, "e": "e3", "f": "12e"}
    for text, message in (("a: 1\na: 2\n", "got 'a' twice"), ("- 1\n", "got list"), ("a: [\n", "expected YAML")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_yaml(path)


@pytest.mark.parametrize("name", recipes())
def test_every_shipped_recipe_is_whole(name):
    recipe = load_recipe(name)
    check_recipe(recipe)
    files = {path.stem for path in (RECIPES / name).glob("*.yaml")} - {"pipeline"}
    assert files == set(recipe.stages) and recipe.about


@pytest.mark.parametrize("name", ["box", "smoke"])  # the others are for GPUs
def test_the_values_of_recipes_for_processors_pass_the_checks(name, tmp_path):
    for stage, fields in load_recipe(name).stages.items():
        check_stage(stage, fields, tmp_path / stage, 0)
    assert not any(tmp_path.iterdir())


def test_a_stage_runs_on_two_processes(smoke, tmp_path):
    pytest.importorskip("accelerate")
    fields = dict(load_recipe("smoke").stages["zero"]) | {"start_from": str(smoke["out"] / "base"), "gate": None}
    fields["mtp_loss_weight"] = 0.1
    (tmp_path / "zero.yaml").write_text(json.dumps(fields))  # JSON is YAML
    # What `accelerate launch` does on several GPUs; on processors it wants MPI.
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
        "deepseek_arch.r1", "zero", "--config", str(tmp_path / "zero.yaml"), "--out", str(tmp_path / "zero"),
        "--set", "ddp_backend=gloo",
    ]  # fmt: skip
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": f"{root}:{root / 'kernels'}",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    assert metrics(tmp_path, "zero")["steps_trained"] == 2
    log = [json.loads(line) for line in (tmp_path / "zero" / "log.jsonl").read_text().split("\n") if line]
    assert sum("mtp_loss" in entry for entry in log) == 2
    tokens = [entry["num_tokens"] for entry in log if "num_tokens" in entry]
    alone = [json.loads(line) for line in (smoke["out"] / "zero" / "log.jsonl").read_text().split("\n") if line]
    assert len(tokens) == 2 and tokens[0] > 1.5 * next(entry["num_tokens"] for entry in alone if "num_tokens" in entry)
