"""Bytes that a plan says are sent: equal to what ranks on gloo counted, and to closed forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deepseek_arch as da
from deepseek_arch.layout.parallel_layout import ParallelLayout
from deepseek_arch.planning.routing import count_rows
from deepseek_arch.planning.setup import TrainingSetup
from deepseek_arch.planning.shards import elements, layer_parameters
from deepseek_arch.planning.traffic import (
    context_parallel_traffic,
    expert_row,
    layer_traffic,
    ring_bytes,
    step_traffic,
    tensor_parallel_traffic,
    total_by,
)
from deepseek_arch.planning.training import plan_training
from support import small_models

V3 = da.DeepseekConfig.from_pretrained("deepseek-v3")
V3_LAYOUT = ParallelLayout(pp=16, ep=64).for_devices(2048)
FLOAT32 = 4


# ---------------------------------------------- counted by ranks on gloo, in float32


def choices_by_layer(config, ids) -> list[list[list[int]]]:
    """Experts that each token is sent to, by MoE layer, of a model's forward pass with labels."""
    model = small_models.model(config).train()
    seen = []
    for module in model.modules():
        if isinstance(module, da.Experts):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[1].tolist()))
    with torch.no_grad():
        model(ids, labels=ids)
    return seen


@pytest.mark.parametrize(
    ("rows", "per_choice", "counted"),
    [
        ([2, 2], False, [26_820, 26_838]),  # 53,658 in all: 99 rows
        ([2, 2], True, [47_360, 47_360]),  # 94,720 in all: 185 rows
        ([1, 3, 2, 2], False, [39_374, 49_216, 39_924, 45_468]),
        ([1, 3, 2, 2], True, [59_136, 69_632, 56_320, 64_768]),
        ([2, 2, 2, 2], False, [49_292, 42_550, 39_924, 45_468]),
        ([2, 2, 2, 2], True, [71_680, 59_648, 56_320, 64_768]),
    ],
)
def test_expert_parallel_bytes_are_those_that_ranks_counted(rows, per_choice, counted):
    """Ranks exchanged a row for each (token, rank), or for each choice, forward and backward, and added up its bytes.

    Recorded with torch 2.13 on gloo. Each rank has `rows` sequences of 9 tokens.
    """
    config = small_models.config("v3", num_nextn_predict_layers=1)
    row = expert_row(config.hidden_size, config.num_experts_per_tok, FLOAT32, per_choice=per_choice)
    assert row.total == (512 if per_choice else 542)
    ranks = len(rows)
    between = []  # [from][to] rows, over all layers
    for part in small_models.tokens(config, sum(rows), 9).split(rows):
        layers = choices_by_layer(config, part)
        made = [count_rows(choices, config.n_routed_experts, ranks, per_choice) for choices in layers]
        between.append([sum(column) for column in zip(*made, strict=True)])
    for me, expected in enumerate(counted):
        out = sum(between[me]) - between[me][me]
        come = sum(rows_of[me] for rows_of in between) - between[me][me]
        # A rank sends its tokens out and the sums of others' back, and the gradients of both.
        sent = out * (row.dispatch + row.combine_backward) + come * (row.combine + row.dispatch_backward)
        assert sent == expected


@pytest.mark.parametrize(
    ("kind", "tp", "forward", "backward"),
    [("v3", 2, 13_824, 19_872), ("v3", 4, 20_736, 29_808), ("v2-lite", 2, 13_824, 20_736)],
)
def test_tensor_parallel_bytes_are_those_that_ranks_counted(kind, tp, forward, backward):
    """Three dense layers, 2 x 9 tokens, recorded as above; v2-lite has no query latent."""
    config = small_models.config(kind, num_attention_heads=4, first_k_dense_replace=3)
    layout = ParallelLayout(dp_shard=1, tp=tp)
    sent = list(tensor_parallel_traffic(config, layout, 18, 8, FLOAT32)) * 3
    assert total_by(sent, "phase") == {("forward",): forward, ("backward",): backward}


