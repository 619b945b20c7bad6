"""Sampling and decoding with a cache, against a loop that recomputes everything."""

import pytest
import torch

from deepseek_arch.generation.entry import generate
from deepseek_arch.generation.sampling import Sampler, sampling_probabilities
from support.small_models import config, model, tokens

EPS32 = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def lm():
    return model(config("v3"))


@torch.no_grad()
def _greedy(lm, row, count):
    """The continuation of one prompt [T], every step from scratch."""
    ids = row[None]
    for _ in range(count):
        ids = torch.cat([ids, lm(ids).logits[:, -1:].argmax(-1)], 1)
    return ids[0, len(row) :]


def test_greedy_equals_recomputing(lm):
    ids = tokens(lm.config, 3, 6)
    out = generate(lm, ids, max_new_tokens=8)
    assert out.dtype == torch.int64 and torch.equal(out[:, :6], ids)
    assert torch.equal(out[:, 6:], torch.stack([_greedy(lm, row, 8) for row in ids]))


@pytest.mark.parametrize("chunk", [None, 1, 3, 4, 100])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_continue_as_if_alone(lm, side, chunk):
    """TRAPS B9; with the prompt in one piece and in chunks, some of which are padding only."""
    ids = tokens(lm.config, 3, 9)
    mask = torch.ones(3, 9, dtype=torch.long)
    for row, pad in ((1, 3), (2, 7)):
        mask[row, slice(None, pad) if side == "left" else slice(9 - pad, None)] = 0
    out = generate(lm, ids, mask, max_new_tokens=6, prefill_chunk=chunk)
    for row in range(3):
        assert torch.equal(out[row, 9:], _greedy(lm, ids[row, mask[row].bool()], 6)), row


def test_a_row_that_ends_is_padded_while_others_go_on(lm):
    ids = tokens(lm.config, 2, 6)
    free = generate(lm, ids, max_new_tokens=8)[:, 6:]
    end = int(free[0, 1])
    assert end != free[0, 0]
    out = generate(lm, ids, max_new_tokens=8, eos_token_id=end, pad_token_id=60)[:, 6:]
    for row in range(2):
        first = (free[row] == end).nonzero()
        length = int(first[0]) + 1 if len(first) else 8
        assert torch.equal(out[row, :length], free[row, :length])
        assert (out[row, length:] == 60).all()


def test_stops_when_every_row_has_ended(lm):
    ids = tokens(lm.config, 2, 6)
    free = generate(lm, ids, max_new_tokens=8)[:, 6:]
    out = generate(lm, ids, max_new_tokens=8, eos_token_id=[int(free[0, 1]), int(free[1, 3])])
    assert out.shape[1] <= 6 + 4
    assert torch.equal(out[1, 6:10], free[1, :4])


def test_end_and_padding_tokens_come_from_the_config():
    ids = tokens(config("v3"), 1, 6)
    free = generate(model(config("v3")), ids, max_new_tokens=8)[0, 6:]
    end = int(free[1])
    assert end != free[0]
    for eos in (end, (end,), [end, 59]):
        ended = model(config("v3", eos_token_id=eos))
        assert torch.equal(generate(ended, ids, max_new_tokens=8)[0, 6:], free[:2])
        assert torch.equal(generate(ended, ids, max_new_tokens=8, eos_token_id=[])[0, 6:], free)


def test_sampling_is_repeatable_and_leaves_the_global_state(lm):
    ids = tokens(lm.config, 2, 6)
    arguments = {"max_new_tokens": 12, "temperature": 1.5}
    state = torch.get_rng_state()
    first = generate(lm, ids, seed=1, **arguments)
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(3)
    assert torch.equal(generate(lm, ids, seed=1, **arguments), first)
    assert not torch.equal(generate(lm, ids, seed=2, **arguments), first)
    torch.manual_seed(7)
    unseeded = generate(lm, ids, **arguments)
    torch.manual_seed(7)
    assert torch.equal(generate(lm, ids, **arguments), unseeded)


def test_narrow_sampling_is_greedy(lm):
    ids = tokens(lm.config, 2, 6)
    greedy = generate(lm, ids, max_new_tokens=5)
    assert torch.equal(generate(lm, ids, max_new_tokens=5, temperature=1.0, top_k=1, seed=0), greedy)
    assert torch.equal(generate(lm, ids, max_new_tokens=5, temperature=1.0, top_p=1e-6, seed=0), greedy)
    assert torch.equal(generate(lm, ids, max_new_tokens=5, temperature=1e-4, seed=0), greedy)


