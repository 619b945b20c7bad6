"""Uses of pipelines beside plain steps: accumulation, adapters, frozen stages, stages without experts."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import deepseek_arch as da
from deepseek_arch.layout.parallel_layout import ParallelLayout
from support.cut_models import gradients
from support.pipelines import MICRO, MTP_WEIGHT, batch, model_of
from support.ranks import run_ranks
from support.small_models import error


def expected_of(build, passes=MICRO, steps=1, mtp_weight=MTP_WEIGHT):
    model = build()
    for _ in range(steps):
        out = model(**batch(model.config, passes), return_logits=False)
        (out.loss + mtp_weight * out.mtp_loss if mtp_weight else out.loss).backward()
    return gradients(model)


def pipe_of(build, axes, schedule, stage_layers=None):
    model = build()
    return da.pipeline(model, ParallelLayout(**axes), schedule, MICRO, stage_layers)


def rows_of(model):
    layout = model.meshes.layout
    given = batch(model.config, MICRO * layout.dp)
    return {name: value.chunk(layout.dp)[dist.get_rank(model.meshes.data)] for name, value in given.items()}


def compare(of_ranks, expected):
    """Each rank's gradients, and those of all ranks together."""
    assert set().union(*of_ranks) == expected.keys()
    for grads in of_ranks:
        for name, grad in grads.items():
            assert error(grad, expected[name]) < 2e-6, name


# ---------------------------------------------------------------- steps that add up, and losses left out


def accumulated(rank, axes, schedules):
    """Gradients of two steps, and of one without the MTP modules' loss."""
    results = []
    for schedule in schedules:
        pipe = pipe_of(model_of, axes, schedule)
        for _ in range(2):
            pipe.step(**rows_of(pipe.model), mtp_weight=MTP_WEIGHT)
        results.append(gradients(pipe.model))
        pipe.model.zero_grad()
        pipe.step(**rows_of(pipe.model))
        results.append(gradients(pipe.model))
    return results


@pytest.mark.parametrize(
    ("axes", "world", "schedules"),
    [({"pp": 2}, 2, ["1F1B", "ZBH1"]), ({"pp": 2, "dp_shard": 2}, 4, ["1F1B", "DualPipeV"])],
    ids=str,
)
def test_gradients_add_up_over_steps(axes, world, schedules):
    """Both copies of a shared embedding have the sum of the steps before already."""
    passes = MICRO * axes.get("dp_shard", 1)
    twice, without = expected_of(model_of, passes, 2), expected_of(model_of, passes, mtp_weight=0.0)
    by_schedule = list(zip(*run_ranks(accumulated, world, axes, schedules), strict=True))
    for after_two, after_one in zip(by_schedule[::2], by_schedule[1::2], strict=True):
        compare(after_two, twice)
        compare(after_one, without)


# ---------------------------------------------------------------- adapters and frozen stages


def with_adapters():
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    targets = ["q_a_proj", "q_b_proj", "o_proj", "kv_b_proj", "lm_head"]
    model = inject_adapter_in_model(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), model_of())
    return model.train()


def first_stage_frozen():
    model = model_of()
    for module in (model.model.embed_tokens, *model.model.layers[:2]):
        module.requires_grad_(False)
    return model


def last_stage_frozen():
    model = model_of()
    for module in (*model.model.layers[2:], model.model.norm, model.lm_head, *model.mtp):
        module.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)
    return model


def trained(rank, build, schedules):
    results = []
    for schedule, stage_layers in schedules:
        pipe = pipe_of(build, {"pp": 2}, schedule, stage_layers)
        pipe.step(**rows_of(pipe.model), mtp_weight=MTP_WEIGHT)
        norm = float(da.clip_grad_norm(pipe.model, float("inf")))
        results.append((gradients(pipe.model), norm))
    return results


@pytest.mark.parametrize("build", [with_adapters, first_stage_frozen, last_stage_frozen])
def test_parameters_that_are_not_trained(build):
    if build is with_adapters:
        pytest.importorskip("peft")
    expected = expected_of(build)
    total = torch.stack([grad.square().sum() for grad in expected.values()]).sum().sqrt()
    schedules = [("1F1B", [2, 2]), ("ZBH1", [2, 2]), ("DualPipeV", None)]
    for of_ranks in zip(*run_ranks(trained, 2, build, schedules), strict=True):
        compare([grads for grads, _ in of_ranks], expected)
        assert [norm for _, norm in of_ranks] == pytest.approx([float(total)] * 2, rel=1e-5)


# ---------------------------------------------------------------- stages without experts


def late_experts():
    return model_of(first_k_dense_replace=3)


def by_nodes(rank, folder):
    pipe = pipe_of(late_experts, {"pp": 2, "dp_shard": 2, "ep": 2}, "1F1B", [4, 0])
    da.use_dispatch(pipe.model, "nodes", ranks_per_node=1)
    pipe.step(**rows_of(pipe.model), mtp_weight=MTP_WEIGHT)
    balanced = da.LoadBalancer(pipe.model, 0.0).step().loads
    da.save(pipe.model, folder)
    return gradients(pipe.model), {name: load.tolist() for name, load in balanced.items()}


def test_a_last_stage_of_the_head_alone(tmp_path):
    """Its only layer is that of the MTP module."""
    results = run_ranks(by_nodes, 4, tmp_path / "saved")
    compare([grads for grads, _ in results], expected_of(late_experts, 2 * MICRO))
    assert {name for _, loads in results for name in loads} == {"model.layers.3.mlp.gate", "mtp.0.mlp.gate"}
    loaded, expected = da.load(tmp_path / "saved", dtype=torch.float32).state_dict(), late_experts().state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def dense_first(rank):
    pipe = pipe_of(late_experts, {"pp": 2, "dp_shard": 2, "ep": 2}, "1F1B", [3, 1])
    da.use_dispatch(pipe.model, "nodes", ranks_per_node=1)
    return float(pipe.step(**rows_of(pipe.model)).loss)


def test_groups_are_made_by_stages_without_experts_too():
    assert len(set(run_ranks(dense_first, 4))) == 1
