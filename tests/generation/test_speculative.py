"""Speculative decoding: nothing but the speed may change, whatever the MTP modules say."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_arch.generation.draft_length import DraftLength
from deepseek_arch.generation.drafter import Drafter
from deepseek_arch.generation.entry import generate
from deepseek_arch.generation.mtp_probe import probe_mtp
from deepseek_arch.generation.report import SpeculationReport
from deepseek_arch.generation.sampling import Sampler, sampling_probabilities
from deepseek_arch.generation.speculative import accept
from deepseek_arch.models.mtp_loss import shift_left
from support.agreeing import agreeing
from support.small_models import config, error, model, tokens


def _padded(lm, batch=3, longest=9, side="left"):
    ids = tokens(lm.config, batch, longest)
    mask = torch.ones(batch, longest, dtype=torch.long)
    for row in range(1, batch):
        pad = min(3 * row, longest - 1)
        mask[row, slice(None, pad) if side == "left" else slice(longest - pad, None)] = 0
    return ids, mask


@pytest.mark.parametrize("depths", [1, 2, 3])
@pytest.mark.parametrize("noise", [0.0, 0.8, 100.0])
def test_greedy_tokens_are_those_of_plain_decoding(depths, noise):
    """TRAPS F10, F11: rows that accept differently, drafts longer than there are layers, chunks, both paddings."""
    lm = agreeing(depths, noise)
    # Side of the padding, tokens drafted, tokens of the prompt at a time, draft lengths that adapt.
    for side, drafted, chunk, adaptive in (
        ("left", 1, None, True),
        ("left", 2, 4, False),
        ("left", 5, 1, False),
        ("right", 5, None, True),
        ("right", 3, 4, False),
    ):
        ids, mask = _padded(lm, side=side)
        expected = generate(lm, ids, mask, max_new_tokens=13, eos_token_id=[])
        settings = {"mtp_depth": drafted, "prefill_chunk": chunk, "adaptive": adaptive, "eos_token_id": []}
        got = generate(lm, ids, mask, max_new_tokens=13, **settings)
        assert torch.equal(got, expected), (side, drafted, chunk, adaptive)


def test_acceptance_is_what_the_layers_deserve():
    """All with layers that are right, none with layers that know nothing, something between (TRAPS F13)."""
    shares = []
    for noise in (0.0, 0.8, 100.0):
        lm = agreeing(noise=noise)
        report = generate(
            lm, tokens(lm.config, 8, 5), max_new_tokens=40, mtp_depth=3, adaptive=False, eos_token_id=[],
            return_report=True,
        )[1]  # fmt: skip
        shares.append(report.acceptance[0])
        assert report.tokens == 8 * 39
        # A row takes a step for each of its tokens but for accepted drafts; the slowest row takes all steps.
        assert 8 * 39 - sum(report.accepted) <= report.row_steps <= report.steps * 8
        if sum(report.accepted) in (0, sum(report.drafted)):  # rows that accept alike end together
            assert report.row_steps == report.steps * 8
    assert shares[0] == 1.0 and shares[2] < 0.2 and shares[2] < shares[1] < shares[0]


def test_a_perfect_draft_saves_the_steps_it_should():
    lm = agreeing()
    report = generate(
        lm, tokens(lm.config, 1, 5), max_new_tokens=42, mtp_depth=3, adaptive=False, eos_token_id=[], return_report=True
    )[1]
    # One token of the prompt's pass, one of the plain step that is timed, and four a step.
    assert report.steps == 1 + 10 and report.tokens == 41
    assert report.drafted == [10, 10, 10] == report.accepted
    assert report.tokens_per_step == pytest.approx(41 / 11)
    assert report.speedup == pytest.approx(41 * report.plain_seconds / report.step_seconds)


@torch.no_grad()
@pytest.mark.parametrize("depths", [1, 2, 3])
@pytest.mark.parametrize("kept", [[0, 0], [2, 0], [1, 4], [4, 4]])
def test_drafts_are_those_of_a_chain_without_caches(depths, kept):
    """After any pattern of accepted drafts, caches hold what running everything anew would give."""
    lm = model(config("v3", num_nextn_predict_layers=depths))
    lengths, count = [5, 9], 4
    history = torch.zeros(2, 40, dtype=torch.int64)
    text = tokens(lm.config, 2, 40, seed=3)
    drafter, cache = Drafter(lm, count, history), lm.new_cache(2)
    prompt = torch.stack([text[row].roll(9 - length)[:9] for row, length in enumerate(lengths)])
    valid = torch.arange(9) >= 9 - torch.tensor(lengths)[:, None]
    for row, length in enumerate(lengths):
        history[row, : length + 1] = text[row, : length + 1]
    for part in (slice(0, 6), slice(6, 9)):
        drafter.prefill(lm.model(prompt[:, part], valid[:, part], cache=cache), valid[:, part])
    for _ in range(3):
        sampler = _Recording(2)
        drafts, _ = drafter.draft(count, sampler)
        got = torch.stack(sampler.logits, 1)
        for row in range(2):
            known = history[row, : lengths[row] + 1]
            expected = _chain(lm, known, count, drafts[row])
            assert error(got[row], expected) < 1e-5, (row, lengths)
        window = torch.cat((history[torch.arange(2), torch.tensor(lengths)][:, None], drafts), 1)
        main = lm.model(window, cache=cache)
        # Pretend that this many drafts were right, by putting them into the text.
        for row in range(2):
            history[row, lengths[row] + 1 + kept[row]] = text[row, lengths[row]]
            lengths[row] += kept[row] + 1
        drafter.advance(main, torch.tensor(kept) + 1, drafted=True)
        cache.rewind(drafter.lengths)
        assert drafter.lengths.tolist() == lengths


class _Recording(Sampler):
    """Greedy, and keeps the logits that it saw."""

    def __init__(self, batch_size):
        super().__init__(batch_size)
        self.logits = []

    def choose(self, logits):
        self.logits.append(logits)
        return super().choose(logits)


def _chain(lm, known, count, drafts):
    """Logits [count, V] of the drafts after the tokens `known`, nothing cached."""
    main = lm.model(known[None, :-1])
    hidden, length, out = lm.mtp_hidden(main), len(known) - 1, []
    ids = torch.cat((known, drafts))
    layers = min(count, len(lm.mtp))
    for step in range(layers):
        next_ids = shift_left(ids[None], step + 1)[:, :length]
        inputs = hidden
        logits, hidden = lm.mtp_forward(hidden, next_ids, step, rope=main.rope)
        out.append(logits[0, -1])
    # Applied again, the last layer sees its own states in the place of those that do not exist yet.
    for _ in range(layers, count):
        inputs = torch.cat((inputs, hidden[:, -1:]), 1)
        rope = lm.model.rope(torch.arange(inputs.shape[1])[None])
        next_ids = shift_left(ids[None], layers)[:, : inputs.shape[1]]
        logits, hidden = lm.mtp_forward(inputs, next_ids, layers - 1, rope=rope)
        out.append(logits[0, -1])
    return torch.stack(out)[:count]


# ---------------------------------------------------------------- sampling


def _goodness(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Two-sided bound on the chi-squared statistic, as its distance from the mean in standard deviations."""
    assert expected.min() >= 5, "too few expected for the approximation"
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


