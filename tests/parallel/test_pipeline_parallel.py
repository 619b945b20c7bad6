"""Pipelines: losses and gradients of one process, for every schedule and with the other axes."""

from __future__ import annotations

import pytest
import torch

import deepseek_arch as da
from deepseek_arch.layout.parallel_layout import ParallelLayout
from support.pipelines import MICRO, MTP_WEIGHT, batch, check, expected_at_once, model_of
from support.ranks import run_ranks

SCHEDULES = [
    ({"pp": 2}, 2, {"schedule": "GPipe"}),
    ({"pp": 2}, 2, {"schedule": "1F1B", "stage_layers": [3, 1]}),
    ({"pp": 2}, 2, {"schedule": "Interleaved1F1B"}),
    ({"pp": 2}, 2, {"schedule": "ZBH1"}),
    ({"pp": 2}, 2, {"schedule": "InterleavedZeroBubble", "stage_layers": [1, 1, 2, 0]}),
    ({"pp": 2}, 2, {"schedule": "ZBVZeroBubble"}),
    ({"pp": 2}, 2, {"schedule": "DualPipeV"}),
    ({"pp": 4}, 4, {"schedule": "1F1B"}),
]


@pytest.mark.parametrize(("axes", "world", "options"), SCHEDULES, ids=str)
def test_gradients_are_those_of_one_process(axes, world, options):
    check(axes, world, options, expected=expected_at_once(model_of))


COMBINED = [
    ({"pp": 2, "dp_shard": 2, "ep": 2}, 4, {"schedule": "1F1B"}),
    ({"pp": 2, "dp_shard": 2, "ep": 2}, 4, {"schedule": "DualPipeV"}),
    ({"pp": 2, "dp_shard": 2}, 4, {"schedule": "ZBH1"}),
]


@pytest.mark.parametrize(("axes", "world", "options"), COMBINED, ids=str)
def test_with_the_other_axes(axes, world, options):
    check(axes, world, options)


# With tensor parallelism, whose sums leave more than 2e-6 behind four layers in float32.
FLOAT64 = [
    ({"pp": 2}, 2, {"schedule": "DualPipeV"}),
    ({"pp": 2, "tp": 2, "ep": 2}, 4, {"schedule": "ZBVZeroBubble"}),
    ({"pp": 2, "tp": 2}, 4, {"schedule": "Interleaved1F1B"}),
]


@pytest.mark.parametrize(("axes", "world", "options"), FLOAT64, ids=str)
def test_in_float64_to_its_rounding(axes, world, options):
    check(axes, world, options, lambda: model_of(dtype=torch.float64), torch.float64)


# ---------------------------------------------------------------- other models and settings

ONE_BY_ONE, SPLIT, FOLDED = SCHEDULES[1], SCHEDULES[3], SCHEDULES[6]


@pytest.mark.parametrize(("axes", "world", "options"), [ONE_BY_ONE, COMBINED[0]], ids=str)
def test_recomputed_layers(axes, world, options):
    check(axes, world, options, recompute=True)


@pytest.mark.parametrize(("axes", "world", "options"), [SCHEDULES[0], FOLDED, COMBINED[1]], ids=str)
def test_a_tied_head_without_mtp(axes, world, options):
    tied = {"tie_word_embeddings": True, "num_nextn_predict_layers": 0}
    check(axes, world, options, lambda: model_of("v2-lite", **tied))


def test_a_tied_head_with_two_mtp_modules():
    """Three uses of one parameter on the last stage, one behind the other."""
    tied = {"tie_word_embeddings": True, "num_nextn_predict_layers": 2}
    check({"pp": 2}, 2, [{"schedule": "ZBH1"}, {"schedule": "1F1B"}], lambda: model_of("v2-lite", **tied))


@pytest.mark.parametrize(("axes", "world", "options"), [SCHEDULES[0], SPLIT], ids=str)
def test_sparse_attention(axes, world, options):
    def frozen():
        model = model_of("v32")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".indexer." not in name)
        return model

    check(axes, world, options, frozen)


@pytest.mark.parametrize(("axes", "world", "options"), [SPLIT], ids=str)
def test_what_is_frozen_stays_without_a_gradient(axes, world, options):
    def frozen():
        model = model_of()
        model.model.embed_tokens.requires_grad_(False)
        for layer in model.model.layers[:2]:
            layer.requires_grad_(False)
        return model

    expected = check(axes, world, options, frozen)
    assert "model.layers.0.self_attn.o_proj.weight" not in expected


def in_fp8():
    model = da.keep_fp8(model_of())
    model.load_state_dict(model.state_dict())
    return model


@pytest.mark.parametrize(("axes", "world", "options"), [SPLIT, COMBINED[0]], ids=str)
def test_weights_that_stay_in_fp8(axes, world, options):
    check(axes, world, options, in_fp8)


def in_fp8_training():
    model = model_of()
    da.fp8_training(model)
    return model


@pytest.mark.parametrize(("axes", "world", "options"), [ONE_BY_ONE, SPLIT, FOLDED], ids=str)
def test_fp8_training(axes, world, options):
    """Tokens of a microbatch share scales, those of one process the same ones."""
    check(axes, world, options, in_fp8_training)


def products(rank, schedule, prepare):
    """Numbers of products of experts, by pass, of one rank."""
    from deepseek_arch.quant.fp8_training import products as fp8

    counts = dict.fromkeys(("input", "weight", "fp8 input", "fp8 weight"), 0)

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "grouped_gemm_backward" in str(func):
                counts["input"] += args[-2]
                counts["weight"] += args[-1]
            return func(*args, **(kwargs or {}))

    for name, key in (("_grouped_dgrad", "fp8 input"), ("fp8_grouped_wgrad", "fp8 weight")):
        real = getattr(fp8, name)

        def counted(*args, real=real, key=key):
            counts[key] += 1
            return real(*args)

        setattr(fp8, name, counted)
    model = prepare()
    pipe = da.pipeline(model, ParallelLayout(pp=2), schedule, MICRO)
    with Counter():
        pipe.step(**batch(model.config), mtp_weight=MTP_WEIGHT)
    layers = sum(isinstance(module, da.Experts) for module in model.modules())
    return counts, 2 * MICRO * layers


@pytest.mark.parametrize("schedule", ["1F1B", "ZBH1", "DualPipeV"])
def test_products_of_experts_are_computed_once(schedule):
    """TRAPS S23: two gradients for each of two products, of each layer and microbatch."""
    for counts, expected in run_ranks(products, 2, schedule, model_of):
        assert counts["input"] == counts["weight"] == expected
    for counts, expected in run_ranks(products, 2, schedule, in_fp8_training):
        assert counts["fp8 input"] == counts["fp8 weight"] == expected
