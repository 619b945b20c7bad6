"""Rollouts: ended rows leave, each row has its own log-probabilities and experts, drafts change no distribution."""

from __future__ import annotations

import pytest
import torch

from deepseek_arch.generation.sampling import token_logprobs
from deepseek_arch.r1.rollouts import Sampling, aligned_routing, routing_record, sample_natively
from support import small_models

PROMPTS = [[5, 9, 12], [7, 8, 9, 10, 11], [30], [5, 9, 12]]


@pytest.fixture(scope="module")
def core():
    return small_models.model(small_models.config("v3", num_nextn_predict_layers=1, eos_token_id=1, pad_token_id=0))


def sampling(core, **changes) -> Sampling:
    # A tenth of the vocabulary ends a row, so that rows end at different steps.
    ends = tuple(range(1, 61, 8))
    return Sampling(**({"max_new_tokens": 12, "end_tokens": ends, "seed": 3} | changes))


@pytest.mark.parametrize("depth", [0, 1])
def test_rows_end_where_their_end_token_is(core, depth):
    rollout = sample_natively(core, PROMPTS, sampling(core, mtp_depth=depth))
    ends = set(sampling(core).end_tokens)
    assert rollout.prompts == PROMPTS and len({len(row) for row in rollout.completions}) > 1
    for row, ended in zip(rollout.completions, rollout.ended, strict=True):
        assert not ends & set(row[:-1])
        assert (row[-1] in ends) == ended and (ended or len(row) == 12)
    assert (sum(rollout.drafted) > 0) == bool(depth)
    assert all(a <= d for a, d in zip(rollout.accepted, rollout.drafted, strict=True))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_and_experts_are_those_of_a_pass_over_the_row_alone(core, depth, temperature):
    settings = sampling(core, temperature=temperature, top_p=0.95, mtp_depth=depth)
    rollout = sample_natively(core, PROMPTS, settings, record_routing=True)
    for i, (prompt, completion) in enumerate(zip(PROMPTS, rollout.completions, strict=True)):
        ids = torch.tensor([prompt + completion])
        record = routing_record(rollout.routing[i][None], rollout.layers)
        with torch.no_grad():
            logits = core.eval()(ids, replay_routing=record).logits[:, len(prompt) - 1 : -1]
        expected = token_logprobs(logits, ids[:, len(prompt) :], temperature)[0]
        # float32 sums over at most 64 channels in another order: 64 x 2**-24 relative to logits of order 1.
        torch.testing.assert_close(rollout.logprobs[i], expected, rtol=0, atol=1e-5)
        assert len(rollout.routing[i]) == ids.shape[1]


def test_aligned_routing_keeps_every_row_in_its_place(core):
    rollout = sample_natively(core, PROMPTS, sampling(core), record_routing=True)
    aligned = aligned_routing(rollout, 6, 12)
    for i, prompt in enumerate(PROMPTS):
        start = 6 - len(prompt)
        assert torch.equal(aligned[i, start : start + len(rollout.routing[i])], rollout.routing[i])
    with pytest.raises(ValueError, match="at most 4 and 12 tokens, got 5"):
        aligned_routing(rollout, 4, 12)
    with pytest.raises(ValueError, match="recorded routing, got one without"):
        aligned_routing(sample_natively(core, PROMPTS, sampling(core)), 6, 12)


def test_bad_prompts_are_refused(core):
    with pytest.raises(ValueError, match="none without tokens"):
        sample_natively(core, [[]], sampling(core))
    with pytest.raises(ValueError, match=r"prompts and completions of at most \d+ tokens"):
        sample_natively(core, PROMPTS, sampling(core, max_new_tokens=10**6))


def test_the_benchmark_counts_kept_tokens_of_both_engines(policy_folder):
    pytest.importorskip("trl")
    from benchmarks.models.rollouts import Settings, run

    folder = policy_folder("v3", num_nextn_predict_layers=1)
    report = run(Settings(checkpoint=folder, batches=(2,), max_new_tokens=6, rounds=2, threads=torch.get_num_threads()))
    (row,) = report.rows
    assert set(row.results) == {"ours", "transformers"} and row.ratio() > 0
    for samples in row.results.values():
        assert len(samples.values) == 2 and all(rate > 0 for rate in samples.values)
    with pytest.raises(ValueError, match="positive sizes"):
        Settings(rounds=0)
