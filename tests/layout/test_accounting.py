"""Counts against the authors' figures, and those derived from the published files' headers, to the last integer."""

from __future__ import annotations

import collections
import math

import pytest
import torch

from deepseek_arch.config.deepseek_config import DeepseekConfig, presets
from deepseek_arch.layout.accounting import (
    checkpoint_bytes,
    count_parameters,
    decode_flops_per_token,
    expanded_cache_bytes,
    flops_per_token,
    indexer_cache_bytes,
    kv_cache_bytes,
    weight_bytes,
)
from deepseek_arch.layout.published_tensors import layer_weights, published_tensors
from support import published


def config(name: str) -> DeepseekConfig:
    return DeepseekConfig.from_pretrained(name)


# Sums over the headers of the published files: main total; activated with embedding and head, without embedding,
# without both; total without both.
PARAMETERS = {
    "deepseek-v2-lite": (15_706_484_224, 2_661_150_208, 2_451_435_008, 2_241_719_808, 15_287_053_824),
    "deepseek-v2": (235_741_434_880, 21_375_800_320, 20_851_512_320, 20_327_224_320, 234_692_858_880),
    "deepseek-v2.5": (235_741_434_880, 21_375_800_320, 20_851_512_320, 20_327_224_320, 234_692_858_880),
    "deepseek-v3": (671_026_419_200, 37_552_297_472, 36_625_618_432, 35_698_939_392, 669_173_061_120),
    "deepseek-r1": (671_026_419_200, 37_552_297_472, 36_625_618_432, 35_698_939_392, 669_173_061_120),
    "deepseek-v3.1": (671_026_419_200, 37_552_297_472, 36_625_618_432, 35_698_939_392, 669_173_061_120),
    "deepseek-v3.2": (671_877_944_064, 38_403_822_336, 37_477_143_296, 36_550_464_256, 670_024_585_984),
    "deepseek-v3.2-exp": (671_877_944_064, 38_403_822_336, 37_477_143_296, 36_550_464_256, 670_024_585_984),
    "kimi-k2-instruct": (1_026_408_232_448, 32_861_500_928, 31_687_095_808, 30_512_690_688, 1_024_059_422_208),
    "moonlight-16b-a3b": (15_960_110_208, 2_914_776_192, 2_579_231_872, 2_243_687_552, 15_289_021_568),
    "glm-4.7-flash": (29_943_393_920, 3_896_766_080, 3_579_571_840, 3_262_377_600, 29_309_005_440),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_equal_the_derived_figures(name):
    count = count_parameters(config(name))
    assert (
        count.total,
        count.activated,
        count.activated_without_embedding,
        count.activated_without_embedding_and_head,
        count.total_without_embedding_and_head,
    ) == PARAMETERS[name]


# Reports and model cards: billions as the authors print them, which of our figures their activated number is, the unit
# of its last digit (V2-Lite's 2.451 is printed as 2.4, so cut and not rounded: a whole unit is allowed).
@pytest.mark.parametrize(
    ("name", "total", "activated", "field", "unit"),
    [
        ("deepseek-v3", 671, 36.6, "activated_without_embedding", 0.1),
        ("deepseek-v2", 236, 21, "activated_without_embedding", 1),
        ("deepseek-v2-lite", 15.7, 2.4, "activated_without_embedding", 0.1),
        ("kimi-k2-instruct", 1026, 32, "activated_without_embedding", 1),
        ("moonlight-16b-a3b", 16, 2.24, "activated_without_embedding_and_head", 0.01),
        ("glm-4.7-flash", 30, 3, "activated_without_embedding_and_head", 1),
    ],
)
def test_parameters_round_to_what_the_authors_print(name, total, activated, field, unit):
    count = count_parameters(config(name))
    assert abs(count.total / 1e9 - total) < (0.5 if total > 16 else 0.05)
    assert abs(getattr(count, field) / 1e9 - activated) < unit


@pytest.mark.parametrize(
    ("name", "unique", "stored"),
    [
        ("deepseek-v3", 11_610_068_224, 13_463_426_304),
        ("deepseek-v3.2", 11_624_027_648, 13_477_385_728),  # unique: stored - 2 x 129280 x 7168
        ("glm-4.7-flash", 643_706_176, 1_278_094_656),  # unique: stored - 2 x 154880 x 2048
        ("deepseek-v2", 0, 0),
        ("kimi-k2-instruct", 0, 0),
    ],
)
def test_multi_token_prediction_layers(name, unique, stored):
    count = count_parameters(config(name))
    assert (count.mtp, count.mtp_stored) == (unique, stored)


def test_published_mtp_sizes_leave_out_eh_proj():
    """README_WEIGHTS.md: 11.5B unique, 2.4B activated with embedding and head, 1.5B with the head."""
    cfg = config("deepseek-v3")
    count = count_parameters(cfg)
    layer_and_norms = count.mtp - 2 * 7168 * 7168
    active = layer_and_norms - (256 - 8) * count.expert
    assert round(layer_and_norms / 1e9, 1) == 11.5
    assert int(10 * (active + count.embedding + count.head) / 1e9) / 10 == 2.4
    assert round((active + count.head) / 1e9, 1) == 1.5


def test_parts_of_v3():
    count = count_parameters(config("deepseek-v3"))
    assert count.attention == 187_107_328
    assert count.layer_norms == 14_336
    assert count.dense_mlp == 396_361_728
    assert count.expert == 44_040_192
    assert count.shared_experts == 44_040_192
    assert count.router == 1_835_264
    assert count.moe_layer == 11_507_286_272
    assert count.dense_layer == 583_483_392
    assert count.embedding + count.head + count.final_norm == 1_853_365_248
    assert (count.dense_layers, count.moe_layers) == (3, 58)
    assert count.indexer == 0


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("deepseek-v2", 23_592_960),
        ("deepseek-v2-lite", 8_650_752),
        ("moonlight-16b-a3b", 8_650_752),
        ("kimi-k2-instruct", 44_040_192),
        ("glm-4.7-flash", 9_437_184),
    ],
)
def test_one_expert(name, expert):
    assert count_parameters(config(name)).expert == expert