# With seeds fixed a test either always passes or always fails; six standard deviations are a false alarm of less than
# 1e-5 when the seed or the generator changes (the chi-squared tail with 4 or more degrees of freedom).
SIGMAS = 6.0


@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(1.0, None, None), (0.6, None, None), (1.3, 4, None), (0.9, None, 0.7)]
)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_token_behind_a_draft_is_distributed_as_the_main_model_says(count, temperature, top_k, top_p):
    """TRAPS F11: the first token that comes out of a step, whether drafted or not, is drawn from p."""
    generator = torch.Generator().manual_seed(5)
    vocabulary, trials = 6, 60_000
    logits = torch.randn(count + 1, vocabulary, generator=generator)
    draft_logits = torch.randn(count, vocabulary, generator=generator)
    settings = (temperature, top_k, top_p)
    q = sampling_probabilities(draft_logits, *settings)
    drafts = torch.empty(trials, count, dtype=torch.int64)
    for i in range(count):
        drafts[:, i] = torch.multinomial(q[i], trials, True, generator=generator)
    sampler = Sampler(trials, *settings, generator)
    drawn_from = q.expand(trials, -1, -1) if count else None
    kept, follow, _ = accept(drafts, drawn_from, logits.expand(trials, -1, -1), sampler)
    first = torch.where(kept > 0, drafts[:, 0], follow) if count else follow
    p = sampling_probabilities(logits[0], *settings)
    counts = first.bincount(minlength=vocabulary).double()
    assert (counts[p == 0] == 0).all()
    assert abs(_goodness(counts[p > 0], p[p > 0].double() * trials)) < SIGMAS
    if count:
        # The share of accepted first drafts is the overlap of both distributions.
        overlap = float(torch.minimum(p, q[0]).sum())
        share = float((kept > 0).double().mean())
        assert abs(share - overlap) < SIGMAS * math.sqrt(overlap * (1 - overlap) / trials + 1e-12)


