"""The recipes for larger machines: the paper's numbers field by field, fields that TRL has, and plans."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")
pytest.importorskip("yaml")

from deepseek_arch.r1.pipeline import load_recipe, recipes
from deepseek_arch.r1.planning import plan_recipe
from deepseek_arch.r1.presets import PRESETS
from deepseek_arch.r1.stages.registry import STAGES, parse_stage

V3 = load_recipe("deepseek-v3")


@pytest.mark.parametrize(("stage", "preset"), [("zero", "r1-zero"), ("reason", "r1-reason"), ("align", "r1-align")])
def test_v3s_reinforcement_has_the_papers_numbers(stage, preset):
    published = PRESETS[preset].arguments(per_device=1, processes=512)
    fields = dict(V3.stages[stage])
    if stage == "zero":  # in two stages, of which the second has longer responses
        fields["max_steps"] += V3.stages["zero_long"]["max_steps"]
    assert {name: fields.get(name) for name in published} == published
    assert ("language" in fields["reward_funcs"]) == (stage != "zero")


def test_v3s_longer_responses_after_8200_steps():
    first, second = V3.stages["zero"], V3.stages["zero_long"]
    changed = {name for name in first | second if first.get(name) != second.get(name)}
    assert changed == {"start_from", "max_completion_length", "evaluation", "max_steps"}
    assert (first["max_steps"], first["max_completion_length"]) == (8200, 32_768)
    assert (second["start_from"], second["max_steps"], second["max_completion_length"]) == ("zero", 2200, 65_536)
    assert V3.stages["cold_data"]["start_from"] == "zero_long"
    first, second = plan_recipe({name: V3.stages[name] for name in ("zero", "zero_long")}, V3.plan)
    assert second.tokens == pytest.approx(first.tokens * 2200 / 8200)


def test_v3s_supervised_stages_have_the_papers_numbers():
    for stage in ("cold_start", "finetune"):
        fields = V3.stages[stage]
        assert fields["start_from"].endswith("V3-Base")  # not R1-Zero, and for both
        assert (fields["learning_rate"], fields["lr_scheduler_kwargs"]) == (5e-5, {"min_lr": 5e-6})
        assert fields["max_length"] == 32_768 and 2 <= fields["num_train_epochs"] <= 3
    for stage, reads, examples in (("helpful", "summary", 66_000), ("harmless", "all", 106_000)):
        fields = V3.stages[stage]
        assert (fields["learning_rate"], fields["max_length"], fields["num_train_epochs"]) == (6e-6, 8192, 1)
        assert (fields["reads"], fields["examples"]) == (reads, examples)
    assert V3.stages["data"]["max_rows"] / V3.stages["data"]["general_ratio"] == 200_000
    # Preference rewards and general prompts in the last 400 of 1,700 steps.
    assert V3.stages["align"]["judges"]["helpful"]["active_from"] == pytest.approx(1300 / 1700, abs=1e-3)
    assert V3.stages["align"]["prompts"][1]["active_from"] == pytest.approx(1300 / 1700, abs=1e-3)


@pytest.mark.parametrize("name", recipes())
def test_trainers_take_the_fields_of_every_stage(name, tmp_path):
    recipe = load_recipe(name)
    for stage, fields in recipe.stages.items():
        kind, arguments, trainers = parse_stage(stage, fields)
        assert arguments.inputs or fields["kind"] == "pretrain"
        if kind.trainer is not None:
            # This machine has no GPU that the recipes of large models ask for.
            here = {"use_cpu": True, "bf16": False, "output_dir": str(tmp_path), "report_to": []}
            args = kind.trainer(**(trainers | here))
            assert args.learning_rate == trainers["learning_rate"]
    assert {fields["kind"] for fields in load_recipe("box").stages.values()} == set(STAGES)


@pytest.mark.parametrize("name", [name for name in recipes() if load_recipe(name).plan])
def test_recipes_of_large_models_have_plans(name):
    recipe = load_recipe(name)
    plans = {plan.stage: plan for plan in plan_recipe(recipe.stages, recipe.plan)}
    assert list(plans) == list(recipe.stages)
    assert all(plan.hours > 0 and plan.memory > 0 for plan in plans.values())
    for plan in plans.values():
        assert (plan.sampling_hours > 0) == (plan.kind in ("reinforce", "collect"))
        assert (plan.training_hours > 0) == (plan.kind != "collect")


def test_plans_count_what_the_stages_say():
    stages = {
        "rl": {"kind": "reinforce", "max_steps": 10, "per_device_train_batch_size": 4},
        "twice": {"kind": "reinforce", "max_steps": 20, "per_device_train_batch_size": 4},
        "lora": {"kind": "reinforce", "max_steps": 10, "per_device_train_batch_size": 4, "lora": {}},
        "data": {"kind": "collect", "collect": {"problems": 100, "samples": 3}},
        "sft": {"kind": "finetune", "num_train_epochs": 2, "gradient_checkpointing": False},
        "mixed": {"kind": "collect", "max_rows": 300, "general_ratio": 3},
        "second": {"kind": "finetune", "data_from": "mixed", "num_train_epochs": 1},
    }
    sizes = {"parameters": 1e9, "devices": 8, "device": "H100", "prompt_tokens": 100, "completion_tokens": 900}
    rl, twice, lora, data, sft, _, second = plan_recipe(stages, sizes | {"rows": 500})
    assert rl.tokens == 2 * 10 * 4 * 8 * 900 and twice.hours == pytest.approx(2 * rl.hours)
    assert data.tokens == 300 * 900 and data.training_hours == 0
    assert sft.tokens == 2 * 500 * 900 and second.tokens == pytest.approx(400 * 900)
    # Two FLOPs a parameter and token forward, twice that backward, at 35 % of 989.5 TFLOP/s.
    assert sft.training_hours == pytest.approx(3 * 2e9 * 1000 * 1000 / (0.35 * 989.5e12) / 3600, rel=1e-2)
    assert rl.memory == pytest.approx((2 + 16) * 1e9 / 8) and lora.memory == pytest.approx(2e9)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, "model or parameters"),
        ({"parameters": 1e9, "gpus": 8}, "got gpus"),
        ({"parameters": 0}, "parameters above 0 in a plan, got 0"),
        ({"model": "deepseek-v3", "devices": 1, "device": "H100"}, "devices with the memory"),
    ],
)
def test_plans_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        plan_recipe({}, sizes)
