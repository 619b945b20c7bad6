"""The latent cache: TRAPS B3, B7 and B8, growth, rewinding, reordering, rows of different length."""

import pytest
import torch

from deepseek_arch.cache.latent_cache import LatentCache
from deepseek_arch.config.deepseek_config import DeepseekConfig
from support.small_models import config, error, model, tokens

# Cached and uncached runs round differently, in three layers of about twenty products each.
TOLERANCE = 256 * torch.finfo(torch.float32).eps
LAYERS, RANK, ROPE = 2, 5, 3


def _cache(batch=2, **sizes):
    return LatentCache(LAYERS, batch, RANK, ROPE, **sizes)


def _fill(cache, count, seed=0):
    """Appends `count` random tokens to every layer; returns what was appended, [layers, B, count, C + R]."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(LAYERS, cache.batch_size, count, RANK + ROPE, generator=generator)
    for layer in range(LAYERS):
        cache.update(states[layer][:, None, :, :RANK], states[layer][:, None, :, RANK:], layer)
    return states


def _held(cache, layer):
    """Returns the tokens of a layer, by an update without tokens."""
    empty = torch.empty(cache.batch_size, 1, 0, RANK + ROPE)
    return torch.cat(cache.update(empty[..., :RANK], empty[..., RANK:], layer), -1)[:, 0]


@pytest.mark.parametrize(
    ("name", "nbytes"),
    [("deepseek-v3", 70_272), ("deepseek-v2", 2 * 34_560), ("deepseek-v2-lite", 2 * 15_552), ("glm-4.7-flash", 54_144)],
)
def test_published_bytes_per_token(name, nbytes):
    """TRAPS B7: 576 values once, neither twice nor per head; the draft layer is not counted."""
    cfg = DeepseekConfig.from_pretrained(name)
    cache = LatentCache(
        cfg.num_hidden_layers, 1, cfg.kv_lora_rank, cfg.qk_rope_head_dim, capacity=3, dtype=torch.bfloat16
    )
    assert cache.bytes_per_token == nbytes and cache.nbytes == 3 * nbytes


def test_update_returns_everything_held_so_far():
    cache = _cache()
    first, second = _fill(cache, 3), _fill(cache, 2, seed=1)
    assert cache.lengths == (5, 5)
    for layer in range(LAYERS):
        assert torch.equal(_held(cache, layer), torch.cat([first[layer], second[layer]], 1))
    latent, key = cache.update(torch.ones(2, 1, 1, RANK), torch.zeros(2, 1, 1, ROPE), 0)
    assert latent.shape == (2, 1, 6, RANK) and key.shape == (2, 1, 6, ROPE)
    assert (latent[:, :, -1] == 1).all() and (key[:, :, -1] == 0).all()


def test_growth_is_amortized_and_keeps_the_content():
    cache, pieces, capacities = _cache(capacity=4), [], []
    for step in range(120):
        pieces.append(_fill(cache, 50, seed=step))
        capacities.append(cache.capacity)
    assert torch.equal(_held(cache, 1), torch.cat([piece[1] for piece in pieces], 1))
    # By half each time: about log(6000 / 50) / log(1.5) copies instead of 120.
    assert len(set(capacities)) <= 13
    assert max(capacities) <= 1.5 * 6000 + 64


def test_a_given_capacity_is_allocated_once():
    cache = _cache(capacity=100)
    before = cache.nbytes
    _fill(cache, 60)
    _fill(cache, 40)
    assert cache.nbytes == before == LAYERS * 2 * 100 * (RANK + ROPE) * 4


def test_rewind_per_row_and_append_again():
    """Rows of different length: new tokens go behind each row's own end."""
    cache = _cache()
    first = _fill(cache, 6)
    cache.rewind([2, 5])
    assert cache.lengths == (2, 5)
    second = _fill(cache, 2, seed=1)
    assert cache.lengths == (4, 7)
    for layer in range(LAYERS):
        held = _held(cache, layer)
        assert held.shape[1] == 7
        assert torch.equal(held[0, :4], torch.cat([first[layer, 0, :2], second[layer, 0]]))
        assert torch.equal(held[1], torch.cat([first[layer, 1, :5], second[layer, 1]]))