@pytest.mark.parametrize("depths", [1, 2])
def test_sampled_texts_are_distributed_as_in_plain_decoding(depths):
    """All continuations of three tokens, against their exact probabilities under the main model."""
    lm = model(config("v3", vocab_size=4, num_nextn_predict_layers=depths), seed=1)
    with torch.no_grad():
        lm.lm_head.weight.mul_(3)
    prompt, rows = torch.tensor([[1, 3, 0]]), 3000
    settings = {"temperature": 1.2, "top_p": 0.9, "seed": 11, "eos_token_id": []}
    out, report = generate(lm, prompt.expand(rows, -1), max_new_tokens=3, mtp_depth=2, return_report=True, **settings)
    assert 0.02 < report.acceptance[0] < 0.98, "a test of nothing"
    codes = (out[:, 3:] * torch.tensor([16, 4, 1])).sum(-1)
    expected = torch.zeros(64, dtype=torch.float64)
    with torch.no_grad():
        for text in itertools.product(range(4), repeat=3):
            ids = torch.cat((prompt, torch.tensor([text])), 1)
            p = sampling_probabilities(lm(ids).logits[0, 2:5], 1.2, None, 0.9).double()
            code = 16 * text[0] + 4 * text[1] + text[2]
            expected[code] = p[0, text[0]] * p[1, text[1]] * p[2, text[2]] * rows
    counts = codes.bincount(minlength=64).double()
    assert (counts[expected == 0] == 0).all()
    common = expected >= 5
    pooled = torch.cat((expected[common], expected[~common].sum()[None]))
    got = torch.cat((counts[common], counts[~common].sum()[None]))
    if pooled[-1] < 5:
        pooled, got = pooled[:-1], got[:-1]
    assert abs(_goodness(got, pooled)) < SIGMAS


def test_a_seed_repeats_sampled_tokens_and_leaves_the_global_generator_alone():
    lm = agreeing(noise=0.8)
    ids = tokens(lm.config, 2, 5)
    settings = {"max_new_tokens": 12, "mtp_depth": 2, "temperature": 1.0, "seed": 3}
    before = torch.get_rng_state()
    assert torch.equal(generate(lm, ids, **settings), generate(lm, ids, **settings))
    assert torch.equal(torch.get_rng_state(), before)


probabilities = st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any)


@given(p=probabilities, q=probabilities, draft=st.integers(0, 2))
def test_a_rejected_draft_is_followed_by_tokens_that_the_main_model_prefers(p, q, draft):
    p, q = torch.tensor(p) / sum(p), torch.tensor(q) / sum(q)
    if q[draft] == 0:
        return
    logits = p.log()[None].repeat(2, 1)
    sampler = Sampler(1, 1.0, generator=torch.Generator().manual_seed(1))
    kept, follow, _ = accept(torch.tensor([[draft]]), q[None, None], logits[None], sampler)
    if p[draft] == 0:
        assert kept == 0
    if p[draft] >= q[draft] - 1e-7 and p[draft] > 0:
        assert kept == 1 or abs(p[draft] - q[draft]) < 1e-6
    assert p[follow] > 0
    if kept == 0 and (p - q).clamp(min=0).sum() > 1e-6:
        assert p[follow] > q[follow]


# ---------------------------------------------------------------- ends, streams, errors


def test_rows_end_where_they_do_in_plain_decoding():
    lm = agreeing(noise=0.8)
    ids, mask = _padded(lm)
    free = generate(lm, ids, mask, max_new_tokens=20, eos_token_id=[])[:, 9:]
    for end in (int(free[0, 3]), int(free[1, 7]), int(free[2, 0])):
        settings = {"max_new_tokens": 20, "eos_token_id": end, "pad_token_id": 60}
        expected = generate(lm, ids, mask, **settings)
        for adaptive in (True, False):
            assert torch.equal(generate(lm, ids, mask, mtp_depth=3, adaptive=adaptive, **settings), expected)


def test_the_callback_gets_every_column_once_and_in_order():
    lm = agreeing(noise=0.8)
    ids, mask = _padded(lm)
    columns = []
    out = generate(lm, ids, mask, max_new_tokens=15, mtp_depth=4, callback=columns.append)
    assert torch.equal(torch.stack(columns, 1), out[:, 9:])


@pytest.mark.parametrize("new", [0, 1, 2])
def test_few_tokens(new):
    lm = agreeing()
    ids = tokens(lm.config, 2, 4)
    assert torch.equal(generate(lm, ids, max_new_tokens=new, mtp_depth=3), generate(lm, ids, max_new_tokens=new))


def test_a_prompt_of_one_token_and_more_layers_than_tokens():
    lm = agreeing(3, 0.8)
    ids = tokens(lm.config, 2, 1)
    settings = {"max_new_tokens": 9, "eos_token_id": []}
    assert torch.equal(generate(lm, ids, mtp_depth=3, **settings), generate(lm, ids, **settings))


