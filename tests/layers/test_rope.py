"""Rotary embeddings and YaRN: TRAPS A1 to A11."""

import math

import pytest
import torch

from deepseek_arch.config.deepseek_config import ConfigError, DeepseekConfig
from deepseek_arch.layers.rope import RotaryEmbedding, inverse_frequencies
from deepseek_kernels import rope
from support.oracle import rotary_frequencies
from support.oracle import rotate as oracle_rotate
from support.oracle import softmax_scale as oracle_scale
from support.small_models import YARN, config, error

EPS32 = torch.finfo(torch.float32).eps
PUBLISHED = ["deepseek-v3", "deepseek-v2", "deepseek-v2-lite", "kimi-k2-instruct", "glm-4.7-flash", "moonlight-16b-a3b"]


def _frequencies(cfg: DeepseekConfig) -> torch.Tensor:
    return inverse_frequencies(cfg.qk_rope_head_dim, cfg.rope_theta, cfg.yarn)


def _rotated(cfg: DeepseekConfig, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    cos, sin = RotaryEmbedding.from_config(cfg)(positions[None])
    return rope(x[None], cos, sin)[0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_frequencies(name):
    cfg = DeepseekConfig.from_pretrained(name)
    expected = torch.tensor(rotary_frequencies(cfg), dtype=torch.float64)
    # Relative per frequency: the smallest ones matter at long context. One power, one division, one blend.
    assert ((_frequencies(cfg) / expected - 1).abs() < 8 * EPS32).all()


@pytest.mark.parametrize(
    ("name", "low", "high"), [("deepseek-v3", 10, 23), ("kimi-k2-instruct", 19, 20), ("deepseek-v2-lite", 10, 23)]
)
def test_yarn_ramp_keeps_fast_pairs_and_slows_slow_ones(name, low, high):
    """TRAPS A8: both ends of V3's ramp; the opposite sign would slow the fast pairs."""
    cfg = DeepseekConfig.from_pretrained(name)
    plain = inverse_frequencies(cfg.qk_rope_head_dim, cfg.rope_theta)
    slowed = plain / _frequencies(cfg)
    factor = cfg.rope_scaling["factor"]
    assert torch.allclose(slowed[: low + 1], torch.ones(low + 1), rtol=4 * EPS32)
    assert torch.allclose(slowed[high:], torch.full((32 - high,), float(factor)), rtol=4 * EPS32)
    inside = slowed[low : high + 1]
    assert (inside[1:] > inside[:-1]).all()


def test_yarn_ramp_has_the_bits_of_the_official_code():
    """TRAPS A14: the sum in the order of `precompute_freqs_cis` of DeepSeek's model.py; another order is 1 ulp off."""
    cfg = DeepseekConfig.from_pretrained("deepseek-v3")
    dim, low, high = 64, 10, 23
    freqs = 1.0 / (cfg.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    smooth = 1 - torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    official = freqs / cfg.yarn.factor * (1 - smooth) + freqs * smooth
    assert torch.equal(inverse_frequencies(dim, cfg.rope_theta, cfg.yarn), official)
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    assert not torch.equal(freqs / cfg.yarn.factor * ramp + freqs * (1 - ramp), official)


def test_yarn_ramp_of_no_width_is_a_step():
    """TRAPS A8: low == high must not divide by zero."""
    cfg = config("v3", rope_scaling=YARN | {"beta_fast": 4.0, "beta_slow": 4.0, "original_max_position_embeddings": 12})
    frequencies = _frequencies(cfg)
    assert torch.isfinite(frequencies).all()
    assert error(frequencies, torch.tensor(rotary_frequencies(cfg))) < 8 * EPS32


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("deepseek-v3", 0.1352337788608801),
        ("deepseek-v2.5", 0.1352337788608801),
        ("deepseek-v2", 0.1147213867929261),
        ("deepseek-v2-lite", 0.1147213867929261),
        ("kimi-k2-instruct", 0.13086079996295005),
        ("moonlight-16b-a3b", 0.07216878364870322),
        ("glm-4.7-flash", 0.0625),
    ],
)
def test_published_softmax_scales(name, scale):
    """TRAPS A5, A7 and A13: with m squared and `mscale_all_dim`, of 192 and never of 576 values."""
    cfg = DeepseekConfig.from_pretrained(name)
    assert cfg.softmax_scale == pytest.approx(scale, rel=1e-14)
    assert oracle_scale(cfg) == pytest.approx(scale, rel=1e-14)


def test_scale_reads_mscale_all_dim_not_mscale():
    """TRAPS A7: absent or zero means no scaling, whatever `mscale` says."""
    base = {k: v for k, v in YARN.items() if k != "mscale_all_dim"}
    for scaling in (base, base | {"mscale_all_dim": 0.0}):
        assert config("v3", rope_scaling=scaling).softmax_scale == pytest.approx(20**-0.5, rel=1e-14)
    different = config("v3", rope_scaling=YARN | {"mscale": 0.5, "mscale_all_dim": 0.707})
    assert different.softmax_scale == pytest.approx(20**-0.5 * 1.5896261651208736, rel=1e-12)


@pytest.mark.parametrize(
    ("scaling", "amplitude"),
    [
        (YARN, 1.0),
        (YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}, 1.0),
        (YARN | {"mscale": 1.0, "mscale_all_dim": 0.707}, 1.3688879454113936 / 1.2608037774058554),
        (YARN | {"attention_factor": 1.25}, 1.25),
        ({k: v for k, v in YARN.items() if "mscale" not in k}, 1.3688879454113936),
    ],
    ids=["equal", "equal-v2", "different", "explicit", "absent"],
)
def test_amplitude_of_cosines_and_sines(scaling, amplitude):
    """TRAPS A6: one for every published file, an explicit `attention_factor` wins."""
    cos, sin = RotaryEmbedding.from_config(config("v3", rope_scaling=scaling))(torch.arange(50)[None])
    assert torch.allclose((cos.square() + sin.square()).sqrt(), torch.tensor(amplitude), rtol=8 * EPS32)