def _nucleus(logits, temperature, top_k, top_p):
    """One row, by the words: scale, keep the k best, then the shortest prefix that reaches p, renormalize."""
    p = (logits.double() / temperature).softmax(-1)
    order = sorted(range(len(p)), key=lambda i: (-float(p[i]), i))
    kept = order[: top_k or len(p)]
    total, nucleus, mass = float(p[kept].sum()), [], 0.0
    for i in kept:
        nucleus.append(i)
        mass += float(p[i]) / total
        if top_p is not None and mass >= top_p:
            break
    out = torch.zeros_like(p)
    out[nucleus] = p[nucleus] / p[nucleus].sum()
    return out


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (5, None), (None, 0.7), (10, 0.5), (100, 0.999), (1, 0.1)])
def test_probabilities(temperature, top_k, top_p):
    logits = 2 * torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    got = sampling_probabilities(logits, temperature, top_k, top_p)
    expected = torch.stack([_nucleus(row, temperature, top_k, top_p) for row in logits])
    assert torch.equal(got > 0, expected > 0)
    assert torch.allclose(got.double(), expected, atol=16 * EPS32)


def test_samples_follow_the_probabilities():
    logits = torch.tensor([[1.0, 0.0, 2.0, -1.0]]).expand(20000, -1)
    generator = torch.Generator().manual_seed(0)
    sampler = Sampler(len(logits), temperature=1.0, top_k=3, generator=generator)
    counts = sampler.choose(logits)[0].bincount(minlength=4)
    expected = sampling_probabilities(logits[:1], 1.0, 3)[0]
    # Five standard deviations of a binomial count.
    assert ((counts / 20000 - expected).abs() < 5 * (expected * (1 - expected) / 20000).sqrt() + 1e-12).all()
    assert counts[3] == 0


def test_equal_logits_take_the_smaller_id():
    assert Sampler(1).choose(torch.tensor([[0.0, 3.0, 3.0, 1.0]]))[0].tolist() == [1]


def test_callback_sees_every_step(lm):
    ids, steps = tokens(lm.config, 2, 6), []
    out = generate(lm, ids, max_new_tokens=5, callback=steps.append)
    assert torch.equal(torch.stack(steps, 1), out[:, 6:])


def test_no_new_tokens(lm):
    ids = tokens(lm.config, 2, 6)
    assert torch.equal(generate(lm, ids, max_new_tokens=0), ids)


def test_training_mode_comes_back_also_after_an_error():
    cfg = config("v3", attention_dropout=0.5)
    lm, ids = model(cfg), tokens(cfg, 1, 5)
    quiet = generate(lm, ids, max_new_tokens=4)
    lm.train()
    assert torch.equal(generate(lm, ids, max_new_tokens=4), quiet)  # no dropout while generating
    assert lm.training

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(lm, ids, max_new_tokens=4, callback=interrupt)
    assert lm.training and all(layer.training for layer in lm.model.layers)


def test_prompts_and_results_carry_no_gradient(lm):
    ids = tokens(lm.config, 1, 4)
    before = ids.clone()
    out = generate(lm, ids, max_new_tokens=2)
    out[:, 0] = 0
    assert torch.equal(ids, before) and not out.requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens >= 0, got -1"),
        ({"temperature": -0.5}, "temperature >= 0, got -0.5"),
        ({"temperature": float("nan")}, "temperature >= 0, got nan"),
        ({"top_k": 0}, "top_k >= 1, got 0"),
        ({"top_p": 0.0}, r"top_p in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p in \(0, 1\], got 1.5"),
        ({"prefill_chunk": 0}, "prefill_chunk >= 1, got 0"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask \[2, 5\], got \[2, 4\]"),
        ({"attention_mask": torch.tensor([[1] * 5, [0] * 5])}, "at least one prompt token in every row"),
    ],
)
def test_mistakes_are_named(lm, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(lm, tokens(lm.config, 2, 5), **arguments)


def test_ids_out_of_range_and_wrong_shapes(lm):
    with pytest.raises(ValueError, match="between 0 and 60, got 61"):
        generate(lm, torch.tensor([[61]]))
    with pytest.raises(ValueError, match=r"input_ids \[B, T\] with T >= 1, got \[3\]"):
        generate(lm, torch.tensor([1, 2, 3]))
