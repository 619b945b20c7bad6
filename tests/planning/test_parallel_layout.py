"""`ParallelLayout`: its two meshes, and refusals that name what does not divide."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import deepseek_arch as da
from deepseek_arch.layout.parallel_layout import AXES, LayoutError, ParallelLayout, parse_axes

V3 = da.DeepseekConfig.from_pretrained("deepseek-v3")
V2_LITE = da.DeepseekConfig.from_pretrained("deepseek-v2-lite")
SIZES = st.sampled_from([1, 2, 3, 4])


@st.composite
def layouts(draw):
    """Layouts of a few dozen ranks, whose expert mesh divides."""
    sizes = {name: draw(SIZES) for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp")}
    inner = sizes["dp_shard"] * sizes["cp"] * sizes["tp"]
    sizes["ep"] = draw(st.sampled_from([n for n in range(1, inner + 1) if inner % n == 0]))
    rest = inner // sizes["ep"]
    sizes["etp"] = draw(st.sampled_from([n for n in range(1, rest + 1) if rest % n == 0]))
    return ParallelLayout(**sizes)


@given(layouts())
def test_both_meshes_cover_all_ranks_once(layout):
    dense, experts = layout.dense_mesh, layout.expert_mesh
    assert math.prod(dense.values()) == math.prod(experts.values()) == layout.world_size
    at = [layout.coordinates(rank) for rank in range(layout.world_size)]
    for mesh in (dense, experts):
        assert len({tuple(place[name] for name in mesh) for place in at}) == layout.world_size
        for name, size in mesh.items():
            assert {place[name] for place in at} == set(range(size))


@given(layouts(), st.data())
def test_stride_is_the_distance_of_neighbours(layout, data):
    mesh = data.draw(st.sampled_from([layout.dense_mesh, layout.expert_mesh]))
    name = data.draw(st.sampled_from(list(mesh)))
    ranks = [r for r in range(layout.world_size) if layout.coordinates(r)[name] == 0]
    first = ranks[0]
    if mesh[name] > 1:
        neighbour = layout.coordinates(first + layout.stride(name))
        expected = layout.coordinates(first) | {name: 1}
        assert {key: neighbour[key] for key in mesh} == {key: expected[key] for key in mesh}


def test_the_layout_that_deepseek_v3_was_trained_on():
    layout = ParallelLayout(pp=16, ep=64).for_devices(2048)
    layout.validate(V3, sequence=4096)
    assert (layout.dp_shard, layout.dp, layout.edp, layout.world_size) == (128, 128, 2, 2048)
    assert layout.stride("edp") == 64 and layout.stride("pp") == 128
    assert str(layout) == "pp=16,dp_shard=128,ep=64"


def test_it_is_frozen_hashable_and_public():
    layout = da.ParallelLayout(tp=2, ep=8)
    assert layout == dataclasses.replace(layout) and hash(layout) == hash(dataclasses.replace(layout))
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.tp = 4
    assert layout.for_devices(8).dp_shard == 4
    with pytest.raises(LayoutError, match="expected dp_shard to be set"):
        _ = layout.world_size


@pytest.mark.parametrize("name", AXES)
@pytest.mark.parametrize("size", [0, -1, 2.0, True, "2"])
def test_sizes_are_positive_integers(name, size):
    with pytest.raises(LayoutError, match=rf"expected {name} to be an integer >= 1, got {size!r}"):
        ParallelLayout(**{name: size})


def test_the_experts_mesh_must_divide_the_dense_one():
    with pytest.raises(
        LayoutError, match=re.escape("expected ep x etp to divide dp_shard x cp x tp = 8, got 3 x 2 = 6")
    ):
        ParallelLayout(dp_shard=4, tp=2, ep=3, etp=2)


def test_devices_must_be_used_up():
    with pytest.raises(LayoutError, match="= 6 to divide 16 devices"):
        ParallelLayout(pp=3, tp=2).for_devices(16)
    with pytest.raises(LayoutError, match="= 16 devices, got 8"):
        ParallelLayout(dp_shard=4, tp=2).for_devices(16)


@pytest.mark.parametrize(
    ("axes", "config", "message"),
    [
        ({"tp": 3}, V3, "expected tp = 3 to divide num_attention_heads = 128"),
        ({"tp": 3}, V3, "expected tp = 3 to divide the shared experts' width = 2048"),
        ({"tp": 256}, V3, "expected tp = 256 to divide vocab_size = 129280|num_attention_heads"),
        ({"ep": 48}, V3, "expected ep = 48 to divide n_routed_experts = 256"),
        ({"etp": 3}, V3, "expected etp = 3 to divide moe_intermediate_size = 2048"),
        ({"pp": 63}, V3, "expected pp <= 62"),
        ({"ep": 2}, V3.replace(first_k_dense_replace=61, num_nextn_predict_layers=0), "without routed experts"),
    ],
)
def test_errors_name_what_does_not_divide(axes, config, message):
    layout = ParallelLayout(**axes, dp_shard=256 * 9)
    with pytest.raises(LayoutError, match=message):
        layout.validate(config)


def test_all_problems_are_named_at_once():
    layout = ParallelLayout(dp_shard=48, ep=48, tp=3, cp=3)
    with pytest.raises(LayoutError) as caught:
        layout.validate(V3, sequence=4096)
    for part in ("tp = 3", "ep = 48", "2 x cp = 6 to divide the sequence of 4096 tokens"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("axis", "config", "fitting", "refused"),
    [
        ("tp", V3.replace(first_k_dense_replace=0), 16, 32),  # width 2048: 16 parts of 128
        ("etp", V3, 16, 32),
        ("tp", V2_LITE.replace(quantization_config=V3.quantization_config), 1, 2),  # 10944 and 2816 columns
        ("etp", V2_LITE.replace(quantization_config=V3.quantization_config), 1, 2),  # 1408: 11 blocks
    ],
)
def test_fp8_blocks_are_not_cut(axis, config, fitting, refused):
    ParallelLayout(dp_shard=32, **{axis: fitting}).validate(config, fp8_blocks=True)
    layout = ParallelLayout(dp_shard=32, **{axis: refused})
    layout.validate(config)
    with pytest.raises(LayoutError, match=f"expected {axis} = {refused} to cut .* FP8 blocks of 128"):
        layout.validate(config, fp8_blocks=True)


def test_heads_of_deepseek_v3_fit_fp8_blocks_up_to_64_parts():
    narrow = V3.replace(moe_intermediate_size=128 * 128, intermediate_size=128 * 128)
    ParallelLayout(dp_shard=1, tp=64).validate(narrow, fp8_blocks=True)
    with pytest.raises(LayoutError, match=r"q_b_proj rows = 24576 .* got parts of 192"):
        ParallelLayout(dp_shard=1, tp=128).validate(narrow, fp8_blocks=True)


def test_axes_are_read_from_text():
    assert parse_axes("pp=16, ep=64") == {"pp": 16, "ep": 64}
    assert parse_axes("") == {}
    for text in ("pp=16,pp=2", "qp=2", "pp", "pp=two", "pp=-1"):
        with pytest.raises(LayoutError, match="expected axes such as pp=16,ep=64"):
            parse_axes(text)


def test_no_such_rank():
    with pytest.raises(LayoutError, match="expected a rank from 0 to 7, got 8"):
        ParallelLayout(dp_shard=8).coordinates(8)
