"""Configs of models with sparse attention: V3.2 and GLM-5, whose layers may share a selection."""

from __future__ import annotations

import pytest

import deepseek_arch as da
from deepseek_arch import ConfigError, DeepseekConfig
from deepseek_arch.layout.accounting import count_parameters, decode_flops_per_token, indexer_cache_bytes
from deepseek_arch.layout.parameter_map import layout
from deepseek_arch.layout.subset import select_subset
from support import small_models

GLM = small_models.config("glm-5").to_dict() | {"num_hidden_layers": 7}
GLM.pop("indexer_types")


@pytest.mark.parametrize("name", ["deepseek-v3.2", "deepseek-v3.2-exp"])
def test_published_v32_selects_in_every_layer(name):
    config = DeepseekConfig.from_pretrained(name)
    assert config.indexer_layers == tuple(range(61)) and config.has_indexer(61)
    assert not config.indexer_rope_interleave and not config.simulate_fp8
    assert "indexer_types" not in config.to_dict()


@pytest.mark.parametrize(
    ("fields", "letters"),
    [
        ({}, None),
        ({"index_topk_freq": 1}, None),
        ({"index_topk_freq": 2}, "FFSFSFS"),  # the offset's default is 2
        ({"index_topk_freq": 4, "index_skip_topk_offset": 3}, "FFFSSSF"),
        ({"index_topk_freq": 2, "index_topk_pattern": "FSSFSSF"}, "FSSFSSF"),
        ({"indexer_types": ["full"] * 3 + ["shared"] * 4, "index_topk_freq": 2}, "FFFSSSS"),
    ],
)
def test_layers_of_glm_5_that_share_a_selection(fields, letters):
    config = DeepseekConfig.from_dict(GLM | fields)
    types = None if letters is None else tuple({"F": "full", "S": "shared"}[letter] for letter in letters)
    assert config.indexer_types == types
    assert config.indexer_rope_interleave
    assert config.has_indexer(7)  # an MTP module
    assert DeepseekConfig.from_dict(config.to_dict()) == config
    transformers = pytest.importorskip("transformers")
    if hasattr(transformers, "GlmMoeDsaConfig"):
        native = transformers.GlmMoeDsaConfig(**{k: v for k, v in (GLM | fields).items() if k != "torch_dtype"})
        assert tuple(native.indexer_types) == (types or ("full",) * 7)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"indexer_types": ["full"] * 6}, "indexer_types for 7 layers, got 6"),
        ({"indexer_types": ["shared"] * 7}, "the first of indexer_types to be full"),
        ({"index_topk_pattern": "FXFFFFF"}, "indexer_types to be a list of full and shared"),
        ({"index_topk_freq": "two"}, "index_topk_freq to be an integer from 0"),
        ({"index_head_dim": 4}, "index_head_dim >= qk_rope_head_dim"),
        ({"index_head_dim": 24, "simulate_fp8": True}, "a power of two up to 128 with simulate_fp8, got 24"),
        ({"indexer_rope_interleave": "yes"}, "indexer_rope_interleave to be true or false"),
    ],
)
def test_mistakes_are_named(fields, words):
    with pytest.raises(ConfigError, match=words):
        DeepseekConfig.from_dict(GLM | fields)
    with pytest.raises(ConfigError, match="expected index_topk with simulate_fp8"):
        small_models.config("v3", simulate_fp8=True)


def test_fewer_layers():
    config = DeepseekConfig.from_dict(GLM | {"index_topk_pattern": "FSSFSFS"})
    assert config.replace(num_hidden_layers=3).indexer_types == ("full", "shared", "shared")
    assert select_subset(config, [0, 2, 5, 6]).config.indexer_types == ("full", "shared", "full", "shared")
    for layers in ([1, 3], [0, 4], [0, 3, 6]):
        with pytest.raises(ValueError, match="whose selection of keys layer"):
            select_subset(config, layers)


def test_layers_without_an_indexer_have_no_weights_cache_or_scores():
    shared = DeepseekConfig.from_dict(GLM | {"index_topk_pattern": "FSSFSFS"})
    full = shared.replace(indexer_types=None)
    names = [slot.name for slot in layout(shared) if ".indexer.wk." in slot.name]
    assert names == [f"model.layers.{layer}.self_attn.indexer.wk.weight" for layer in (0, 3, 5)]
    count, whole = count_parameters(shared), count_parameters(full)
    assert count.indexers == 3 and whole.indexers == 7 and count.indexer == whole.indexer
    assert whole.total - count.total == 4 * count.indexer
    assert indexer_cache_bytes(shared) * 7 == indexer_cache_bytes(full) * 3
    lm = da.DeepseekLM(shared, device="meta")
    assert sum(t.numel() for t in lm.state_dict().values()) == count.total
    # Beyond the projections, a layer's indexer scores every key.
    grown = [decode_flops_per_token(c, 2000) - decode_flops_per_token(c, 1000) for c in (shared, full)]
    assert grown[1] * 3 == grown[0] * 7 == 7 * 3 * 1000 * 2 * 16 * 16
