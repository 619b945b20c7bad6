"""Pipelines beside one process: batches, losses and gradients of both."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import deepseek_arch as da
from deepseek_arch.layout.parallel_layout import ParallelLayout

from . import small_models
from .cut_models import gradients
from .ranks import run_ranks
from .small_models import error

__all__ = ["MICRO", "MTP_WEIGHT", "PIPELINE_SIZES", "batch", "check", "expected_at_once", "model_of"]

SAME = {torch.float32: 2e-6, torch.float64: 1e-12}
PIPELINE_SIZES = {"num_attention_heads": 4, "vocab_size": 64, "num_nextn_predict_layers": 1, "num_hidden_layers": 4}
MTP_WEIGHT = 0.3
MICRO = 4


def model_of(kind="v3", dtype=torch.float32, **changes):
    return small_models.model(small_models.config(kind, **(PIPELINE_SIZES | changes))).to(dtype).train()


def batch(config, passes=MICRO, tokens=9):
    """Two rows for each pass: packed documents, padding, and rows with few targets."""
    ids = small_models.tokens(config, 2 * passes, tokens)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, :5] = -100
    labels[1] = -100
    mask[2, :2] = 0
    mask[3, 6:] = 0
    positions = torch.arange(tokens).expand(len(ids), -1).clone()
    positions[4:, 3:] -= 3
    positions[6:, 10:] -= 7
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "position_ids": positions}


def expected_at_once(build, given=None):
    """Losses, gradients and loads of one process that takes the whole batch in one pass."""
    model = build()
    out = model(**(batch(model.config) if given is None else given), return_logits=False)
    (out.loss + MTP_WEIGHT * out.mtp_loss).backward()
    return losses_of(out), gradients(model), {layer: router.load for layer, router in routers(model).items()}


def expected_of(build, passes, make=batch):
    """The same of one pass for each microbatch, which adds up in the order of the pipeline."""
    model = build()
    given = make(model.config, passes)
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


def trained(rank, axes, each_options, build, recompute, make):
    """Results of a step with each schedule."""
    return [trained_once(axes, options, build, recompute, make) for options in each_options]


def trained_once(axes, options, build, recompute, make):
    model = build()
    model.gradient_checkpointing_enable(recompute)
    pipe = da.pipeline(model, ParallelLayout(**axes), microbatches=MICRO, **options)
    layout = model.meshes.layout
    mine = dist.get_rank(model.meshes.data) // layout.cp
    given = {name: value.chunk(layout.dp)[mine] for name, value in make(model.config, MICRO * layout.dp).items()}
    out = pipe.step(**given, mtp_weight=MTP_WEIGHT if model.config.num_nextn_predict_layers else 0.0)
    loads = da.LoadBalancer(model, 0.25).step().loads
    return losses_of(out), gradients(model), loads, float(da.clip_grad_norm(model, float("inf")))


def check(axes, world, options, build=model_of, dtype=torch.float32, recompute=False, expected=None, make=batch):
    """Compares a step with what one process computes.

    Args:
        options: of `da.pipeline`; several, in a list, are run one after the other.
        expected: of that process, None for one pass a microbatch.
        make: config, number of passes -> the whole batch.

    Returns:
        The gradients of one process.
    """
    passes = MICRO * ParallelLayout(**axes).for_devices(world).dp
    expected = expected_of(build, passes, make) if expected is None else expected
    each_options = options if isinstance(options, list) else [options]
    ranks = run_ranks(trained, world, axes, each_options, build, recompute, make)
    for of_ranks, given in zip(zip(*ranks, strict=True), each_options, strict=True):
        _compare(of_ranks, expected, dtype, given)
    return expected[1]


def _compare(of_ranks, expected, dtype, given):
    losses, grads, loads = expected
    norm = float(torch.stack([g.double().square().sum() for g in grads.values()]).sum().sqrt())
    seen, counted = set(), {}
    for got, own, balanced, total in of_ranks:
        assert got == pytest.approx(losses, rel=2e-6), given
        assert total == pytest.approx(norm, rel=1e-5), given
        assert own.keys() <= grads.keys(), given
        worst = max(own, key=lambda name: error(own[name], grads[name]))
        assert error(own[worst], grads[worst]) < SAME[dtype], (worst, given)
        seen |= own.keys()
        counted |= balanced
    assert seen == grads.keys(), given
    first_mtp = PIPELINE_SIZES["num_hidden_layers"]
    names = {name.split("layers.")[-1].split(".mlp")[0]: load.tolist() for name, load in counted.items()}
    assert names == {
        f"mtp.{layer - first_mtp}" if layer >= first_mtp else str(layer): load.tolist() for layer, load in loads.items()
    }, given
