"""Plans of serving against published figures, and sizes against the accounting of one device."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import deepseek_arch as da
from deepseek_arch.layout.accounting import weight_bytes
from deepseek_arch.layout.parallel_layout import LayoutError, ParallelLayout
from deepseek_arch.planning.devices import DEVICES
from deepseek_arch.planning.inference import InferenceSetup, exchange_seconds, plan_inference

V3 = da.DeepseekConfig.from_pretrained("deepseek-v3")
H800 = DEVICES["h800"]


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2-lite", "kimi-k2-instruct", "deepseek-v3.2"])
def test_one_device_holds_the_published_weights(name):
    config = da.DeepseekConfig.from_pretrained(name)
    one = ParallelLayout(dp_shard=1)
    precision = "fp8" if config.weight_block_size else "bf16"
    norms = 0
    if config.is_sparse_attention:  # V3.2's files keep norms in float32; a model in memory has them in bfloat16
        heads = config.q_lora_rank + config.kv_lora_rank + 2 * config.index_head_dim
        norms = 2 * (config.num_hidden_layers * (2 * config.hidden_size + heads) + config.hidden_size)
    plan = plan_inference(config, one, "h200", InferenceSetup(precision=precision))
    assert plan.memory["weights"] == weight_bytes(config, precision) - norms
    assert not plan.fits or name == "deepseek-v2-lite"


def test_the_cache_of_deepseek_v3_is_70_272_bytes_a_token():
    plan = plan_inference(V3, ParallelLayout(dp_shard=8, ep=8), "h200", InferenceSetup(batch=3, context=1000))
    assert plan.memory["cache"] == 3 * 1000 * 70_272


def test_tensor_parallel_ranks_all_hold_the_cache():
    """Tensor-parallel ranks repeat the latents of their common sequences: cutting heads saves no cache."""
    setup = InferenceSetup(batch=8)
    one = plan_inference(V3, ParallelLayout(dp_shard=8, ep=8), "h200", setup)
    cut = plan_inference(V3, ParallelLayout(dp_shard=1, tp=8, ep=8), "h200", setup)
    assert cut.memory["cache"] == one.memory["cache"]
    assert cut.memory["weights"] < one.memory["weights"]


@given(st.integers(1, 256), st.integers(1, 8192), st.sampled_from([8, 16, 32]))
def test_the_largest_batch_just_fits(batch, context, ep):
    setup = InferenceSetup(batch=batch, context=context)
    plan = plan_inference(V3, ParallelLayout(dp_shard=ep, ep=ep), "h200", setup)
    assert plan.fits == (plan.largest_batch >= batch)
    if plan.largest_batch:  # whichever batch was asked about
        most = replace(setup, batch=plan.largest_batch)
        found = plan_inference(V3, ParallelLayout(dp_shard=ep, ep=ep), "h200", most)
        assert found.fits and found.largest_batch == plan.largest_batch
    assert plan.step_seconds > 0 and plan.decode_tokens_per_second == pytest.approx(batch / plan.step_seconds)
    json.dumps(plan.to_dict())


@given(st.integers(1, 128), st.integers(1, 128))
def test_larger_batches_and_contexts_never_take_less_time(a, b):
    few, many = sorted((a, b))
    layout = ParallelLayout(dp_shard=16, ep=16)

    def step(batch, context):
        return plan_inference(V3, layout, "h800", InferenceSetup(batch=batch, context=context)).step_seconds

    assert step(few, 4096) <= step(many, 4096)
    assert step(8, few * 64) <= step(8, many * 64)


# ----------------------------------------------------------------------- published


@pytest.mark.parametrize(
    ("ranks", "dispatch", "combine"), [(8, 77e-6, 114e-6), (64, 173e-6, 314e-6), (256, 194e-6, 360e-6)]
)
def test_low_latency_exchanges_take_what_deepep_measured(ranks, dispatch, combine):
    """deepseek-ai/DeepEP, low-latency kernels on H800: 128 tokens, top 8, FP8 out, BF16 back."""
    out = exchange_seconds(7168, 8, 128, ranks, H800, 1 + 4 / 128, ranks)
    back = exchange_seconds(7168, 8, 128, ranks, H800, 2.0, ranks)
    assert out == pytest.approx(dispatch, rel=0.16)
    assert back == pytest.approx(combine, rel=0.16)


def test_the_published_bound_of_decoding_follows_from_the_same_formula():
    """arXiv 2505.09343, section 2.3.2: 2 x (1 + 2) bytes x 32 tokens x 9 x 7K at 50 GB/s, x 61 layers: 14.76 ms."""
    far = 10**9  # no row stays at home
    device = H800.__class__(**{f: getattr(H800, f) for f in H800.__dataclass_fields__} | {"small_network": 50e9})
    one_way = [exchange_seconds(7000, 9, 32, far, device, value, far) for value in (1.0, 2.0)]
    assert 2 * sum(one_way) * 61 == pytest.approx(14.76e-3, rel=1e-3)


def test_decoding_is_bounded_above_what_was_measured():
    """EP144, 32 redundant experts, 4,989 cached tokens: 14.8k tokens/s a node on average (DeepSeek, open-infra-index),
    22.3k at best elsewhere (SGLang on H100). A bound lies above both, and not by so much that it says nothing."""
    layout = ParallelLayout(ep=144).for_devices(144)
    setup = InferenceSetup(batch=88, context=4989, redundant=32)
    plan = plan_inference(V3, layout, "h800", setup)
    node = 8 * plan.decode_tokens_per_second
    assert 22.3e3 < node < 2 * 22.3e3
    assert plan.fits
    # DeepSeek serves 20 to 22 tokens/s to each user; one step of this batch may not take longer.
    assert plan.step_seconds < 1 / 22


def test_prefill_is_bounded_above_what_was_measured():
    """SGLang reached 52.3k tokens/s a node of H100 with prompts of 2,000 tokens."""
    layout = ParallelLayout(ep=32).for_devices(32)
    plan = plan_inference(V3, layout, "h800", InferenceSetup(context=2048))
    assert 52.3e3 < 8 * plan.prefill_tokens_per_second < 1.5 * 52.3e3


def test_overlap_hides_the_shorter_of_both():
    layout = ParallelLayout(dp_shard=64, ep=64)
    together = plan_inference(V3, layout, "h800", InferenceSetup(batch=64))
    apart = plan_inference(V3, layout, "h800", InferenceSetup(batch=64, overlap=False))
    parts = together.decode
    computing = parts.attention + parts.dense + parts.experts + parts.tensor
    assert together.step_seconds == max(computing, parts.exchange)
    assert apart.step_seconds == computing + parts.exchange


# -------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("axes", "setup", "message"),
    [
        ({"pp": 2, "dp_shard": 4}, {}, "expected pp = cp = 1 for serving, got pp 2, cp 1"),
        ({"dp_shard": 1, "tp": 32, "ep": 32}, {}, "FP8 blocks of 128"),
        (
            {"dp_shard": 32, "ep": 32},
            {"redundant": 8},
            r"expected ep = 32 to divide n_routed_experts \+ redundant experts = 264",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(axes, setup, message):
    with pytest.raises(LayoutError, match=message):
        plan_inference(V3, ParallelLayout(**axes), "h800", InferenceSetup(**setup))


@pytest.mark.parametrize("arguments", [{"batch": 0}, {"context": 0}, {"precision": "int4"}, {"redundant": -1}])
def test_setups_are_checked(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"expected {name} "):
        InferenceSetup(**arguments)