def test_indexers_of_v32():
    count = count_parameters(config("deepseek-v3.2"))
    assert 61 * count.indexer == 851_524_864


def test_correction_biases_are_counted():
    """58 routers of 256 experts; V2 routes without a bias."""
    cfg = config("deepseek-v3")
    biases = [t for t in published_tensors(cfg) if t.name.endswith("e_score_correction_bias")]
    assert sum(math.prod(t.shape) for t in biases) - 256 == 58 * 256 == 14_848  # one more in the MTP layer
    assert not any("e_score_correction_bias" in t.name for t in published_tensors(config("deepseek-v2")))


# ------------------------------------------------------------------ checkpoints

# The published files: tensors, elements, payload bytes. Strays, which every loader skips, are taken off: Kimi-K2 stores
# one BF16 [56] a layer, Moonlight has 27 x 64 elements more than its weights.
CHECKPOINTS = {
    "deepseek-v3": (91_991, 684_531_386_000, 688_574_839_360),
    "deepseek-r1": (91_991, 684_531_386_000, 688_574_839_360),
    "deepseek-v3.1": (91_991, 684_531_386_000, 688_574_839_360),
    "deepseek-v3.2": (92_425, 685_396_921_376, 689_471_107_200),
    "deepseek-v3.2-exp": (92_425, 685_396_921_376, 689_471_107_200),
    "kimi-k2-instruct": (139_644 - 61, 1_026_470_731_056 - 61 * 56, 1_029_173_256_720 - 61 * 56 * 2),
    "deepseek-v2-lite": (5_291, 15_706_484_224, 31_412_968_448),
    "deepseek-v2": (29_102, 235_741_434_880, 471_482_869_760),
    "moonlight-16b-a3b": (5_317, 15_960_111_936 - 27 * 64, None),
    "glm-4.7-flash": (9_703, 31_221_488_576, 62_442_983_168),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_hold_the_published_tensors(name):
    tensors, elements, payload = CHECKPOINTS[name]
    listed = list(published_tensors(config(name)))
    assert len({tensor.name for tensor in listed}) == len(listed) == tensors
    assert sum(math.prod(tensor.shape) for tensor in listed) == elements
    assert payload in (None, checkpoint_bytes(config(name)))


# The published files of V3 and V3.2 by dtype: tensors and elements.
@pytest.mark.parametrize(
    ("name", "fp8", "scales", "float32", "bfloat16"),
    [
        ("deepseek-v3", (45_808, 680_571_043_840), (45_808, 41_540_496), (59, 15_104), (316, 3_918_786_560)),
        # V3.2: 314 norm weights with 1,052,416 elements and 121 biases with 23,040 are float32.
        ("deepseek-v3.2", (45_932, 681_408_069_632), (45_932, 41_591_584), (435, 1_075_456), (126, 3_946_184_704)),
    ],
)
def test_checkpoints_by_dtype(name, fp8, scales, float32, bfloat16):
    tensors, elements = collections.Counter(), collections.Counter()
    for tensor in published_tensors(config(name)):
        kind = "scales" if tensor.name.endswith("_scale_inv") else tensor.dtype
        tensors[kind] += 1
        elements[kind] += math.prod(tensor.shape)
    found = {kind: (tensors[kind], elements[kind]) for kind in tensors}
    assert found == {"F8_E4M3": fp8, "scales": scales, "F32": float32, "BF16": bfloat16}


def test_partial_fp8_blocks_have_their_own_scale():
    """TRAPS E2: ceil(rows / 128), never rows / scale_rows: 576 rows are 5 blocks, the last of 64 rows."""
    shapes = {tensor.name: tensor.shape for tensor in published_tensors(config("deepseek-v3"))}
    assert shapes["model.layers.61.self_attn.kv_a_proj_with_mqa.weight_scale_inv"] == (5, 56)
    assert len([name for name in shapes if name.startswith("model.layers.61.")]) == 1_564


@pytest.mark.parametrize("name", presets())
def test_listing_equals_the_independent_one(name):
    """`tests/published.py` was written from the listings of the files."""
    ours = {t.name: t.shape for t in published_tensors(config(name)) if not t.name.endswith("_scale_inv")}
    assert ours == published.shapes(config(name))


# --------------------------------------------------------------- built models


@pytest.mark.parametrize("name", ["tiny", "mini", "deepseek-v2-lite", "moonlight-16b-a3b", "deepseek-v3"])
def test_parameters_equal_those_of_the_model_built(name):
    from deepseek_arch.models.causal_lm import DeepseekLM

    model = DeepseekLM(config(name), device="meta")
    count = count_parameters(config(name))
    biases = [b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
    built = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in biases)
    assert built == count.total + count.mtp
    in_memory = sum(p.numel() * 2 for p in model.parameters()) + sum(b.numel() * 4 for b in biases)
    assert in_memory == weight_bytes(config(name), "bf16", mtp=True)


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"attention_bias": True}, {"n_shared_experts": 0}])
def test_variants_equal_the_model_built(changes):
    from deepseek_arch.models.causal_lm import DeepseekLM

    cfg = config("tiny").replace(**changes)
    model = DeepseekLM(cfg, device="meta")
    tensors = [*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))]
    count = count_parameters(cfg)
    assert sum(tensor.numel() for tensor in tensors) == count.total + count.mtp
    if cfg.tie_word_embeddings:
        assert count.total == count.activated + (16 - 4) * 2 * count.expert
        assert count.activated == count.activated_without_embedding