@pytest.mark.parametrize("lengths", [torch.tensor([1, 3]), (1, 3), [1, 3]], ids=["tensor", "tuple", "list"])
def test_rewind_takes_any_sequence(lengths):
    cache = _cache()
    _fill(cache, 4)
    cache.rewind(lengths)
    assert cache.lengths == (1, 3)


def test_rewind_to_one_number_and_reset():
    cache = _cache()
    first = _fill(cache, 4)
    cache.rewind(2)
    assert cache.lengths == (2, 2) and torch.equal(_held(cache, 0), first[0][:, :2])
    capacity = cache.capacity
    cache.reset()
    assert cache.lengths == (0, 0) and cache.capacity == capacity
    again = _fill(cache, 3, seed=5)
    assert torch.equal(_held(cache, 1), again[1])


def test_rewound_values_are_gone_even_if_not_finite():
    """A masked slot still takes part in products, and 0 times NaN is NaN."""
    cache = _cache()
    _fill(cache, 2)
    for layer in range(LAYERS):
        cache.update(torch.full((2, 1, 3, RANK), torch.nan), torch.full((2, 1, 3, ROPE), torch.inf), layer)
    cache.rewind([2, 4])
    cache.rewind([2, 2])
    cache.rewind([1, 2])
    _fill(cache, 2, seed=1)
    assert all(torch.isfinite(_held(cache, layer)).all() for layer in range(LAYERS))


def test_reorder_for_beams():
    cache = _cache(batch=3)
    first = _fill(cache, 4)
    cache.rewind([4, 2, 3])
    cache.reorder(torch.tensor([2, 0, 0]))
    assert cache.lengths == (3, 4, 4)
    for layer in range(LAYERS):
        held = _held(cache, layer)
        assert torch.equal(held[0, :3], first[layer, 2, :3])
        assert torch.equal(held[1], first[layer, 0]) and torch.equal(held[2], first[layer, 0])
    second = _fill(cache, 1, seed=1)  # copies are independent
    assert torch.equal(_held(cache, 0)[1, 4], second[0, 1, 0]) and torch.equal(_held(cache, 0)[2, 4], second[0, 2, 0])


def test_reorder_may_change_the_batch():
    cache = _cache(batch=2)
    _fill(cache, 3)
    cache.reorder(torch.tensor([1, 1, 0, 1]))
    assert cache.batch_size == 4 and cache.lengths == (3, 3, 3, 3)
    assert _fill(cache, 1).shape[1] == 4


def test_padding_is_not_stored():
    cache = _cache()
    states = torch.arange(2 * 4 * (RANK + ROPE), dtype=torch.float32).view(2, 4, -1) + 1
    valid = torch.tensor([[False, True, True, True], [True, False, True, False]])
    with cache.append(4, valid) as slots:
        assert slots.tolist() == [[0, 0, 1, 2], [0, 0, 1, 1]]
        for layer in range(LAYERS):
            cache.update_states(states, layer)
    assert cache.lengths == (3, 2)
    held = _held(cache, 1)
    assert torch.equal(held[0], states[0, 1:])
    assert torch.equal(held[1, :2], states[1, [0, 2]]) and torch.count_nonzero(held[1, 2]) == 0


