"""Pipelines: losses and gradients of one process, for every schedule and with the other axes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import deepseek_arch as da
from deepseek_arch.layout.parallel_layout import ParallelLayout
from support import small_models
from support.cut_models import gradients
from support.ranks import run_ranks
from support.small_models import error

SAME = {torch.float32: 2e-6, torch.float64: 1e-12}
SIZES = {"num_attention_heads": 4, "vocab_size": 64, "num_nextn_predict_layers": 1, "num_hidden_layers": 4}
MTP_WEIGHT = 0.3
MICRO = 4


def model_of(kind="v3", dtype=torch.float32, **changes):
    return small_models.model(small_models.config(kind, **(SIZES | changes))).to(dtype).train()


def batch(config, passes=MICRO):
    """Two rows for each pass: packed documents, padding, and rows with few targets."""
    ids = small_models.tokens(config, 2 * passes, 9)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, :5] = -100
    labels[1] = -100
    mask[2, :2] = 0
    mask[3, 6:] = 0
    positions = torch.arange(9).expand(len(ids), -1).clone()
    positions[4:, 4:] -= 4
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "position_ids": positions}


def expected_at_once(build):
    """Losses, gradients and loads of one process that takes the whole batch in one pass."""
    model = build()
    out = model(**batch(model.config), return_logits=False)
    (out.loss + MTP_WEIGHT * out.mtp_loss).backward()
    return losses_of(out), gradients(model), {layer: router.load for layer, router in routers(model).items()}


def expected_of(build, passes):
    """The same of one pass for each microbatch, which adds up in the order of the pipeline."""
    model = build()
    given = batch(model.config, passes)
    parts = zip(*(x.chunk(passes) for x in given.values()), strict=True)
    parts = [dict(zip(given, part, strict=True)) for part in parts]
    with torch.no_grad():
        counts = torch.stack([torch.stack(model(**part, return_logits=False).counts) for part in parts])
    shares, losses = (counts / counts.sum(0)).float(), []
    for part, (targets, rows) in zip(parts, shares, strict=True):
        out = model(**part, return_logits=False)
        own = [targets[0] * (out.loss - out.aux_loss) + rows[0] * out.aux_loss]
        losses.append([float(own[0].detach()), float((rows[0] * out.aux_loss).detach())])
        if out.mtp_losses is not None:
            ahead = (targets[1:] * out.mtp_losses + rows[1:] * out.mtp_aux_losses).mean()
            losses[-1].append(float(ahead.detach()))
            own.append(MTP_WEIGHT * ahead)
        sum(own).backward()
    loads = {layer: router.load for layer, router in routers(model).items()}
    return [sum(each) for each in zip(*losses, strict=True)], gradients(model), loads


def losses_of(out):
    return [float(x.detach()) for x in (out.loss, out.aux_loss, out.mtp_loss) if x is not None]


def routers(model):
    layers = {m.layer_idx: m.mlp.gate for m in model.modules() if isinstance(m, da.DecoderLayer) and m.has_experts}
    return layers


def trained(rank, axes, options, build, recompute):
    model = build()
    model.gradient_checkpointing_enable(recompute)
    pipe = da.pipeline(model, ParallelLayout(**axes), microbatches=MICRO, **options)
    ranks, mine = dist.get_world_size(model.meshes.data), dist.get_rank(model.meshes.data)
    given = {name: value.chunk(ranks)[mine] for name, value in batch(model.config, MICRO * ranks).items()}
    out = pipe.step(**given, mtp_weight=MTP_WEIGHT if model.config.num_nextn_predict_layers else 0.0)
    loads = da.LoadBalancer(model, 0.25).step().loads
    return losses_of(out), gradients(model), loads, float(da.clip_grad_norm(model, float("inf")))


def check(axes, world, options, build=model_of, dtype=torch.float32, recompute=False, expected=None):
    passes = MICRO * world // axes["pp"] // axes.get("tp", 1)
    losses, grads, loads = expected_of(build, passes) if expected is None else expected
    norm = float(torch.stack([g.double().square().sum() for g in grads.values()]).sum().sqrt())
    seen, counted = set(), {}
    for got, own, balanced, total in run_ranks(trained, world, axes, options, build, recompute):
        assert got == pytest.approx(losses, rel=2e-6)
        assert total == pytest.approx(norm, rel=1e-5)
        assert own.keys() <= grads.keys()
        worst = max(own, key=lambda name: error(own[name], grads[name]))
        assert error(own[worst], grads[worst]) < SAME[dtype], worst
        seen |= own.keys()
        counted |= balanced
    assert seen == grads.keys()
    assert {name.split("layers.")[-1].split(".mlp")[0]: load.tolist() for name, load in counted.items()} == {
        "mtp.0" if layer == SIZES["num_hidden_layers"] else str(layer): load.tolist() for layer, load in loads.items()
    }
    return grads


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