def test_without_prediction_layers_it_says_so():
    lm = model(config("v3", num_nextn_predict_layers=0))
    with pytest.raises(ValueError, match="multi-token-prediction modules"):
        generate(lm, tokens(lm.config, 1, 4), mtp_depth=1)
    with pytest.raises(ValueError, match="mtp_depth >= 0, got -1"):
        generate(lm, tokens(lm.config, 1, 4), mtp_depth=-1)


# ---------------------------------------------------------------- the length of drafts


def _run(length: DraftLength, steps: int, rates: list[float], seconds) -> list[int]:
    """Feeds a controller what steps of these acceptance rates and times would show."""
    chosen, generator = [], torch.Generator().manual_seed(0)
    for _ in range(steps):
        count = length.next()
        passed = [bool(torch.rand((), generator=generator) < rate) for rate in rates[:count]]
        kept = passed.index(False) if False in passed else count
        length.add_step(
            count, seconds(count), [int(kept >= j) for j in range(count)], [int(kept > j) for j in range(count)]
        )
        chosen.append(count)
    return chosen


def test_good_drafts_that_cost_little_grow_long():
    chosen = _run(DraftLength(4), 200, [0.95] * 4, lambda k: 1 + 0.05 * k)
    assert sum(k == 4 for k in chosen[50:]) > 100


def test_useless_drafts_are_given_up():
    chosen = _run(DraftLength(4), 300, [0.02] * 4, lambda k: 1 + 0.3 * k)
    assert sum(k == 0 for k in chosen[100:]) > 150


def test_the_length_follows_where_acceptance_falls():
    chosen = _run(DraftLength(4), 400, [0.95, 0.95, 0.05, 0.05], lambda k: 1 + 0.15 * k)
    assert max(range(5), key=chosen[100:].count) == 2


def test_a_fixed_length_is_fixed_but_for_the_timed_steps():
    chosen = _run(DraftLength(3, adapt=False), 100, [0.5] * 3, lambda k: 1.0)
    assert set(chosen) == {0, 3} and chosen.count(0) == 2


def test_an_empty_report():
    report = SpeculationReport(2)
    assert report.acceptance == [] and report.tokens_per_step == 0.0 and report.speedup is None
    assert str(report) == "acceptance -; 0.00 tokens a step"


# ---------------------------------------------------------------- probing


@pytest.mark.parametrize("mtp_input", ["post_norm", "pre_norm"])
@pytest.mark.parametrize("mtp_chain", ["block", "head_norm"])
def test_the_probe_finds_how_the_layers_were_made_to_be_fed(mtp_input, mtp_chain):
    """TRAPS F2, F3: layers that are right about one way of being fed, and wrong about the others.

    Four features that the head does not see carry marks. The main model's final norm weighs the first two differently,
    the MTP module's norm the other two. eh_proj answers a difference in a pair with noise, after undoing the weights
    of the norms that it expects to have been there.
    """
    lm = agreeing()
    a, b, c, d = range(4)
    main_norm, head_norm = torch.ones(32), torch.ones(32)
    main_norm[a], head_norm[c] = 3.0, 3.0
    expects_a = 3.0 if mtp_input == "post_norm" else 1.0
    with torch.no_grad():
        lm.model.embed_tokens.weight[:, :4] = 1.0
        lm.lm_head.weight[:, :4] = 0.0
        lm.model.norm.weight.copy_(main_norm)
        lm.mtp[0].shared_head.norm.weight.copy_(head_norm)
        passed_on = torch.ones(32)
        passed_on[a] = (
            expects_a  # what the layer itself passes on is marked as the main model's state is expected to be
        )
        passed_on[c] = 1 / 3 if mtp_chain == "head_norm" else 1.0
        noise = torch.randn(32, generator=torch.Generator().manual_seed(8)) * 20
        noise[:4] = 0
        read = torch.zeros(32, 32)
        read[:, a], read[:, b] = noise / expects_a, -noise
        read[:, c], read[:, d] = noise, -noise
        lm.mtp[0].eh_proj.weight.copy_(torch.cat((torch.diag(passed_on), read), 1))
    prompts = tokens(lm.config, 4, 6)
    probes = probe_mtp(lm, prompts, max_new_tokens=24, mtp_depth=2)
    assert len(probes) == 4 and sum(probe.configured for probe in probes) == 1
    best = probes[0]
    assert (best.mtp_input, best.mtp_chain) == (mtp_input, mtp_chain)
    assert best.acceptance == (1.0, 1.0)
    assert all(min(share for share in probe.acceptance if share is not None) < 0.5 for probe in probes[1:])
    assert ("as configured" in str(best)) == ((mtp_input, mtp_chain) == ("post_norm", "head_norm"))
    assert lm.config.mtp_input == "post_norm" and lm.config.mtp_chain == "head_norm"
