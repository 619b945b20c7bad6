"""Balancing over ranks that hold different layers, or see different numbers of tokens."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

import deepseek_arch as da
from deepseek_arch.moe.load_balancer import routers
from support import small_models
from support.ranks import RankError, run_ranks

CONFIG = small_models.config("v3", num_hidden_layers=5)


class Stage(nn.Module):
    """Some layers of a model, numbered from 0."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)


def stage_loads(rank, held):
    """Every token of layer i chose expert i, ten on each rank that holds the layer."""
    model = small_models.model(CONFIG).train()
    stage = Stage([model.model.layers[i] for i in held[rank]])
    for i, router in zip([i for i in held[rank] if i], routers(stage).values(), strict=True):
        router.load = torch.zeros(8, dtype=torch.int64)
        router.load[i] = 10
    report = da.LoadBalancer(stage, 0.25).step()
    return [[*load.nonzero().flatten().tolist(), int(load.sum())] for load in report.loads.values()]


@pytest.mark.parametrize("held", [([1, 2], [3, 4]), ([1, 2], [3]), ([1, 2, 3], [3, 4]), ([0], [1, 2])], ids=str)
def test_pipeline_stages_do_not_mix_their_layers(held):
    """Under one name on both ranks, or in other numbers, where plain collectives would mix counts or hang."""
    for rank, loads in enumerate(run_ranks(stage_loads, 2, held)):
        assert loads == [[i, 10 * sum(i in layers for layers in held)] for i in held[rank] if i]  # 0 is dense


def collectives_of_a_step(rank):
    model = small_models.model(CONFIG).train()
    ids = small_models.tokens(CONFIG, 2, 9, seed=rank)
    calls, real = [], dist.all_reduce
    balancer = da.LoadBalancer(model, 0.1)
    for _ in range(2):
        model(ids, labels=ids)
        dist.all_reduce = lambda *args, **kwargs: (calls.append(args[0].numel()), real(*args, **kwargs))
        report = balancer.step()
        dist.all_reduce = real
    biases = [router.e_score_correction_bias.tolist() for router in balancer.routers.values()]
    return calls, [int(load.sum()) for load in report.loads.values()], biases


def test_a_step_is_one_collective():
    (calls, totals, biases), (_, _, others) = run_ranks(collectives_of_a_step, 2)
    assert calls == [4 * 8] * 2  # of all four routers
    assert totals == [2 * 2 * 9 * 3] * 4
    assert biases == others


def ranks_that_disagree(rank):
    router = da.Router(16, 4 + 4 * rank, 1)
    da.LoadBalancer(router, 0.1).step()


def test_another_number_of_experts_is_refused_on_every_rank():
    with pytest.raises(RankError, match=r"(?s)expected one number of experts for '', got 4 and 8.*rank 1.*got 4 and 8"):
        run_ranks(ranks_that_disagree, 2)
