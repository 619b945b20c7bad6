"""Plans of a training step against DeepSeek-V3's own, and against what must hold of any plan."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import deepseek_arch as da
from deepseek_arch.layout.accounting import flops_per_token
from deepseek_arch.layout.parallel_layout import LayoutError, ParallelLayout
from deepseek_arch.planning.costs import Work, deferred_bytes, kept_bytes, layer_work
from deepseek_arch.planning.devices import DEVICES, find_device
from deepseek_arch.planning.schedules import SCHEDULES
from deepseek_arch.planning.setup import TrainingSetup
from deepseek_arch.planning.shards import elements, end_parameters, layer_parameters
from deepseek_arch.planning.timing import cut_layers, layer_seconds
from deepseek_arch.planning.training import plan_training
from support import small_models

V3 = da.DeepseekConfig.from_pretrained("deepseek-v3")
V3_LAYOUT = ParallelLayout(pp=16, ep=64).for_devices(2048)


@pytest.fixture(scope="module")
def v3():
    """DeepSeek-V3 as it was trained."""
    return plan_training(V3, V3_LAYOUT, "H800")


# ----------------------------------------------- DeepSeek-V3, 2,048 H800 (published)


def test_the_step_takes_what_deepseek_s_took(v3):
    """180K H800 hours for 10^12 tokens, in batches of 15,360 x 4,096 (arXiv 2412.19437, sections 1 and 4.2): 19.9 s."""
    published = 180e3 * 3600 / 2048 * 15360 * 4096 / 1e12
    assert published == pytest.approx(19.9, abs=0.05)
    assert v3.seconds.total == pytest.approx(published, rel=0.15)
    assert v3.device_hours_per_trillion == pytest.approx(180e3, rel=0.15)
    assert v3.flops == pytest.approx(386e12, rel=0.15)
    assert v3.micro_batches == 120


def test_the_model_fits_as_it_did(v3):
    """It was trained on devices of 80 GB; an independent estimate of the fullest one was 78.6 GB."""
    assert v3.memory_total == pytest.approx(78.6e9, rel=0.03)
    assert v3.fits


def test_a_pair_of_passes_takes_what_the_published_trace_shows():
    """deepseek-ai/profile-data: 129.0 ms for a forward and a backward pass of four MoE layers, EP64, 4,096 tokens."""
    layer = layer_seconds(V3, V3_LAYOUT, TrainingSetup(), DEVICES["h800"])[10]
    pair = 4 * max(layer.computing / (1 - 20 / 132), layer.exchange + layer.exchange_backward)
    assert pair == pytest.approx(0.1290, rel=0.02)


def test_dualpipe_beats_the_schedules_that_hide_nothing(v3):
    for schedule in ("1f1b", "zero_bubble", "zbv"):
        plan = plan_training(V3, V3_LAYOUT, "H800", TrainingSetup(schedule=schedule))
        assert plan.seconds.total > v3.seconds.total


# --------------------------------------------------------------------- consistency


@pytest.mark.parametrize("name", da.presets())
@pytest.mark.parametrize("sequence", [128, 4096])
def test_flops_of_layers_and_head_are_those_of_the_model(name, sequence):
    config = da.DeepseekConfig.from_pretrained(name).replace(num_nextn_predict_layers=0)
    layout = ParallelLayout(dp_shard=1)
    work = sum((layer_work(config, i, layout, 1, sequence) for i in range(config.num_hidden_layers)), Work())
    head = 2 * config.vocab_size * config.hidden_size
    assert work.products + work.plain + work.attention + head == pytest.approx(
        flops_per_token(config, sequence), abs=config.num_hidden_layers
    )


def test_tensor_parallel_ranks_repeat_only_the_projections_to_latents():
    one, eight = (layer_work(V3, 10, ParallelLayout(dp_shard=1, tp=tp), 4096, 4096) for tp in (1, 8))
    assert eight.attention == one.attention / 8
    latents = 2 * 4096 * V3.hidden_size * (V3.q_lora_rank + V3.latent_dim)
    assert eight.products == pytest.approx((one.products - latents) / 8 + latents)


SMALL = small_models.config(
    "v3", num_hidden_layers=12, num_attention_heads=4, num_nextn_predict_layers=1, vocab_size=64
)


@st.composite
def plans(draw):
    """Plans of a small model with anything that divides."""
    tp, ep, pp = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4]))
    layout = ParallelLayout(pp=pp, tp=tp, ep=ep, dp_shard=4, cp=draw(st.sampled_from([1, 2])))
    schedule = draw(st.sampled_from([s for s in SCHEDULES if pp > 1 or s != "dualpipe"]))
    setup = TrainingSetup(
        batch=64,
        sequence=64,
        schedule=schedule,
        chunks=2 if schedule == "interleaved" else 1,
        zero=draw(st.sampled_from([1, 2, 3])),
        precision=draw(st.sampled_from(["fp8", "bf16"])),
        recompute=draw(st.sampled_from(["none", "selective", "full"])),
    )
    return plan_training(SMALL, layout, "h100", setup)


@given(plans())
def test_parts_are_positive_and_add_up(plan):
    parts = dataclasses.asdict(plan.seconds)
    assert plan.seconds.total == pytest.approx(sum(parts.values()))
    assert all(value >= -1e-12 for value in parts.values()) and parts["computing"] > 0
    assert plan.binds == max(parts, key=parts.get)
    assert all(size >= 0 for size in plan.memory.values())
    assert plan.memory_total == sum(plan.memory.values())
    assert all(nbytes > 0 for nbytes in plan.traffic.values())
    covered = [i for stage in plan.stages for i in stage]
    assert covered == list(range(13))
    assert plan.flops <= plan.device.fp8
    json.dumps(plan.to_dict())


@given(plans())
def test_sharing_more_never_holds_more_parameters(plan):
    kinds = ("weights", "gradients", "optimizer")
    held = []
    for zero in (1, 2, 3):
        other = plan_training(SMALL, plan.layout, "h100", dataclasses.replace(plan.setup, zero=zero))
        held.append(sum(other.memory[kind] for kind in kinds))
    # The fullest rank may be another one, but not by parameters.
    assert held == sorted(held, reverse=True)


@given(st.sampled_from(["fp8", "bf16"]), st.sampled_from([0, 1, 12]), st.sampled_from([1, 2]))
def test_recomputing_keeps_less_and_weights_gradients_need_something(precision, layer_idx, tp):
    layout = ParallelLayout(dp_shard=4, tp=tp, ep=2)
    setups = [TrainingSetup(sequence=64, precision=precision, recompute=r) for r in ("none", "selective", "full")]
    kept = [sum(kept_bytes(SMALL, layer_idx, layout, setup).values()) for setup in setups]
    assert kept == sorted(kept, reverse=True)
    for setup, size in zip(setups, kept, strict=True):
        assert size + deferred_bytes(SMALL, layer_idx, layout, setup) > 0


def test_kept_bytes_of_a_v3_layer_are_those_of_its_policy():
    """A token and MoE layer: two residuals, latents, attention's output in 12 bits, softmax sums, and in FP8 the rows
    of eight experts and the inputs of SwiGLU (arXiv 2412.19437, 3.2.3 and 3.3.3)."""
    kept = kept_bytes(V3, 10, V3_LAYOUT, TrainingSetup())
    fp8 = 1 + 4 / 128
    by_hand = 2 * 2 * 7168 + 2 * 2112 + 1.5 * 128 * 128 + 4 * 128 + fp8 * (8 * 7168 + 9 * 2 * 2048)
    assert sum(kept.values()) == 4096 * by_hand


def test_parameters_of_the_fullest_rank_are_counted_by_hand(v3):
    """Pipeline rank r of DualPipe holds stages r and 15 - r, each whole."""
    held = [v3.fullest, 15 - v3.fullest]
    layers = [i for stage in held for i in v3.stages[stage]]
    parameters = [p for i in layers for p in layer_parameters(V3, i, V3_LAYOUT)]
    parameters += end_parameters(V3, V3_LAYOUT, 0 in held, 15 in held)
    buffers = sum(p.elements for p in parameters if p.kind == "float32")
    dense, routed = elements(parameters, False) - buffers, elements(parameters, True)
    assert v3.memory["weights"] == 2 * (dense + routed) + 4 * buffers
    assert v3.memory["gradients"] == 4 * (dense + routed)
    assert v3.memory["optimizer"] == pytest.approx(8 * (dense / 128 + routed / 2), rel=1e-3)


@given(st.lists(st.floats(0.5, 2), min_size=6, max_size=20), st.integers(1, 6), st.floats(0, 5))
def test_layers_are_cut_into_consecutive_stages(costs, stages, last):
    mean = (sum(costs) + last) / stages
    cuts = cut_layers(tuple(costs), last, (mean,) * stages)
    assert [i for cut in cuts for i in cut] == list(range(len(costs)))
    assert all(cuts[:-1])
    loads = [sum(costs[i] for i in cut) for cut in cuts]
    loads[-1] += last

    def spread(values):
        return sum((value - mean) ** 2 for value in values)

    # Moving any one border by one layer does not make stages more even.
    for border in range(stages - 1):
        for step in (-1, 1):
            edge = cuts[border].stop + step
            if cuts[border].start < edge <= cuts[border + 1].stop - (border + 1 < stages - 1):
                moved = list(loads)
                delta = costs[edge - 1] if step == 1 else -costs[edge]
                moved[border] += delta
                moved[border + 1] -= delta
                assert spread(loads) <= spread(moved) + 1e-9


def test_a_heavy_head_leaves_its_rank_few_layers():
    plan = plan_training(V3, V3_LAYOUT, "H800", TrainingSetup(schedule="zbv"))
    assert len(plan.stages[0]) < len(plan.stages[1]) and len(plan.stages[-1]) <= 2


# -------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("axes", "setup", "message"),
    [
        ({"pp": 16, "ep": 64}, {"batch": 15361}, "expected dp x micro_batch = 128 x 1 to divide the batch of 15361"),
        ({"pp": 16, "ep": 64}, {"batch": 128}, "expected at least 2 pp = 32 micro-batches for dualpipe, got 1"),
        ({"pp": 32, "ep": 64}, {"schedule": "zbv"}, "expected at most 62 stages for 61 layers, got 64"),
        ({"pp": 16, "ep": 64}, {"schedule": "interleaved", "chunks": 2}, "multiples of pp = 16"),
        ({"pp": 16, "ep": 64, "cp": 8}, {"sequence": 4100}, "expected 2 x cp = 16 to divide the sequence of 4100"),
    ],
)
def test_what_does_not_divide_is_refused(axes, setup, message):
    with pytest.raises(LayoutError, match=message):
        plan_training(V3, ParallelLayout(**axes).for_devices(2048), "h800", TrainingSetup(**setup))


def test_fp8_needs_a_device_that_has_it():
    with pytest.raises(LayoutError, match="expected a device with FP8 products for precision fp8, got A100"):
        plan_training(V3, V3_LAYOUT, "a100")
    assert plan_training(V3, V3_LAYOUT, "a100", TrainingSetup(precision="bf16")).seconds.total > 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"schedule": "gpipe"},
        {"zero": 0},
        {"precision": "int8"},
        {"recompute": "some"},
        {"batch": 0},
        {"master_bytes": -1},
    ],
)
def test_setups_are_checked(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"expected {name} "):
        TrainingSetup(**arguments)


def test_devices_are_found_by_name_and_say_where_rates_come_from():
    assert find_device("H800") is DEVICES["h800"] is find_device(DEVICES["h800"])
    with pytest.raises(ValueError, match=r"expected a device of h800, .*, got 'abacus'"):
        find_device("abacus")
    rates = {f.name for f in dataclasses.fields(DEVICES["h800"])} - {"name", "per_node", "sources"}
    sourced = {name.strip() for key in DEVICES["h800"].sources for name in key.split(",")}
    assert rates == sourced
