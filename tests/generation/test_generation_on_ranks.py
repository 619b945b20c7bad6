"""Decoding on several ranks: no decision by a rank's own clock, and as many passes on each."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import deepseek_arch as da
from deepseek_arch.generation import speculative
from support import small_models
from support.ranks import RankError, run_ranks

CONFIG = small_models.config("v3", num_nextn_predict_layers=2)


def own_clock(rank):
    """Seconds that pass at random, other ones on each rank."""
    chance, now = random.Random(rank), [0.0]

    def clock():
        now[0] += chance.random() ** 4
        return now[0]

    speculative.time.perf_counter = clock


def prompts(rank):
    return small_models.tokens(CONFIG, 2, 9 + rank, seed=rank)


def drafted(rank):
    own_clock(rank)
    _, report = da.generate(small_models.model(CONFIG), prompts(0), max_new_tokens=60, mtp_depth=3, return_report=True)
    return report.steps, report.drafted


def test_ranks_draft_alike_whatever_their_clocks_say():
    first, second = run_ranks(drafted, 2)
    assert first == second
    assert first[1][0] > 0


def sharded():
    model = small_models.model(CONFIG)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (*model.model.layers, *model.mtp):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def continued(model, rank, **options):
    """Texts of different lengths: a token that the second rank's first row makes ends a row early."""
    return da.generate(model, prompts(rank), max_new_tokens=16 + 8 * rank, **options)


def on_shards(rank, options):
    own_clock(rank)
    return continued(sharded(), rank, **options)


OPTIONS = [{}, {"mtp_depth": 1}, {"mtp_depth": 3}, {"mtp_depth": 2, "prefill_chunk": 5}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_texts_of_a_sharded_model_are_those_of_one_process(options):
    """Each rank continues its own prompts, and makes passes for the other once it is done."""
    model = small_models.model(CONFIG)
    ends = {"eos_token_id": [int(continued(model, 0)[0, 14])]}
    for rank, tokens in enumerate(run_ranks(on_shards, 2, options | ends)):
        assert torch.equal(tokens, continued(model, rank, **ends))


def test_routing_is_recorded_beside_ranks_that_go_on():
    model = small_models.model(CONFIG)
    for rank, (got, record) in enumerate(run_ranks(recording, 2)):
        tokens, report = continued(model, rank, record_routing=True, mtp_depth=2, eos_token_id=[])
        assert torch.equal(got, tokens)
        for layer, ids in report.routing.ids.items():
            valid = report.routing.valid
            assert torch.equal(record[layer][valid], ids[valid])


def recording(rank):
    tokens, report = continued(sharded(), rank, mtp_depth=2, record_routing=True, eos_token_id=[])
    return tokens, report.routing.ids


def other_depths(rank):
    continued(sharded(), rank, mtp_depth=1 + rank)


def test_ranks_that_would_wait_for_each_other_raise():
    with pytest.raises(RankError, match=r"(?s)rank 0:.*expected the same mtp_depth.*rank 1:.*expected the same"):
        run_ranks(other_depths, 2)


def in_pieces(rank):
    """Prompts of 9 and 10 tokens: 3 pieces and 4."""
    continued(sharded(), rank, prefill_chunk=3)


def test_prompts_of_other_numbers_of_pieces_raise():
    with pytest.raises(RankError) as caught:
        run_ranks(in_pieces, 2, seconds=60)
    assert str(caught.value).count("ValueError: expected the same mtp_depth on all ranks, and prompts that take") == 2


def sampled(rank):
    torch.manual_seed(0)
    return da.generate(sharded(), prompts(0), max_new_tokens=16, temperature=1.0, eos_token_id=[])


def test_ranks_with_rows_of_their_own_draw_other_tokens():
    """Samples of one prompt on each rank, as a group of rollouts."""
    first, second = run_ranks(sampled, 2)
    assert not torch.equal(first, second)
