"""Shapes that one rank holds: they partition the model exactly and are those of FSDP2 and DTensor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import deepseek_arch as da
from deepseek_arch.layout.parallel_layout import ParallelLayout
from deepseek_arch.planning.schedules import SCHEDULES, rank_stages, stage_count
from deepseek_arch.planning.shards import (
    elements,
    end_parameters,
    expert_shard_dim,
    layer_parameters,
    shard_elements,
    sharded_elements,
)
from deepseek_arch.planning.timing import cut_layers
from support import small_models

ROOT = Path(__file__).resolve().parents[2]
V3 = da.DeepseekConfig.from_pretrained("deepseek-v3")


def whole(config, layout):
    """Everything that a rank holds without a pipeline."""
    layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    return [
        *end_parameters(config, layout, True, True),
        *(parameter for i in layers for parameter in layer_parameters(config, i, layout)),
    ]


def trained(config, layout):
    return [parameter for parameter in whole(config, layout) if parameter.kind != "float32"]


@pytest.mark.parametrize("name", da.presets())
def test_one_rank_holds_the_whole_model(name):
    config = da.DeepseekConfig.from_pretrained(name)
    count = da.count_parameters(config)
    assert sum(p.elements for p in whole(config, ParallelLayout(dp_shard=1))) == count.total + count.mtp


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]))
def test_parts_add_up_to_the_whole(tp, ep, etp):
    config = small_models.config("v3", num_attention_heads=4, vocab_size=64, num_nextn_predict_layers=1)
    layout = ParallelLayout(dp_shard=ep * etp, tp=tp, ep=ep, etp=etp)
    one = {p.name: p for p in layer_parameters(config, 1, ParallelLayout(dp_shard=1))}
    for parameter in layer_parameters(config, 1, layout):
        full = one[parameter.name]
        cuts = [a // b for a, b in zip(full.shape, parameter.shape, strict=True)]
        assert all(a % b == 0 for a, b in zip(full.shape, parameter.shape, strict=True))
        if parameter.routed:
            expected = [ep, etp, 1] if "gate_up" in parameter.name else [ep, 1, etp]
        elif any(f".{name}." in parameter.name for name in ("q_b_proj", "kv_b_proj", "gate_proj", "up_proj")):
            expected = [tp, 1]
        elif any(f".{name}." in parameter.name for name in ("o_proj", "down_proj")):
            expected = [1, tp]
        else:
            expected = [1] * len(full.shape)
        assert cuts == expected, parameter.name


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 12), st.sampled_from([0, 1]))
def test_shards_partition_a_tensor(rows, columns, shards, dim):
    shape = (rows, columns) if dim == 0 else (columns, rows)
    parts = [shard_elements(shape, shards, index, dim) for index in range(shards)]
    assert sum(parts) == rows * columns
    assert parts == sorted(parts, reverse=True) and parts[0] == -(-rows // shards) * columns


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]))
def test_all_ranks_together_hold_every_trained_element_once(dp_shard, cp, ep, replicate):
    config = small_models.config("v3", num_nextn_predict_layers=1)
    layout = ParallelLayout(dp_replicate=replicate, dp_shard=dp_shard * ep, cp=cp, ep=ep)
    parameters = trained(config, layout)
    held = sum(sum(sharded_elements(config, layout, parameters, rank)) for rank in range(layout.world_size))
    assert held == replicate * sum(p.elements for p in trained(config, ParallelLayout(dp_shard=1)))


@given(st.sampled_from(SCHEDULES), st.sampled_from([2, 4]), st.integers(1, 3))
def test_stages_cover_all_layers_and_ranks_all_stages(schedule, pp, chunks):
    stages = stage_count(schedule, pp, chunks)
    cuts = cut_layers(tuple([1.0] * 30), 2.5, tuple([32.5 / stages] * stages))
    assert [i for cut in cuts for i in cut] == list(range(30))
    assert max(map(len, cuts)) - min(map(len, cuts[:-1])) <= 1 + 30 // stages // 4
    held = sorted(stage for rank in range(pp) for stage in rank_stages(schedule, pp, rank, chunks))
    copies = 2 if schedule == "dualpipe" else 1
    assert held == sorted([*range(stages)] * copies)


def test_deepseek_v3_on_2048_ranks_as_fsdp2_holds_it():
    """Elements that a world of 2,048 held (PyTorch's fake process group, whole model on meta, EP64 x FSDP)."""
    layout = ParallelLayout(ep=64).for_devices(2048)
    parameters = trained(V3, layout)
    assert expert_shard_dim(V3, layout) == 1
    assert sum(sharded_elements(V3, layout, parameters, 5)) == 334_734_972
    assert sum(sharded_elements(V3, layout, parameters, 2047)) == 327_680_000
    # With dimension 0 of the experts cut, rank 5 would hold one of its four experts whole: 5.2 GB of bfloat16.
    dense = sum(n for p, n in zip(parameters, sharded_elements(V3, layout, parameters, 5), strict=True) if not p.routed)
    routed = sum(shard_elements(p.shape, 32, 0, 0) for p in parameters if p.routed)
    assert dense + routed == 2_608_309_884


FAKE_WORLD = """
import json, sys, torch, torch.distributed as dist
sys.path[:0] = json.loads(sys.argv[1])
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
import deepseek_arch as da
from support import small_models
config = small_models.config("v3", num_nextn_predict_layers=1)
out = {}
for ep, rank in json.loads(sys.argv[2]):
    dist.init_process_group("fake", rank=rank, world_size=16)
    mesh = init_device_mesh("cpu", (16 // ep, ep), mesh_dim_names=("edp", "ep"))
    every = mesh["edp", "ep"]._flatten("every")
    model = da.DeepseekLM(config, device="meta")
    for module in model.modules():
        if isinstance(module, da.Experts):
            for name, parameter in list(module._parameters.items()):
                cut = distribute_tensor(parameter, mesh["ep"], [Shard(0)])
                module._parameters[name] = torch.nn.Parameter(cut)
            dim = 1 if 16 // ep > config.n_routed_experts // ep else 0
            fully_shard(module, mesh=mesh["edp"], shard_placement_fn=lambda p: Shard(dim))
    for layer in [*model.model.layers, *model.mtp]:
        fully_shard(layer, mesh=every)
    fully_shard(model, mesh=every)
    out[f"{ep} {rank}"] = sum(p.to_local().numel() for p in model.parameters())
    dist.destroy_process_group()
print(json.dumps(out))
"""


def test_elements_are_those_that_torch_holds_on_a_fake_world():
    config = small_models.config("v3", num_nextn_predict_layers=1)
    cases = [(ep, rank) for ep in (2, 4, 8) for rank in (0, 3, 9, 15)]
    paths = json.dumps([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")])
    run = subprocess.run(
        [sys.executable, "-c", FAKE_WORLD, paths, json.dumps(cases)], capture_output=True, text=True, check=True
    )
    held = json.loads(run.stdout.splitlines()[-1])
    for ep, rank in cases:
        layout = ParallelLayout(ep=ep).for_devices(16)
        expected = sum(sharded_elements(config, layout, trained(config, layout), rank))
        assert held[f"{ep} {rank}"] == expected, (ep, rank)


def test_the_last_stage_has_its_own_embedding_for_prediction_layers():
    layout = ParallelLayout(dp_shard=1)
    vocabulary = V3.vocab_size * V3.hidden_size
    middle, last = end_parameters(V3, layout, False, False), end_parameters(V3, layout, False, True)
    assert middle == []
    assert elements(last, False) == 2 * vocabulary + V3.hidden_size
    assert elements(end_parameters(V3, layout, True, True), False) == 2 * vocabulary + V3.hidden_size
    without = V3.replace(num_nextn_predict_layers=0)
    assert elements(end_parameters(without, layout, False, True), False) == vocabulary + V3.hidden_size