@pytest.mark.parametrize(("cp", "counted"), [(2, 6_144), (4, 9_216)])
def test_context_parallel_bytes_are_those_that_ranks_counted(cp, counted):
    """Three layers, 2 x 16 tokens, latents and rotated keys gathered and their gradients reduced, recorded as above."""
    config = small_models.config("v3")
    sent = list(context_parallel_traffic(config, ParallelLayout(dp_shard=1, cp=cp), 32 // cp, 8, FLOAT32)) * 3
    assert total_by(sent, "phase") == {("forward",): counted, ("backward",): counted}


# -------------------------------------------------------------------- closed forms


def all_traffic(layout, setup, per_node=8):
    plan = plan_training(V3, layout, "h800", setup)
    return [step_traffic(V3, layout, setup, per_node, list(plan.stages), rank) for rank in range(layout.pp)]


def test_deepseek_v3_keeps_most_bytes_off_the_network():
    """250 GB a device and step on the network, against 818 GB for a BF16 row per choice."""
    setup = TrainingSetup()
    by_rank = [total_by(sent, "purpose", "link") for sent in all_traffic(V3_LAYOUT, setup)]
    experts = [sent["expert dispatch", "network"] + sent["expert combine", "network"] for sent in by_rank]
    assert sum(experts) / 16 == pytest.approx(250e9, rel=0.01)
    tokens = 4096 * 120 * 59 / 16
    assert tokens * 8 * (63 / 64) * expert_row(7168, 8, 2, per_choice=True).total == pytest.approx(818e9, rel=0.001)


def test_pipeline_bytes_count_every_boundary_twice():
    for schedule, copies in (("1f1b", 1), ("dualpipe", 1), ("zbv", 2), ("dualpipev", 2)):
        setup = TrainingSetup(schedule=schedule)
        sent = [total_by(t, "purpose")["pipeline",] for t in all_traffic(V3_LAYOUT, setup)]
        boundaries = 16 * copies - 1 - (copies - 1)  # the turn of a V stays on its rank
        assert sum(sent) == 2 * 120 * boundaries * 4096 * 7168 * 2


@given(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 8, 64]))
def test_data_parallel_bytes_are_rings(zero, ep):
    layout = ParallelLayout(ep=ep).for_devices(64)
    setup = TrainingSetup(schedule="1f1b", zero=zero, batch=128)
    sent = total_by(all_traffic(layout, setup)[0], "purpose")
    config_layers = [layer_parameters(V3, i, layout) for i in range(62)]
    ends = (2 * 129280 + 1) * 7168
    dense = sum(elements(p, False) for p in config_layers)
    routed = sum(elements(p, True) for p in config_layers)
    times = {1: (1, 1), 2: (2, 1), 3: (2, 4)}[
        zero
    ]  # gradients are reduced, weights gathered, so often; 2 micro-batches

    def exchanged(bytes_each, often):
        return bytes_each * often * (ring_bytes(dense + ends, 64) + ring_bytes(routed, 64 // ep))

    assert sent["gradient reduction",] == pytest.approx(exchanged(4, times[0]), rel=1e-12)
    assert sent["weight gathering",] == pytest.approx(exchanged(2, times[1]), rel=1e-12)


def test_copies_of_a_stage_and_of_the_embedding_exchange_gradients():
    """DualPipe holds a stage on two ranks; elsewhere prediction layers need an embedding on the last stage."""
    setup = TrainingSetup()
    sent = [total_by(t, "purpose") for t in all_traffic(V3_LAYOUT, setup)]
    assert all(("shared embedding",) not in by_purpose for by_purpose in sent)
    stages = plan_training(V3, V3_LAYOUT, "h800", setup).stages
    layers = [layer_parameters(V3, i, V3_LAYOUT) for s in (5, 10) for i in stages[s]]
    shards = sum(elements(p, False) / 128 + elements(p, True) / 2 for p in layers)
    assert sent[5]["stage copies",] == sent[10]["stage copies",] == pytest.approx(4 * shards)
    sent = [total_by(t, "purpose") for t in all_traffic(V3_LAYOUT, TrainingSetup(schedule="1f1b"))]
    ends = {
        rank: by_purpose["shared embedding",]
        for rank, by_purpose in enumerate(sent)
        if ("shared embedding",) in by_purpose
    }
    assert ends == dict.fromkeys((0, 15), 4 * 129280 * 7168 / 128)
    assert all(("stage copies",) not in by_purpose for by_purpose in sent)


@given(st.sampled_from([2, 4, 8, 16, 64]))
def test_groups_within_a_node_send_nothing_over_the_network(ep):
    layout = ParallelLayout(ep=ep).for_devices(64)
    sent = layer_traffic(V3, 5, layout, TrainingSetup(), 8)
    links = {t.link for t in sent if t.purpose.startswith("expert")}
    assert links == ({"nvlink"} if ep <= 8 else {"nvlink", "network"})


def test_of_a_ring_over_nodes_one_rank_in_eight_sends_over_the_network():
    layout = ParallelLayout(dp_shard=16)
    sent = layer_traffic(V3, 0, layout, TrainingSetup(zero=3), 8)
    gathered = total_by([t for t in sent if t.purpose == "weight gathering"], "link")
    assert gathered["nvlink",] == pytest.approx(7 * gathered["network",])
    whole = 2 * 2 * elements(layer_parameters(V3, 0, layout), False)
    assert sum(gathered.values()) == pytest.approx(ring_bytes(whole, 16))


def test_recomputed_layers_repeat_their_collectives():
    layout = ParallelLayout(dp_shard=8, tp=2, ep=8)
    once, twice = (
        total_by(layer_traffic(V3, 5, layout, TrainingSetup(recompute=policy), 8), "phase")
        for policy in ("selective", "full")
    )
    assert twice["forward",] == once["forward",]
    assert twice["backward",] == once["backward",] + once["forward",]
