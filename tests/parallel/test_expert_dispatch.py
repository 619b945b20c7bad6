"""Ways of tokens to their experts: gradients of one process, bytes of the plan, and those that users register."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import deepseek_arch as da
from deepseek_arch.layout.parallel_layout import ParallelLayout
from deepseek_arch.parallel.collectives import sent_bytes
from deepseek_arch.parallel.dispatch import dispatched
from deepseek_arch.planning.routing import count_rows
from deepseek_arch.planning.traffic import expert_row
from support import small_models
from support.cut_models import SIZES, crowded_model, gradients, rows_of_rank, weighed_loss
from support.ranks import run_ranks
from support.small_models import error

CONFIG = small_models.config("v3", **SIZES)
FLOAT32 = 4


def model_of(dtype=torch.float32, experts=None, **changes):
    return crowded_model(CONFIG.replace(**changes), dtype, experts)


def trained(rank, axes, way, build, rows):
    model = da.parallelize(build(), ParallelLayout(**axes))
    da.use_dispatch(model, **way)
    weighed_loss(model, rows_of_rank(CONFIG, dist.get_rank(model.meshes.data), rows)).backward()
    return gradients(model)


def check(axes, world, rows, way, build):
    model = build()
    for rank in range(len(rows)):
        (weighed_loss(model, rows_of_rank(CONFIG, rank, rows)) / len(rows)).backward()
    expected = gradients(model)
    for grads in run_ranks(trained, world, axes, way, build, rows):
        assert grads.keys() == expected.keys()
        worst = max(expected, key=lambda name: error(grads[name], expected[name]))
        assert error(grads[worst], expected[worst]) < (2e-6 if model.dtype == torch.float32 else 1e-12), worst


CHOICES, NODES = {"name": "choices"}, {"name": "nodes", "ranks_per_node": 2}
EP4 = {"dp_shard": 4, "ep": 4}, 4, (1, 3, 2, 2)
BOTH = {"dp_shard": 2, "tp": 2, "ep": 4}, 4, (2, 1)
TP2 = {"tp": 2, "ep": 2}, 2, (2,)


# Weights of choices are float32 in any model: weighted at the sender, they are rounded otherwise than by the experts.
WAYS = [(CHOICES, torch.float32), (NODES, torch.float64)]


@pytest.mark.parametrize(
    ("axes", "world", "rows", "way"), [(*EP4, CHOICES), (*TP2, CHOICES), (*EP4, NODES), (*BOTH, NODES)], ids=str
)
def test_gradients_are_those_of_one_process(axes, world, rows, way):
    check(axes, world, rows, way, model_of)


@pytest.mark.parametrize(("way", "dtype"), WAYS, ids=str)
def test_ranks_that_serve_no_token_take_part(way, dtype):
    check(*EP4, way, lambda: model_of(dtype, [0, 1, 2]))


@pytest.mark.parametrize(("way", "dtype"), WAYS, ids=str)
def test_all_tokens_to_one_expert(way, dtype):
    one = {"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}
    check(*EP4, way, lambda: model_of(dtype, [4], **one))


def test_one_rank_a_node_and_one_node():
    for ranks in (1, 4):
        check(*EP4, {"name": "nodes", "ranks_per_node": ranks}, lambda: model_of(torch.float64))


# ---------------------------------------------------------------- bytes


def counted(rank, way):
    model = da.parallelize(model_of(), ParallelLayout(dp_shard=4, ep=4))
    da.use_dispatch(model, **way)
    chosen = []
    for module in model.modules():
        if isinstance(module, da.Router):
            module.register_forward_hook(lambda _, args, out: chosen.append(out[2].tolist()))
    sent_bytes.clear()
    weighed_loss(model, rows_of_rank(CONFIG, rank, EP4[2])).backward()
    return dict(sent_bytes), chosen


def sent(row, out, come, suffix=""):
    return {
        f"expert dispatch{suffix}": out * row.dispatch,
        f"expert combine{suffix}": come * row.combine,
        f"expert combine{suffix} backward": out * row.combine_backward,
        f"expert dispatch{suffix} backward": come * row.dispatch_backward,
    }


def test_bytes_of_a_row_for_each_choice():
    results = run_ranks(counted, 4, CHOICES)
    row = expert_row(CONFIG.hidden_size, CONFIG.num_experts_per_tok, FLOAT32, per_choice=True)
    between = [rows_between(layers, 4, True) for _, layers in results]
    for me, (got, _) in enumerate(results):
        out = sum(between[me]) - between[me][me]
        come = sum(rows[me] for rows in between) - between[me][me]
        assert got == sent(row, out, come)


def rows_between(layers, ranks, per_choice=False):
    made = [count_rows(choices, 8, ranks, per_choice) for choices in layers]
    return [sum(column) for column in zip(*made, strict=True)]


def test_bytes_of_two_hops():
    """Between nodes a row for each node, within a node one for each rank, of those that arrived there."""
    results = run_ranks(counted, 4, NODES)
    row = expert_row(CONFIG.hidden_size, CONFIG.num_experts_per_tok, FLOAT32)
    hops = [rows_between(layers, 2) for _, layers in results]
    within = [[0, 0] for _ in range(4)]  # by rank that a row arrived at, and rank of its node that serves it
    for source, (_, layers) in enumerate(results):
        for choices in layers:
            for ids in choices:
                for node in range(2):
                    local = {expert % 4 // 2 for expert in ids if expert // 4 == node}
                    for target in local:
                        within[2 * node + source % 2][target] += 1
    for me, (got, _) in enumerate(results):
        node, local = divmod(me, 2)
        other, neighbour = 2 * (1 - node) + local, 2 * node + 1 - local
        expected = sent(row, hops[me][1 - node], hops[other][node], " between nodes")
        assert got == expected | sent(row, within[me][1 - local], within[neighbour][local])


# ---------------------------------------------------------------- names


def registered(rank):
    calls = []

    def factory(meshes, num_experts, note):
        def way(experts, x, ids, weights):
            calls.append(note)
            return dispatched(experts, x, ids, weights, num_experts, meshes.ep)

        return way

    da.register_dispatch("mine", factory)
    model = da.parallelize(model_of(), ParallelLayout(dp_shard=2, ep=2))
    da.use_dispatch(model, "mine", note="x")
    weighed_loss(model, rows_of_rank(CONFIG, rank, (1, 1))).backward()
    messages = []
    for wrong in ({"name": "deepep"}, {"name": "rings"}, {"name": "nodes", "ranks_per_node": 3}):
        with pytest.raises(ValueError) as caught:
            da.use_dispatch(model, **wrong)
        messages.append(str(caught.value))
    with pytest.raises(ValueError) as caught:
        da.use_dispatch(da.parallelize(model_of(), ParallelLayout(tp=2)), "rows")
    return calls, [*messages, str(caught.value)]


def test_users_register_their_own():
    for calls, messages in run_ranks(registered, 2):
        assert calls == ["x"] * 3
        assert messages[0].startswith("expected a dispatch of rows, choices, nodes")
        assert "got 'deepep' (DeepEP: install deep_ep" in messages[0] and "mine" in messages[0]
        assert "got 'rings'" in messages[1] and "DeepEP" not in messages[1]
        assert "expected ranks_per_node = 3 to divide ep = 2" in messages[2]
        assert "cut by ep > 1" in messages[3]


def test_a_whole_model_has_no_dispatch():
    with pytest.raises(ValueError, match="expected a model that is cut by ep > 1"):
        da.use_dispatch(model_of(), "rows")
