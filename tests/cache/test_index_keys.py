"""The indexer's keys in caches: beside the latents, in FP8, rewound, reordered, in rows of different length."""

from __future__ import annotations

import pytest
import torch

from deepseek_arch.cache.latent_cache import LatentCache
from deepseek_arch.cache.static_cache import StaticLatentCache
from deepseek_kernels.attention.packed_index_keys import pack_index_keys
from support import oracle, published, small_models
from support.small_models import SPARSE_KINDS, config, error, tokens

FORMATS = [None, "fp8"]


@pytest.fixture(params=SPARSE_KINDS)
def kind(request) -> str:
    return request.param


def make(kind: str):
    cfg = config(kind)
    weights = published.random_weights(cfg)
    return small_models.model(cfg, weights=weights), weights


def test_sizes():
    lm = small_models.model(config("glm-5"))
    plain, packed = lm.new_cache(2, 10), lm.new_cache(2, 10, format="fp8")
    # Layer 1 shares a selection and has no keys; 16 values each, or 16 bytes and a scale.
    assert plain.bytes_per_token == 3 * 4 * 32 + 2 * 4 * 16 and plain.nbytes == 20 * plain.bytes_per_token
    assert packed.bytes_per_token == 3 * (24 + 4 + 16) + 2 * (16 + 4) and packed.nbytes == 20 * packed.bytes_per_token
    v32 = LatentCache(1, 1, 512, 64, format="fp8", index_head_dim=128)
    assert v32.bytes_per_token == 656 + 132


@pytest.mark.parametrize("format", FORMATS)
def test_rewound_rows_go_on_as_if_nothing_had_been(kind, format):
    lm, _ = make(kind)
    ids, other = tokens(lm.config, 2, 24), tokens(lm.config, 2, 24, seed=1)
    with torch.no_grad():
        straight, turned = lm.new_cache(2, format=format), lm.new_cache(2, format=format)
        lm(ids[:, :14], cache=straight)
        lm(ids[:, :14], cache=turned)
        lm(other[:, :6], cache=turned)
        turned.rewind([14, 14])
        assert torch.equal(lm(ids[:, 14:], cache=turned).logits, lm(ids[:, 14:], cache=straight).logits)
        for buffer in turned._index_keys._buffers.values():
            assert not buffer[:, 24:].any()
        # Rows of different length.
        turned.rewind([11, 20])
        got = lm(other[:, :3], cache=turned).logits
        for row, length in enumerate((11, 20)):
            alone = lm.new_cache(1, format=format)
            lm(ids[row : row + 1, :length], cache=alone)
            assert error(got[row : row + 1], lm(other[row : row + 1, :3], cache=alone).logits) < 1e-5


@pytest.mark.parametrize("format", FORMATS)
def test_reordered_rows(kind, format):
    lm, _ = make(kind)
    ids = tokens(lm.config, 3, 20)
    order = torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        cache, want = lm.new_cache(3, format=format), lm.new_cache(4, format=format)
        lm(ids[:, :15], cache=cache)
        cache.reorder(order)
        lm(ids[order, :15], cache=want)
        assert error(lm(ids[order, 15:], cache=cache).logits, lm(ids[order, 15:], cache=want).logits) < 1e-5


@pytest.mark.parametrize("format", FORMATS)
def test_static_cache(kind, format):
    lm, weights = make(kind)
    ids = tokens(lm.config, 2, 24)
    with torch.no_grad():
        growing, held = lm.new_cache(2, format=format), lm.new_cache(2, format=format)
        lm(ids[:, :14], cache=growing)
        lm(ids[:, :14], cache=held)
        static = StaticLatentCache(held, 32)
        assert static.index_head_dim == 16 and static.index_format == growing.index_format
        parts = [lm(ids[:, t : t + 1], cache=static).logits for t in range(14, 20)]
        want = [lm(ids[:, t : t + 1], cache=growing).logits for t in range(14, 20)]
        assert error(torch.cat(parts, 1), torch.cat(want, 1)) < 1e-5
        static.rewind([16, 12])
        growing.rewind([16, 12])
        assert error(lm(ids[:, 20:22], cache=static).logits, lm(ids[:, 20:22], cache=growing).logits) < 1e-5
    if format is None:
        whole = torch.cat((ids[0, :16], ids[0, 20:22])).tolist()
        cache = lm.new_cache(1)
        with torch.no_grad():
            out = lm(torch.tensor([whole]), cache=cache).logits[0]
        assert error(out, oracle.run(lm.config, weights, whole).logits) < 1e-4


def test_growth_keeps_keys(kind):
    lm, weights = make(kind)
    ids = tokens(lm.config, 1, 90)
    cache = lm.new_cache(1, 4)
    with torch.no_grad():
        out = torch.cat([lm(part, cache=cache).logits for part in ids.split(30, 1)], 1)
    assert cache.capacity >= 90
    assert error(out, oracle.run_batch(lm.config, weights, ids)) < 1e-4


def test_a_failed_pass_leaves_the_keys_as_they_were(kind):
    lm, _ = make(kind)
    ids, cache = tokens(lm.config, 1, 20), lm.new_cache(1)
    with torch.no_grad():
        lm(ids[:, :12], cache=cache)
        before = [buffer[:, :12].clone() for buffer in cache._index_keys._buffers.values()]
        last, lm.model.norm.forward = lm.model.norm.forward, None
        with pytest.raises(TypeError):
            lm(ids[:, 12:], cache=cache)
        lm.model.norm.forward = last
    assert cache.lengths == (12,)
    for old, buffer in zip(before, cache._index_keys._buffers.values(), strict=True):
        assert torch.equal(buffer[:, :12], old)


def test_bytes_are_those_of_the_keys():
    cache = LatentCache(1, 2, 8, 4, format="fp8", index_head_dim=16)
    keys = torch.randn(2, 5, 16)
    with cache.append(5):
        got = cache.update_indexer(pack_index_keys(keys), 0)
        cache.update_states(torch.randn(2, 5, 12), 0)
    assert torch.equal(got, pack_index_keys(keys))


def test_mistakes_are_named():
    plain = LatentCache(2, 1, 8, 4, index_head_dim=16, index_layers=[0])
    with pytest.raises(ValueError, match=r"expected the indexer's keys \[1, T, 16\], got \[1, 3, 8\]"):
        plain.update_indexer(torch.zeros(1, 3, 8), 0)
    with pytest.raises(ValueError, match=r"a layer with an indexer, \(0,\), got 1"):
        plain.update_indexer(torch.zeros(1, 3, 16), 1)
    with pytest.raises(ValueError, match=r"keys as torch\.float32, got torch\.uint8"):
        plain.update_indexer(torch.zeros(1, 3, 16, dtype=torch.uint8), 0)
    with pytest.raises(ValueError, match="expected a cache with index_head_dim"):
        LatentCache(1, 1, 8, 4).update_indexer(torch.zeros(1, 3, 16), 0)
    with pytest.raises(ValueError, match="expected index_format None or 'fp8', got 'int8'"):
        LatentCache(1, 1, 8, 4, index_head_dim=16, index_format="int8")
    with pytest.raises(ValueError, match="expected index_head_dim >= 1, got 0"):
        LatentCache(1, 1, 8, 4, index_head_dim=0)
    with pytest.raises(ValueError, match="expected scale_format None or 'ue8m0', got 'int8'"):
        LatentCache(1, 1, 8, 4, scale_format="int8")