def test_gradients_flow_through_what_update_returns():
    for lengths in ([2, 2], [1, 2]):
        cache = _cache()
        _fill(cache, 2)
        cache.rewind(lengths)
        latent = torch.randn(2, 1, 2, RANK, requires_grad=True)
        out, _ = cache.update(latent, torch.zeros(2, 1, 2, ROPE), 0)
        out.square().sum().backward()
        assert torch.allclose(latent.grad, 2 * latent)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.rewind([1, 5]), r"lengths between 0 and those held \[4, 4\], got \[1, 5\]"),
        (lambda c: c.rewind(-1), "between 0 and those held"),
        (lambda c: c.rewind([1]), "expected one length or 2, got 1"),
        (lambda c: c.reorder(torch.tensor([0, 2])), r"row indices between 0 and 1, got \[0, 2\]"),
        (lambda c: c.reorder(torch.tensor([-1])), "row indices between 0 and 1"),
        (lambda c: c.update(torch.zeros(3, 1, 1, RANK), torch.zeros(3, 1, 1, ROPE), 0), r"states \[2, T, 8\]"),
        (lambda c: c.update(torch.zeros(2, 1, 1, RANK + 1), torch.zeros(2, 1, 1, ROPE), 0), r"states \[2, T, 8\]"),
        (lambda c: c.update(torch.zeros(2, 1, 1, RANK), torch.zeros(2, 1, 1, ROPE), 2), "layer_idx between 0 and 1"),
        (lambda c: _cache(batch=0), "expected batch_size >= 1, got 0"),
        (lambda c: _cache(capacity=-3), "expected capacity >= 1, got -3"),
    ],
)
def test_mistakes_are_named(call, message):
    cache = _cache()
    _fill(cache, 4)
    with pytest.raises(ValueError, match=message):
        call(cache)
    assert cache.lengths == (4, 4)


# ---------------------------------------------------------------- with a model


@torch.no_grad()
def test_a_cache_of_the_model_has_its_sizes():
    lm = model(config("v3"))
    cache = lm.new_cache(2, capacity=10)
    assert cache.bytes_per_token == 3 * (24 + 8) * 4 and cache.capacity == 10
    assert lm.to(torch.bfloat16).new_cache(1).bytes_per_token == 3 * (24 + 8) * 2


@pytest.mark.parametrize("chunks", [[9], [4, 5], [1] * 9, [3, 1, 5]], ids=str)
@torch.no_grad()
def test_cached_equals_uncached(chunks):
    """TRAPS B8."""
    cfg = config("v3")
    lm, ids = model(cfg), tokens(cfg, 2, 9)
    cache, parts, start = lm.new_cache(2), [], 0
    for size in chunks:
        parts.append(lm(ids[:, start : start + size], cache=cache).logits)
        start += size
        assert cache.lengths == (start, start)
    assert error(torch.cat(parts, 1), lm(ids).logits) < TOLERANCE


@torch.no_grad()
def test_left_padded_chunks_even_if_a_chunk_is_padding_only():
    """TRAPS B9: row 0 starts within the second chunk, row 1 at its end, nobody in the first."""
    cfg = config("v3")
    lm, ids = model(cfg), tokens(cfg, 2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5], mask[1, :8] = 0, 0
    cache, parts = lm.new_cache(2), []
    for start in (0, 4, 8):
        parts.append(lm(ids[:, start : start + 4], mask[:, start : start + 4], cache=cache).logits)
    assert cache.lengths == (7, 4)
    got = torch.cat(parts, 1)
    assert error(got[:1, 5:], lm(ids[:1, 5:]).logits) < TOLERANCE
    assert error(got[1:, 8:], lm(ids[1:, 8:]).logits) < TOLERANCE
    # ... and decoding goes on from there, each row at its own position
    more = tokens(cfg, 2, 2, seed=1)
    steps = torch.cat([lm(more[:, t : t + 1], cache=cache).logits for t in range(2)], 1)
    for row, start in ((0, 5), (1, 8)):
        alone = lm(torch.cat([ids[row : row + 1, start:], more[row : row + 1]], 1)).logits[:, -2:]
        assert error(steps[row : row + 1], alone) < TOLERANCE


@torch.no_grad()
def test_a_mask_that_covers_the_past_too():
    """As transformers passes it while decoding: columns for every token so far."""
    cfg = config("v3")
    lm, ids = model(cfg), tokens(cfg, 2, 8)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    cache = lm.new_cache(2)
    lm(ids[:, :6], mask[:, :6], cache=cache)
    got = lm(ids[:, 6:], mask, cache=cache).logits
    assert error(got[:1], lm(ids[:1, 3:]).logits[:, -2:]) < TOLERANCE
    assert error(got[1:], lm(ids[1:]).logits[:, -2:]) < TOLERANCE