def test_mini_has_about_a_hundred_million_parameters():
    count = count_parameters(config("mini"))
    assert 90e6 < count.total < 100e6 < count.total + count.mtp < 110e6


def test_tiny_leaves_partial_fp8_blocks_in_every_projection():
    """A block size read from the shapes instead of the config (TRAPS E2) cannot load it."""
    cfg = config("tiny")
    partial = {
        tensor.name.split(".")[-2]
        for tensor in published_tensors(cfg)
        if tensor.dtype == "F8_E4M3" and (tensor.shape[0] % 128 or tensor.shape[1] % 128)
    }
    assert partial == {
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    assert cfg.n_group == 4 and cfg.q_lora_rank and cfg.yarn and cfg.num_nextn_predict_layers == 1


# ----------------------------------------------------------------------- bytes


# From the config files: elements a token.
@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("deepseek-v3", 35_136),
        ("kimi-k2-instruct", 35_136),
        ("deepseek-v2", 34_560),
        ("deepseek-v2-lite", 15_552),
        ("moonlight-16b-a3b", 15_552),
        ("glm-4.7-flash", 27_072),
    ],
)
def test_latent_cache(name, elements):
    """TRAPS B7: one latent and one rotated key, not twice and not per head."""
    assert kv_cache_bytes(config(name)) == 2 * elements
    assert kv_cache_bytes(config(name), tokens=1000, bytes_per_value=4) == 4000 * elements


