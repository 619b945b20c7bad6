"""The latent cache in FP8: TRAPS E10; everything but the bytes is as in the cache of values, and generation runs on it.

Tests that want equal codes from different chunks run dense models in float64. There, different orders of summation
differ by about 1e-16, and a value lies that close to where its code changes about once in 1e13 times; in float32, or
behind a router, which computes in float32, it would be once in 1e4 times.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_arch.attention.mla import MultiHeadLatentAttention
from deepseek_arch.cache.latent_cache import LatentCache
from deepseek_arch.config.deepseek_config import DeepseekConfig
from deepseek_arch.generation.entry import generate
from deepseek_arch.layers.rope import RotaryEmbedding
from deepseek_kernels.attention.mla_decode import reference as packed_attention
from deepseek_kernels.attention.packed_latents import pack, packed_bytes, unpack
from support.small_models import config, error, model, tokens

# Three layers of about twenty products each round differently in different chunks.
TOLERANCE = 256 * torch.finfo(torch.float64).eps
LAYERS, RANK, ROPE = 2, 5, 3


def dense(**changes):
    """A float64 model without experts."""
    return model(config("v3", first_k_dense_replace=3, **changes)).double()


def states_of(cache: LatentCache, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LAYERS, cache.batch_size, count, RANK + ROPE, generator=generator)


def stored(states: Tensor) -> Tensor:
    """Returns states after a round trip through FP8."""
    return torch.cat(unpack(pack(states, RANK), RANK, torch.float32), -1)


def held(cache: LatentCache, layer: int) -> Tensor:
    """Returns the tokens of a layer, by an update without tokens."""
    nothing = torch.empty(cache.batch_size, 1, 0, RANK + ROPE)
    return torch.cat(cache.update(nothing[..., :RANK], nothing[..., RANK:], layer), -1)[:, 0]


def test_a_token_of_v3_takes_656_bytes_a_layer():
    cfg = DeepseekConfig.from_pretrained("deepseek-v3")
    cache = LatentCache(
        cfg.num_hidden_layers, 2, cfg.kv_lora_rank, cfg.qk_rope_head_dim, capacity=3, format="fp8", dtype=torch.bfloat16
    )
    assert cache.bytes_per_token == 61 * 656 and cache.nbytes == 61 * 656 * 3 * 2
    assert repr(cache).endswith("40016 bytes a token, fp8, cpu)")


def test_bytes_are_stored_and_returned():
    cache = LatentCache(LAYERS, 2, RANK, ROPE, format="fp8")
    states = states_of(cache, 3)
    for layer in range(LAYERS):
        got = cache.update_states(states[layer], layer)
        assert got.dtype == torch.uint8 and got.shape == (2, 3, packed_bytes(RANK, ROPE))
        assert torch.equal(got, pack(states[layer], RANK))
        latents, keys = cache.split(got)
        assert latents.dtype == keys.dtype == torch.float32
        assert torch.equal(torch.cat((latents, keys), -1), stored(states[layer]))
    latent, key = cache.update(torch.ones(2, 1, 1, RANK), torch.full((2, 1, 1, ROPE), 1 + 2.0**-12), 0)
    assert latent.shape == (2, 1, 4, RANK) and key.shape == (2, 1, 4, ROPE)
    assert (latent[:, :, -1] == 1).all() and (key[:, :, -1] == 1).all()  # 448 times a 448th, and bfloat16's 1


@pytest.mark.parametrize("seed", range(8))
def test_everything_else_is_as_in_a_cache_of_values(seed):
    """The same random operations on an FP8 cache and on one of values that is given what FP8 leaves of them."""
    chance = torch.Generator().manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(most + 1, (1,), generator=chance))

    ours = LatentCache(LAYERS, 2, RANK, ROPE, capacity=1 + draw(3), format="fp8")
    plain = LatentCache(LAYERS, 2, RANK, ROPE, capacity=1, dtype=torch.float32)
    for step in range(40):
        kind = ("update", "padded", "failed", "rewind", "reorder", "reset")[draw(4) if step % 13 else draw(5)]
        count, rows = 1 + draw(30), ours.batch_size
        states = states_of(ours, count, step)
        states[..., 0, 0, 0] = torch.nan if kind == "failed" else 0.0
        valid = torch.rand(rows, count, generator=chance) < 0.7
        order = torch.randint(rows, (1 + draw(3),), generator=chance)
        lengths = [draw(length) for length in ours.lengths]
        for cache, values in ((ours, states), (plain, stored(states))):
            if kind == "update":
                for layer in range(LAYERS):
                    cache.update_states(values[layer], layer)
            elif kind == "padded":
                with cache.append(count, valid):
                    for layer in range(LAYERS):
                        cache.update_states(values[layer], layer)
            elif kind == "failed":
                with pytest.raises(KeyError), cache.append(count):
                    cache.update_states(values[0], 0)
                    raise KeyError
            elif kind == "rewind":
                cache.rewind(lengths)
            elif kind == "reorder":
                cache.reorder(order)
            else:
                cache.reset()
        assert ours.lengths == plain.lengths and ours.batch_size == plain.batch_size
        for layer in range(LAYERS):
            assert torch.equal(held(ours, layer), held(plain, layer))
    assert ours.capacity > 4  # it grew


def test_rewound_bytes_are_zeros():
    cache = LatentCache(1, 2, RANK, ROPE, capacity=8, format="fp8")
    cache.update_states(torch.full((2, 4, RANK + ROPE), torch.nan), 0)
    cache.rewind([1, 4])
    left = cache.update_states(torch.zeros(2, 0, RANK + ROPE), 0)
    assert not left[0, 1:].any() and left[0, 0].any()
    cache.reset()
    assert cache.nbytes == 2 * 8 * packed_bytes(RANK, ROPE)


def test_the_default_is_not_quantized():
    lm = dense()
    assert lm.new_cache(1).format is None and lm.new_cache(1).bytes_per_token == 3 * (24 + 8) * 8
    cache = lm.new_cache(2, capacity=10, format="fp8")
    assert cache.format == "fp8" and cache.capacity == 10 and cache.dtype == torch.float64
    assert cache.bytes_per_token == 3 * (24 + 4 + 2 * 8)


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("lengths", [(6, 6), (2, 6)], ids=["even", "uneven"])
@torch.no_grad()
def test_attention_reads_what_is_stored(form, lengths, monkeypatch):
    """Both forms equal the unquantized form on a cache of values that FP8 has already been at, new tokens too."""
    cfg = config("v3")
    attention = MultiHeadLatentAttention.from_config(cfg, dtype=torch.float64)
    for parameter in attention.parameters():
        parameter.normal_(std=0.3)
    monkeypatch.setattr(attention, "prefers_absorbed", lambda queries, keys: form == "absorbed")
    sizes = (1, 2, cfg.kv_lora_rank, cfg.qk_rope_head_dim)
    ours, plain = LatentCache(*sizes, format="fp8", dtype=torch.float64), LatentCache(*sizes, dtype=torch.float64)
    past = ours.update_states(torch.randn(2, 6, cfg.latent_dim, dtype=torch.float64), 0)
    plain.update_states(torch.cat(ours.split(past), -1), 0)
    ours.rewind(lengths), plain.rewind(lengths)
    x = torch.randn(2, 3, cfg.hidden_size, dtype=torch.float64)
    slots = torch.tensor(lengths)[:, None] + torch.arange(3)
    rope = RotaryEmbedding.from_config(cfg)(slots)
    mask = (torch.arange(9)[: max(lengths) + 3] <= slots[:, :, None])[:, None]
    write = plain.write

    def of_stored(*arguments: Any) -> Tensor:
        held = write(*arguments)
        new = held[torch.arange(2)[:, None], slots]
        held[torch.arange(2)[:, None], slots] = torch.cat(unpack(pack(new, sizes[2]), sizes[2], torch.float64), -1)
        return held

    monkeypatch.setattr(plain, "write", of_stored)
    assert error(attention(x, rope, mask, ours), attention(x, rope, mask, plain)) < TOLERANCE


@torch.no_grad()
def test_decoding_dequantizes_tiles_and_never_a_layer(monkeypatch):
    cfg = config("v3")
    lm, ids = model(cfg), tokens(cfg, 2, 9)
    cache, tiles = lm.new_cache(2, format="fp8"), []
    lm(ids[:, :8], cache=cache)

    def refused(states: Tensor):
        raise AssertionError("a whole layer was dequantized")

    def watched(packed: Tensor, *arguments):
        tiles.append(packed.shape[1])
        return unpack(packed, *arguments)

    monkeypatch.setattr(cache, "split", refused)
    monkeypatch.setattr(packed_attention, "unpack", watched)
    monkeypatch.setattr(packed_attention, "_TILE", 4)
    monkeypatch.setattr(packed_attention, "_LEAST", 2)
    lm(ids[:, 8:], cache=cache)
    assert tiles == [2, 2, 2, 2, 1] * 3


@pytest.mark.parametrize("chunks", [[9], [4, 5], [1] * 9, [3, 1, 5]], ids=str)
@torch.no_grad()
def test_chunks_do_not_matter(chunks):
    lm = dense()
    ids = tokens(lm.config, 2, 9)
    whole, pieces, parts = lm.new_cache(2, format="fp8"), lm.new_cache(2, format="fp8"), []
    expected, start = lm(ids, cache=whole).logits, 0
    for size in chunks:
        parts.append(lm(ids[:, start : start + size], cache=pieces).logits)
        start += size
    assert error(torch.cat(parts, 1), expected) < TOLERANCE
    for one, other in zip(whole._buffers, pieces._buffers, strict=True):
        assert torch.equal(one[:, :9], other[:, :9])
    assert error(expected, lm(ids).logits) > 1e-4  # it is the bytes that attention reads


@torch.no_grad()
def test_padding_rewinding_and_reordering_with_a_model():
    """Rows that were padded, cut to different lengths and swapped go on as they would alone."""
    lm = dense()
    ids, more = tokens(lm.config, 2, 9), tokens(lm.config, 2, 2, seed=1)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    cache = lm.new_cache(2, format="fp8")
    lm(ids[:, :6], mask[:, :6], cache=cache)
    lm(ids[:, 6:], mask[:, 6:], cache=cache)
    assert cache.lengths == (5, 9)
    cache.rewind([3, 7])
    cache.reorder(torch.tensor([1, 0]))
    got = lm(more, cache=cache).logits
    for row, own in ((0, ids[1:, :7]), (1, ids[:1, 4:7])):
        alone = lm(torch.cat([own, more[row : row + 1]], 1), cache=lm.new_cache(1, format="fp8")).logits[:, -2:]
        assert error(got[row : row + 1], alone) < TOLERANCE


# ---------------------------------------------------------------- generation


@torch.no_grad()
def greedy(lm, row: Tensor, count: int) -> Tensor:
    """Everything again for each token, on an FP8 cache that lasts for one."""
    for _ in range(count):
        logits = lm(row, cache=lm.new_cache(1, format="fp8")).logits
        row = torch.cat([row, logits[:, -1:].argmax(-1)], 1)
    return row


@pytest.mark.parametrize("chunk", [None, 3])
def test_padded_prompts_continue_as_if_alone(chunk):
    lm = dense()
    ids = tokens(lm.config, 3, 7)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, :2], mask[2, :5] = 0, 0
    got = generate(lm, ids, mask, max_new_tokens=8, prefill_chunk=chunk, eos_token_id=[], cache_format="fp8")
    for row, start in enumerate((2, 0, 5)):
        assert torch.equal(got[row, start:], greedy(lm, ids[row : row + 1, start:], 8)[0])


@pytest.mark.parametrize("depth", [1, 3])
def test_speculation_rewinds_to_what_was_accepted(depth):
    """Rejected drafts leave the cache; with a random prediction layer that is nearly all of them."""
    lm = dense(num_nextn_predict_layers=1)
    ids = tokens(lm.config, 3, 7)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, :2], mask[2, :5] = 0, 0
    settings = {"max_new_tokens": 10, "eos_token_id": [], "cache_format": "fp8"}
    expected = generate(lm, ids, mask, **settings)
    got, report = generate(lm, ids, mask, mtp_depth=depth, adaptive=False, return_report=True, **settings)
    assert torch.equal(got, expected) and sum(report.drafted) > sum(report.accepted)


def test_every_kind_of_model_generates():
    for kind in ("v3", "v2-lite", "moonlight"):
        lm = model(config(kind))
        got = generate(lm, tokens(lm.config, 2, 5), max_new_tokens=4, eos_token_id=[], cache_format="fp8")
        assert got.shape == (2, 9) and (got >= 0).all() and (got < lm.config.vocab_size).all()


# ---------------------------------------------------------------- misuse


def test_a_gradient_is_refused_before_anything_is_stored():
    lm = model(config("v3"))
    ids = tokens(lm.config, 1, 4)
    cache = lm.new_cache(1, format="fp8")
    with pytest.raises(ValueError, match="no gradient through an FP8 cache"):
        lm(ids, cache=cache)
    assert cache.lengths == (0,)
    with torch.inference_mode():
        lm(ids, cache=cache)
    assert cache.lengths == (4,)


@pytest.mark.parametrize("wrong", ["fp4", "FP8", torch.float8_e4m3fn, ""])
def test_other_formats_are_refused(wrong):
    with pytest.raises(ValueError, match=r"expected format (None or 'fp8'|to be a string or None), got "):
        model(config("v3")).new_cache(1, format=wrong)


def test_wrong_shapes_are_named():
    cache = LatentCache(LAYERS, 2, RANK, ROPE, format="fp8")
    with pytest.raises(ValueError, match=r"states \[2, T, 8\], got \[2, 1, 15\]"):
        cache.update_states(torch.zeros(2, 1, packed_bytes(RANK, ROPE)), 0)
    assert cache.lengths == (0, 0)