@torch.no_grad()
def test_rows_rewound_to_different_lengths():
    """Speculation accepts a different number of tokens per row (TRAPS F10)."""
    cfg = config("v3")
    lm, ids, more = model(cfg), tokens(cfg, 2, 8), tokens(cfg, 2, 3, seed=1)
    cache = lm.new_cache(2)
    lm(ids, cache=cache)
    cache.rewind([3, 7])
    got = lm(more, cache=cache).logits
    assert cache.lengths == (6, 10)
    for row, kept in ((0, 3), (1, 7)):
        alone = lm(torch.cat([ids[row : row + 1, :kept], more[row : row + 1]], 1)).logits[:, -3:]
        assert error(got[row : row + 1], alone) < TOLERANCE


@torch.no_grad()
def test_reordered_rows_go_on_as_their_source():
    cfg = config("v3")
    lm, ids, more = model(cfg), tokens(cfg, 2, 5), tokens(cfg, 3, 2, seed=1)
    cache = lm.new_cache(2)
    lm(ids, cache=cache)
    cache.reorder(torch.tensor([1, 0, 1]))
    got = lm(more, cache=cache).logits
    whole = lm(torch.cat([ids[[1, 0, 1]], more], 1)).logits[:, -2:]
    assert error(got, whole) < TOLERANCE


@torch.no_grad()
def test_not_a_number_behind_the_valid_lengths_does_not_leak():
    """A row that held NaN, rewound below it, beside a longer row: every layer's buffer had NaN in the masked slots."""
    cfg = config("v3")
    lm, ids, more = model(cfg), tokens(cfg, 2, 6), tokens(cfg, 2, 2, seed=1)
    embeds = lm.model.embed_tokens(ids).clone()
    embeds[0, 3:] = torch.nan
    cache = lm.new_cache(2, capacity=16)
    lm(inputs_embeds=embeds[:, :3], cache=cache)
    assert torch.isnan(lm(inputs_embeds=embeds[:, 3:], cache=cache).logits[0]).all()
    cache.rewind([3, 6])
    got = lm(more, cache=cache).logits
    for row, kept in ((0, 3), (1, 6)):
        alone = lm(torch.cat([ids[row : row + 1, :kept], more[row : row + 1]], 1)).logits[:, -2:]
        assert error(got[row : row + 1], alone) < TOLERANCE


@torch.no_grad()
def test_a_failed_call_leaves_the_cache_as_it_was(monkeypatch):
    cfg = config("v3")
    lm, ids = model(cfg), tokens(cfg, 2, 6)
    cache = lm.new_cache(2)
    lm(ids[:, :4], cache=cache)

    def fail(*args):
        raise RuntimeError("in the last layer")

    with monkeypatch.context() as patch:
        patch.setattr(lm.model.layers[2].mlp, "forward", fail)
        with pytest.raises(RuntimeError, match="in the last layer"):
            lm(ids[:, 4:], cache=cache)
    assert cache.lengths == (4, 4)
    assert error(lm(ids[:, 4:], cache=cache).logits, lm(ids).logits[:, 4:]) < TOLERANCE


@torch.no_grad()
def test_a_cache_of_another_batch_is_refused():
    cfg = config("v3")
    lm, cache = model(cfg), None
    cache = lm.new_cache(3)
    with pytest.raises(ValueError, match="expected a cache for 2 rows, got one for 3"):
        lm(tokens(cfg, 2, 4), cache=cache)
    assert cache.lengths == (0, 0, 0)


def test_training_through_a_cache_reaches_the_new_tokens():
    """Gradients of a chunk on a detached prefix equal those of the whole run with the prefix detached."""
    cfg = config("v3", num_hidden_layers=1)
    lm, ids = model(cfg), tokens(cfg, 1, 6)
    cache = lm.new_cache(1)
    with torch.no_grad():
        lm(ids[:, :4], cache=cache)
    lm(ids[:, 4:], cache=cache).logits.square().sum().backward()
    grads = {name: p.grad for name, p in lm.named_parameters()}
    assert all(grad is not None and torch.isfinite(grad).all() for grad in grads.values())
    assert grads["model.layers.0.self_attn.kv_b_proj.weight"].any()
    assert not grads["model.embed_tokens.weight"][ids[0, :4][~torch.isin(ids[0, :4], ids[0, 4:])]].any()