def test_latent_cache_of_v3_is_what_the_authors_print():
    """70.272 KB, 4.66 times less than Qwen-2.5-72B's 327.680 KB (arXiv 2505.09343, table 1)."""
    size = kv_cache_bytes(config("deepseek-v3"))
    assert size == 70_272
    assert round(327_680 / size, 2) == 4.66


def test_latent_cache_of_v2_against_deepseek_67b():
    """DeepSeek-V2 report: 93.3% smaller, which counts 6 bits a value against 16 (67B: 95 layers, 8 heads of 128)."""
    values = kv_cache_bytes(config("deepseek-v2"), bytes_per_value=1)
    dense = 95 * 2 * 8 * 128
    assert round(1 - values * 6 / (dense * 16), 4) == 0.9334
    assert round(1 - values / dense, 3) == 0.822


def test_expanded_cache_of_v3():
    """128 heads of 192 + 128 values a layer."""
    assert expanded_cache_bytes(config("deepseek-v3")) == 40_960 * 61 * 2
    assert expanded_cache_bytes(config("glm-4.7-flash"), tokens=3) == 20 * (256 + 256) * 47 * 2 * 3


def test_indexer_cache_of_v32():
    """128 FP8 values and one float32 scale, beside the latent."""
    assert indexer_cache_bytes(config("deepseek-v3.2")) == 132 * 61
    assert indexer_cache_bytes(config("deepseek-v3.2"), tokens=10) == 1320 * 61
    assert indexer_cache_bytes(config("deepseek-v3")) == 0


def test_weights_in_memory():
    cfg = config("deepseek-v3")
    count = count_parameters(cfg)
    biases = 58 * 256
    assert weight_bytes(cfg, "fp32") == 4 * count.total
    assert weight_bytes(cfg, "bf16") == 2 * count.total + 2 * biases  # the biases stay float32 (TRAPS C2)
    # An FP8 model in memory is its checkpoint less the duplicates that the MTP layer stores.
    assert weight_bytes(cfg, "fp8", mtp=True) == 688_574_839_360 - 2 * (count.embedding + count.head)
    assert weight_bytes(config("deepseek-v3.2"), "fp8", mtp=True) == 689_471_107_200 - 4 * count.embedding
    with pytest.raises(ValueError, match="bf16, fp32 or fp8, got 'int4'"):
        weight_bytes(cfg, "int4")


# ----------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize(("name", "gflops"), [("deepseek-v3", 250), ("deepseek-v2", 155)])
def test_training_flops_are_what_the_authors_print(name, gflops):
    """arXiv 2505.09343, table 2: GFLOPs per token at sequence length 4096, to within 1%."""
    assert flops_per_token(config(name), 4096, training=True) / 1e9 == pytest.approx(gflops, rel=0.01)


