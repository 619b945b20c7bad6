"""`init_weights`: values that a seed decides, on every layout, without a whole model anywhere."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import deepseek_arch as da
from deepseek_arch.layout.parallel_layout import ParallelLayout
from deepseek_arch.layout.parameter_map import layout as published
from deepseek_arch.planning.shards import end_parameters, layer_parameters, sharded_elements
from support import small_models
from support.ranks import run_ranks

# More rows than one seed draws, and cuts that fall between its borders.
CONFIG = small_models.config(
    "v3", num_attention_heads=4, vocab_size=300, num_nextn_predict_layers=1, moe_intermediate_size=72
)


def drawn(seed=3):
    return da.init_weights(da.DeepseekLM(CONFIG, device="meta", dtype=torch.float32), seed)


def begun(rank, axes):
    with torch.device("meta"):
        model = da.DeepseekLM(CONFIG, dtype=torch.float32)
    da.init_weights(da.parallelize(model, ParallelLayout(**axes)), 3)
    state = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in model.state_dict().items()}
    held = sum(p.to_local().nbytes if hasattr(p, "to_local") else p.nbytes for p in model.parameters())
    ids = small_models.tokens(CONFIG, 4, 9)
    ids = ids.tensor_split(dist.get_world_size(model.meshes.data))[dist.get_rank(model.meshes.data)]
    model.train()(ids, labels=ids, return_logits=False).loss.backward()  # FSDP takes the memory as its own
    return state, held


AXES = [
    ({"tp": 2, "ep": 2}, 2),
    ({"dp_shard": 3}, 3),
    ({"dp_shard": 2, "tp": 2, "ep": 2}, 4),
    ({"dp_replicate": 2, "ep": 2, "dp_shard": 2}, 4),
]


@pytest.mark.parametrize(("axes", "world"), AXES, ids=str)
def test_values_are_those_of_one_process(axes, world):
    expected = drawn().state_dict()
    total = sum(p.nbytes for p in drawn().parameters())
    for state, held in run_ranks(begun, world, axes):
        assert state.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(state[name], expected[name])] == []
        assert held < 0.75 * total


def test_weights_are_normal_and_all_different():
    model = drawn()
    matrices = torch.cat([p.detach().flatten() for p in model.parameters() if p.ndim > 1])
    std = CONFIG.initializer_range
    assert abs(float(matrices.std()) / std - 1) < 0.01 and abs(float(matrices.mean())) < 0.01 * std
    # A block of values that stands in two places would make some equal: none of 24 bits are more than by chance.
    rows = torch.cat([p.detach().flatten(0, -2)[:, :8] for p in model.parameters() if p.ndim > 1 and p.shape[-1] >= 8])
    assert len(rows.unique(dim=0)) == len(rows)
    for name, vector in model.state_dict().items():
        if vector.ndim == 1:
            assert vector.unique().tolist() == ([1.0] if name.endswith("weight") else [0.0]), name


def test_the_seed_decides_and_the_global_state_does_not():
    before = torch.random.get_rng_state()
    first, other = drawn().state_dict(), drawn(4).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(torch.equal(first[name], other[name]) for name in first if first[name].ndim > 1)
    model = small_models.model(CONFIG)  # with memory, which it keeps
    place = model.lm_head.weight.data_ptr()
    again = da.init_weights(model, 3).state_dict()
    assert model.lm_head.weight.data_ptr() == place
    assert [name for name in first if not torch.equal(first[name], again[name])] == []


def test_tied_embeddings_stay_one_parameter():
    config = CONFIG.replace(tie_word_embeddings=True)
    model = da.init_weights(da.DeepseekLM(config, device="meta", dtype=torch.float32))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert float(model.lm_head.weight.detach().std()) == pytest.approx(config.initializer_range, rel=0.02)


def test_layers_in_fp8_are_refused():
    model = da.keep_fp8(small_models.model(CONFIG))
    with pytest.raises(ValueError, match="expected a model without FP8 layers"):
        da.init_weights(model)
    with pytest.raises(ValueError, match="expected a device with memory, got 'meta'"):
        da.init_weights(small_models.model(CONFIG), device="meta")


# ---------------------------------------------------------------- DeepSeek-V3 on 2,048 devices


def parts_of_v3(_, rank, axes):
    """Elements of each parameter and bias on one rank of a process group that sends nothing."""
    dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=2048)
    config = da.DeepseekConfig.from_pretrained("deepseek-v3")
    model = da.parallelize(da.DeepseekLM(config, device="meta", dtype=torch.bfloat16), ParallelLayout(**axes))
    found = {name: tuple(p.to_local().shape) for name, p in model.named_parameters()}
    return found | {name: tuple(b.shape) for name, b in model.named_buffers()}


def planned(config, layout, rank):
    def named(prefix, parameters):
        return zip(
            (prefix + parameter.name for parameter in parameters),
            sharded_elements(config, layout, parameters, rank),
            strict=True,
        )

    depth = config.num_hidden_layers
    out = dict(named("", end_parameters(config, layout, True, True)))
    for layer in range(depth + config.num_nextn_predict_layers):
        prefix = f"model.layers.{layer}." if layer < depth else f"mtp.{layer - depth}."
        out |= named(prefix, layer_parameters(config, layer, layout))
    return out


def test_v3_on_2048_devices_is_cut_as_planned():
    """All 671 billion parameters and the MTP module, to the element, without memory."""
    config, axes, rank = da.DeepseekConfig.from_pretrained("deepseek-v3"), {"ep": 64}, 2047
    (found,) = run_ranks(parts_of_v3, 1, rank, axes)
    expected = planned(config, ParallelLayout(**axes).for_devices(2048), rank)
    assert {name: torch.Size(shape).numel() for name, shape in found.items()} == expected
    assert found["model.layers.5.mlp.experts.gate_up_proj"] == (4, 128, 7168)  # 4096 rows over 32 shards
    whole = {slot.parameter for slot in published(config)}
    assert found.keys() == whole