@pytest.mark.parametrize("kind", ["type", "rope_type"])
@pytest.mark.parametrize("number", [int, float])
def test_integer_fields_and_both_spellings(kind, number):
    """TRAPS A10."""
    numbers = {"factor": 40, "mscale": 1, "mscale_all_dim": 1, "beta_fast": 32, "beta_slow": 1}
    scaling = {kind: "yarn", "original_max_position_embeddings": 4096} | {k: number(v) for k, v in numbers.items()}
    cfg = config("v3", rope_scaling=scaling)
    assert torch.equal(_frequencies(cfg), _frequencies(config("v3", rope_scaling=YARN)))
    assert cfg.softmax_scale == config("v3", rope_scaling=YARN).softmax_scale


def test_rope_parameters_mean_the_same_as_rope_scaling():
    """TRAPS A10: what transformers 5 writes."""
    old = config("v3", rope_scaling=YARN, rope_theta=5000.0)
    data = old.to_dict()
    del data["rope_scaling"], data["rope_theta"]
    scaling = {k: v for k, v in YARN.items() if k != "type"}
    new = DeepseekConfig.from_dict(data | {"rope_parameters": {**scaling, "rope_type": "yarn", "rope_theta": 5000.0}})
    assert torch.equal(_frequencies(new), _frequencies(old)) and new.softmax_scale == old.softmax_scale


def test_odd_rotary_size_is_refused():
    """TRAPS A11."""
    with pytest.raises(ConfigError, match=r"even qk_rope_head_dim.*got 7"):
        config("v3", qk_rope_head_dim=7)
    with pytest.raises(ValueError, match="even rotary dimension, got 7"):
        RotaryEmbedding(7)


@pytest.mark.parametrize("scaling", [None, YARN, YARN | {"attention_factor": 1.25}], ids=["plain", "yarn", "amplitude"])
def test_rotation_equals_complex_multiplication(scaling):
    cfg = config("v3", rope_scaling=scaling)
    x = torch.randn(60, cfg.qk_rope_head_dim, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(60)
    # The angle of pair 0 is the position itself: 60 rounded to float32 is off by up to 30 units of eps.
    assert error(_rotated(cfg, x, positions), oracle_rotate(cfg, x.double(), positions)) < 64 * EPS32


def test_pairs_are_interleaved_not_halves():
    """TRAPS A1: rotating halves gives other scores at different positions, and the same ones at equal positions."""
    cfg = config("v3")
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 8, generator=generator), torch.randn(2, 8, generator=generator)
    cos, sin = RotaryEmbedding.from_config(cfg)(torch.tensor([[0, 40]]))

    def halves(x):
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos[0] - second * sin[0], second * cos[0] + first * sin[0]), -1)

    def permuted(x):  # de-interleave first, then rotate halves: the published remote code
        return halves(torch.cat((x[..., 0::2], x[..., 1::2]), -1))

    ours = rope(q[None], cos, sin)[0] @ rope(k[None], cos, sin)[0].T
    assert error(ours, permuted(q) @ permuted(k).T) < 16 * EPS32
    wrong = halves(q) @ halves(k).T
    assert torch.allclose(ours.diag(), wrong.diag(), atol=1e-5)  # why a one-token test hides it
    assert error(wrong, ours) > 0.1


def test_scores_depend_on_the_distance_only():
    cfg = config("v3", rope_scaling=YARN)
    generator = torch.Generator().manual_seed(2)
    q, k = torch.randn(1, 8, generator=generator), torch.randn(1, 8, generator=generator)

    def score(query_position, key_position):
        turned = [_rotated(cfg, x, torch.tensor([p])) for x, p in ((q, query_position), (k, key_position))]
        return float(turned[0] @ turned[1].T)

    assert score(7, 4) == pytest.approx(score(107, 104), abs=1e-4)  # angles near 100 carry errors of 1e-5
    assert abs(score(7, 4) - score(4, 7)) > 1e-2
    assert abs(score(7, 4) - score(7, 5)) > 1e-2


def test_cosines_stay_float32_and_inputs_keep_their_dtype():
    cos, sin = RotaryEmbedding.from_config(config("v3")).to(torch.bfloat16)(torch.tensor([[1000]]))
    assert cos.dtype == sin.dtype == torch.float32
    assert float(cos[0, 0, 0]) == pytest.approx(math.cos(1000), abs=1e-6)
    x = torch.randn(1, 1, 8).to(torch.bfloat16)
    exact = oracle_rotate(config("v3"), x[0].double(), torch.tensor([1000]))
    # Computed in float32 and rounded once: half a unit in the last place of bfloat16.
    assert rope(x, cos, sin).dtype == torch.bfloat16
    assert error(rope(x, cos, sin)[0], exact) < 0.51 * torch.finfo(torch.bfloat16).eps