def test_inference_flops_count_matrix_parameters_twice():
    """TRAPS H6: the head is a product, the embedding is a lookup, norms and biases are no products."""
    cfg = config("deepseek-v3")
    count = count_parameters(cfg)
    vectors = 61 * (count.layer_norms + 1536 + 512) + count.final_norm + 58 * 256
    products = 2 * (count.activated_without_embedding - vectors)
    for length in (1, 4096):
        causal = 61 * 128 * (192 + 128) * (length + 1)  # 2 FLOPs for (length + 1) / 2 keys on average
        assert flops_per_token(cfg, length) == products + causal
    assert flops_per_token(cfg, 4096, training=True) == 3 * flops_per_token(cfg, 4096)
    absorbed = 2 * 61 * 128 * (576 + 512) * 4096
    assert decode_flops_per_token(cfg, 4096) == products + absorbed


def test_flops_by_adding_up_every_query():
    """A sequence of V3.2 beyond `index_topk`: every query scores all its keys and attends to 2048 of them at most."""
    cfg = config("deepseek-v3.2")
    length, layers = 5000, 61
    linear = decode_flops_per_token(cfg, 1) - layers * (2 * 128 * (576 + 512) + 2 * 64 * 128)
    pairs = sum(2 * 128 * 320 * min(seen, 2048) + 2 * 64 * 128 * seen for seen in range(1, length + 1))
    assert flops_per_token(cfg, length) == linear + layers * pairs // length
    decode = 2 * 128 * (576 + 512) * 2048 + 2 * 64 * 128 * length
    assert decode_flops_per_token(cfg, length) == linear + layers * decode


def test_multi_token_prediction_adds_its_layer_projection_and_the_head_again():
    cfg = config("deepseek-v3")
    count = count_parameters(cfg)
    layer = count.moe_layer - (256 - 8) * count.expert - count.layer_norms - 1536 - 512 - 256
    extra = 2 * (layer + 2 * 7168 * 7168 + count.head) + 128 * 320 * 4097
    assert flops_per_token(cfg, 4096, mtp=True) - flops_per_token(cfg, 4096) == extra


@pytest.mark.parametrize("function", [flops_per_token, decode_flops_per_token])
def test_flops_of_an_empty_context_are_refused(function):
    with pytest.raises(ValueError, match="context_length >= 1, got 0"):
        function(config("tiny"), 0)


def test_counting_allocates_no_tensor(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a tensor was created")

    for name in ("empty", "zeros", "ones", "randn", "tensor"):
        monkeypatch.setattr(torch, name, refuse)
    assert count_parameters(config("deepseek-v3")).total == 671_026_419_200


def test_prediction_layers_of_two_kinds_are_counted_one_by_one():
    """The dense prefix may reach into the MTP modules: the first of them is dense here, the second is not."""
    cfg = config("tiny").replace(first_k_dense_replace=config("tiny").num_hidden_layers + 1, num_nextn_predict_layers=2)
    listed = sum(t.nbytes for t in published_tensors(cfg.replace(quantization_config=None)))
    counted = count_parameters(cfg)
    router_biases = cfg.expert_sizes.routed  # one layer's, in float32
    assert listed == 2 * (counted.total + counted.mtp_stored + router_biases)
    dense, moe = (list(layer_weights(cfg, cfg.num_hidden_layers + depth)) for depth in (0, 1))
    assert not any(w.part == "experts" for w in dense) and any(w.part == "experts" for w in moe)


def test_ten_thousand_layers_are_counted_at_once():
    """Layers of a kind are counted together: a hundred times the layers, not a hundred times the weights looked at."""
    cfg = config("deepseek-v3")
    deep = cfg.replace(num_hidden_layers=10_000)
    per_layer = count_parameters(cfg).moe_layer
    assert count_parameters(deep).total - count_parameters(cfg).total == (10_000 - 61) * per_layer
    assert weight_bytes(deep, "fp32") - weight_bytes(cfg, "fp32") == 4 * (10_000 - 61) * per_layer
