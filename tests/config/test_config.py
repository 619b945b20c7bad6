"""Configs: every published file and what transformers makes of it, round trips, and refusals that name the field."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from deepseek_arch.config.deepseek_config import ConfigError, DeepseekConfig, UnsupportedModelError, presets

PUBLISHED = [name for name in presets() if name not in ("tiny", "mini")]


def raw(name: str) -> dict:
    """The published file of a preset, unread."""
    from importlib import resources

    return json.loads((resources.files("deepseek_arch.config") / "presets" / f"{name}.json").read_text())


def same_numbers(config: DeepseekConfig) -> dict:
    """The fields that decide what is computed, and not how the file came to be."""
    fields = dataclasses.asdict(config) | {"yarn": config.yarn}
    for name in ("extra", "architectures", "dtype", "rope_scaling", "bos_token_id", "eos_token_id", "pad_token_id"):
        del fields[name]
    return fields


# --------------------------------------------------------------------- reading


def test_presets_are_the_published_files_and_two_small_models():
    assert {"tiny", "mini", "deepseek-v3", "deepseek-r1", "deepseek-v2-lite", "kimi-k2-instruct"} <= set(presets())
    assert len(presets()) == 13


@pytest.mark.parametrize("name", presets())
def test_every_preset_reads_and_keeps_what_its_file_says(name):
    config, file = DeepseekConfig.from_pretrained(name), raw(name)
    assert DeepseekConfig.from_dict(config.to_dict()) == config
    written = config.to_dict()
    for key, value in file.items():
        key = "torch_dtype" if key == "dtype" else key
        assert written.get(key) == value, key  # 40 == 40.0: integers may come back as floats (TRAPS A10, H4)


def test_name_path_folder_and_dict_read_the_same(tmp_path):
    by_name = DeepseekConfig.from_pretrained("deepseek-v3")
    (tmp_path / "config.json").write_text(json.dumps(raw("deepseek-v3")))
    assert DeepseekConfig.from_pretrained(tmp_path) == by_name
    assert DeepseekConfig.from_pretrained(str(tmp_path / "config.json")) == by_name
    assert DeepseekConfig.from_pretrained(raw("deepseek-v3")) == by_name


def test_values_of_v3():
    config = DeepseekConfig.from_pretrained("deepseek-v3")
    assert (config.qk_head_dim, config.latent_dim, config.weight_block_size) == (192, 576, (128, 128))
    assert [config.is_moe_layer(i) for i in (0, 2, 3, 60, 61)] == [False, False, True, True, True]
    assert config.scoring_func == "sigmoid" and config.topk_method == "noaux_tc"
    assert config.num_nextn_predict_layers == 1 and not config.is_sparse_attention


def test_values_of_its_relatives():
    """The fields in which each published file differs from the others."""
    lite = DeepseekConfig.from_pretrained("deepseek-v2-lite")
    assert lite.q_lora_rank is None and lite.topk_method == "greedy" and lite.weight_block_size is None
    v2 = DeepseekConfig.from_pretrained("deepseek-v2")
    assert (v2.topk_method, v2.routed_scaling_factor, v2.norm_topk_prob) == ("group_limited_greedy", 16.0, False)
    assert DeepseekConfig.from_pretrained("deepseek-v3.2").index_topk == 2048
    glm = DeepseekConfig.from_pretrained("glm-4.7-flash")
    # Its file has no scoring_func: sigmoid is the model type's.
    assert "scoring_func" not in raw("glm-4.7-flash") and glm.scoring_func == "sigmoid"
    assert glm.eos_token_id == (154820, 154827, 154829) and glm.qk_head_dim == glm.v_head_dim == 256
    moonlight = DeepseekConfig.from_pretrained("moonlight-16b-a3b")
    # TRAPS B1: the latent norms keep 1e-6 where rms_norm_eps is 1e-5.
    assert (moonlight.rms_norm_eps, moonlight.latent_norm_eps) == (1e-5, 1e-6)


def test_newer_rope_parameters_mean_the_same_as_rope_scaling():
    """TRAPS A10: `rope_parameters` with `rope_type`, as transformers 5 writes them."""
    old = raw("deepseek-v3")
    new = dict(old)
    scaling, theta = new.pop("rope_scaling"), new.pop("rope_theta")
    scaling = {"rope_type" if key == "type" else key: value for key, value in scaling.items()}
    new["rope_parameters"] = scaling | {"rope_theta": theta}
    assert same_numbers(DeepseekConfig.from_dict(new)) == same_numbers(DeepseekConfig.from_dict(old))
    plain = dict(new, rope_parameters={"rope_type": "default", "rope_theta": 50000, "partial_rotary_factor": 1.0})
    read = DeepseekConfig.from_dict(plain)
    assert (read.rope_theta, read.yarn, read.rope_scaling) == (50000.0, None, None)


def test_integers_where_floats_are_meant():
    """TRAPS A10: "rope_theta": 10000, "factor": 40, "routed_scaling_factor": 1."""
    file = raw("deepseek-v2-lite") | {"routed_scaling_factor": 1, "rms_norm_eps": 1, "aux_loss_alpha": 0}
    config = DeepseekConfig.from_dict(file)
    for name in ("routed_scaling_factor", "rms_norm_eps", "aux_loss_alpha", "rope_theta"):
        assert type(getattr(config, name)) is float, name
    floats = file | {"rope_scaling": {key: _float(value) for key, value in file["rope_scaling"].items()}}
    assert DeepseekConfig.from_dict(floats).yarn == config.yarn


def _float(value):
    return float(value) if isinstance(value, int) else value


def test_unknown_fields_survive():
    """TRAPS H4: `ep_size`, `auto_map`, and what nobody has thought of yet."""
    file = raw("deepseek-v3") | {"a_new_field": {"nested": [1, 2, None]}, "use_cache": False}
    config = DeepseekConfig.from_dict(file).replace(num_hidden_layers=4)
    written = config.to_dict()
    assert written["a_new_field"] == {"nested": [1, 2, None]} and written["use_cache"] is False
    assert written["ep_size"] == 1 and written["auto_map"] == file["auto_map"]
    assert written["num_hidden_layers"] == 4
    assert DeepseekConfig.from_dict(json.loads(json.dumps(written))) == config


def test_stale_derived_fields_do_not_win():
    """transformers 5 writes head_dim, which is qk_rope_head_dim there (TRAPS B6), and qk_head_dim."""
    file = raw("deepseek-v3") | {"head_dim": 64, "qk_head_dim": 192, "qk_nope_head_dim": 64}
    config = DeepseekConfig.from_dict(file)
    assert config.qk_head_dim == 128
    assert not {"head_dim", "qk_head_dim"} & set(config.to_dict())


def test_sizes_of_experts_and_indexer_are_integers_or_an_error():
    v2 = DeepseekConfig.from_pretrained("deepseek-v2").expert_sizes
    assert (v2.routed, v2.chosen, v2.width, v2.shared_width, v2.groups, v2.kept_groups) == (160, 6, 1536, 3072, 8, 3)
    lite = DeepseekConfig.from_pretrained("deepseek-v2-lite").expert_sizes
    assert (lite.groups, lite.kept_groups) == (1, 1)
    v32 = DeepseekConfig.from_pretrained("deepseek-v3.2").indexer_sizes
    assert (v32.heads, v32.head_dim, v32.topk) == (64, 128, 2048)
    dense = DeepseekConfig(n_routed_experts=None)
    with pytest.raises(ConfigError, match="expected a model with routed experts, got n_routed_experts=None"):
        _ = dense.expert_sizes
    with pytest.raises(ConfigError, match="expected a model with an indexer, got index_topk=None"):
        _ = dense.indexer_sizes


# ------------------------------------------------------- written by transformers


def test_files_written_by_transformers(tmp_path):
    """transformers 5 leaves out scoring_func and topk_method, renames the rope fields and the dtype."""
    transformers = pytest.importorskip("transformers")
    for name, kind in {
        "deepseek-v3": transformers.DeepseekV3Config,
        "deepseek-v2": transformers.DeepseekV2Config,
        "deepseek-v2-lite": transformers.DeepseekV2Config,
        "glm-4.7-flash": transformers.Glm4MoeLiteConfig,
        "moonlight-16b-a3b": transformers.DeepseekV3Config,
    }.items():
        kind.from_dict(raw(name)).save_pretrained(tmp_path)
        read = DeepseekConfig.from_pretrained(tmp_path)
        assert same_numbers(read) == same_numbers(DeepseekConfig.from_pretrained(name)), name


def test_files_written_from_transformers_own_defaults(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.DeepseekV3Config(first_k_dense_replace=1).save_pretrained(tmp_path)
    v3 = DeepseekConfig.from_pretrained(tmp_path)
    assert "topk_method" not in json.loads((tmp_path / "config.json").read_text())
    assert (v3.scoring_func, v3.topk_method, v3.n_group, v3.first_k_dense_replace) == ("sigmoid", "noaux_tc", 8, 1)

    transformers.Glm4MoeLiteConfig(num_hidden_layers=5).save_pretrained(tmp_path)
    glm = DeepseekConfig.from_pretrained(tmp_path)
    assert (glm.scoring_func, glm.topk_method, glm.first_k_dense_replace) == ("sigmoid", "noaux_tc", 1)

    transformers.DeepseekV2Config(num_experts_per_tok=6, q_lora_rank=None).save_pretrained(tmp_path)
    v2 = DeepseekConfig.from_pretrained(tmp_path)
    assert (v2.scoring_func, v2.topk_method, v2.n_group, v2.q_lora_rank) == ("softmax", "greedy", None, None)


@pytest.mark.parametrize("name", [name for name in presets() if name != "kimi-k2-instruct"])
def test_transformers_reads_what_we_write(name, tmp_path):
    """All but kimi_k2, a model type that transformers does not know."""
    transformers = pytest.importorskip("transformers")
    config = DeepseekConfig.from_pretrained(name)
    written = config.to_dict()
    written.pop("auto_map", None)  # names code files that are not here
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    for field in ("hidden_size", "num_hidden_layers", "q_lora_rank", "kv_lora_rank", "n_routed_experts", "n_group"):
        assert getattr(theirs, field) == getattr(config, field)
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.rope_parameters["rope_type"] == ("yarn" if config.yarn else "default")


# -------------------------------------------------------------------- refusals


@pytest.mark.parametrize("model_type", ["deepseek_v4", "deepseek_v4_flash"])
def test_v4_is_refused_with_the_reason(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "hidden_size": 4096}))
    for source in (tmp_path, str(tmp_path / "config.json"), {"model_type": model_type}, "deepseek-v4-pro"):
        with pytest.raises(UnsupportedModelError, match="V4 replaced latent attention"):
            DeepseekConfig.from_pretrained(source)


def test_other_sources_that_are_no_config(tmp_path):
    with pytest.raises(ConfigError, match=r"presets: deepseek-r1.*tiny"):
        DeepseekConfig.from_pretrained("deepseek-v9")
    with pytest.raises(ConfigError, match=r"folder with a config\.json"):
        DeepseekConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ConfigError, match="expected JSON"):
        DeepseekConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="expected a JSON object, got list"):
        DeepseekConfig.from_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="got 'llama'"):
        DeepseekConfig.from_pretrained({"model_type": "llama"})
    with pytest.raises(ConfigError, match="hidden_size is missing; v_head_dim is missing"):
        DeepseekConfig.from_dict({k: v for k, v in raw("tiny").items() if k not in ("hidden_size", "v_head_dim")})


YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": -1}, "hidden_size to be an integer >= 1, got -1"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 192.0}, "hidden_size"),
        ({"hidden_size": "192"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"vocab_size": -5}, "vocab_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers to be an integer >= 0"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace"),
        ({"q_lora_rank": 0}, "q_lora_rank"),
        ({"kv_lora_rank": None}, "kv_lora_rank"),
        ({"moe_intermediate_size": -144}, "moe_intermediate_size"),
        ({"n_routed_experts": 15}, "n_routed_experts to be divisible by n_group, got 15 and 4"),
        ({"n_group": 3}, "n_routed_experts to be divisible by n_group"),
        ({"n_group": 16, "topk_group": 4}, "at least 2 experts in a group"),
        ({"topk_group": 5}, "topk_group <= n_group, got 5 and 4"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok <= 8"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok"),
        ({"topk_method": "greedy"}, "topk_method greedy with scoring_func sigmoid"),
        ({"topk_method": "random"}, "topk_method to be one of"),
        ({"scoring_func": "tanh"}, "scoring_func"),
        ({"qk_rope_head_dim": 15}, "even qk_rope_head_dim"),  # TRAPS A11
        ({"num_key_value_heads": 2}, "num_key_value_heads"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"routed_scaling_factor": math.inf}, "routed_scaling_factor"),
        ({"rope_theta": 1}, "rope_theta"),
        ({"attention_dropout": 1.0}, "attention_dropout"),
        ({"hidden_act": "prelu"}, "hidden_act"),
        ({"norm_topk_prob": 1}, "norm_topk_prob"),
        ({"mtp_input": "none"}, "mtp_input"),
        ({"rope_scaling": {"type": "llama3", "factor": 2}}, "of type yarn, linear, dynamic or default, got 'llama3'"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling\['factor'\]"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, r"rope_scaling\['factor'\]"),
        ({"rope_scaling": {"type": "yarn"}}, r"rope_scaling\['factor'\]"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, r"rope_scaling\['factor'\]"),
        ({"rope_scaling": YARN | {"mscale": "1"}}, r"rope_scaling\['mscale'\]"),
        ({"rope_scaling": YARN | {"attention_factor": math.nan}}, r"rope_scaling\['attention_factor'\]"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 0}}, "original_max_position_embeddings"),
        ({"rope_scaling": "yarn"}, "rope_scaling to be a mapping"),
        ({"quantization_config": [1]}, "quantization_config to be a mapping"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}}, "weight_block_size"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 0]}}, "weight_block_size"),
        ({"index_topk": 64}, "all or none of index_n_heads, index_head_dim, index_topk"),
        ({"index_topk": 8, "index_n_heads": 2, "index_head_dim": 32, "q_lora_rank": None}, "q_lora_rank"),
        ({"model_type": "deepseek_v9"}, "model_type"),
        ({"hiden_size": 3}, "fields of DeepseekConfig, got hiden_size"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_values_name_their_field(changes, message):
    with pytest.raises(ConfigError, match=message):
        DeepseekConfig.from_pretrained("tiny").replace(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 1.0"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 1.0"),
        ({"rope_parameters": 3}, "rope_parameters to be a mapping"),
        ({"rope_interleave": False}, "rope_interleave to be True, got False"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"mlp_layer_types": ["sparse", "dense", "sparse"]}, "mlp_layer_types to be dense layers followed by sparse"),
    ],
)
def test_files_that_ask_for_another_computation_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        DeepseekConfig.from_dict(raw("tiny") | changes)


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError, match=r"hidden_size.*rms_norm_eps.*hidden_act"):
        DeepseekConfig.from_pretrained("tiny").replace(hidden_size=-1, rms_norm_eps=-1.0, hidden_act="xielu")


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DeepseekConfig.from_pretrained("tiny").hidden_size = 3


# -------------------------------------------------------------- rope and scales


# m, m squared and softmax scale, computed by hand from the published factors, to the last printed digit.
SCALES = {
    "deepseek-v3": (1.3688879454113936, 1.8738542070926265, 0.1352337788608801),
    "deepseek-r1": (1.3688879454113936, 1.8738542070926265, 0.1352337788608801),
    "deepseek-v3.1": (1.3688879454113936, 1.8738542070926265, 0.1352337788608801),
    "deepseek-v3.2": (1.3688879454113936, 1.8738542070926265, 0.1352337788608801),
    "deepseek-v2.5": (1.3688879454113936, 1.8738542070926265, 0.1352337788608801),
    "deepseek-v2": (1.2608037774058554, 1.5896261651208736, 0.1147213867929261),
    "deepseek-v2-lite": (1.2608037774058554, 1.5896261651208736, 0.1147213867929261),
    "kimi-k2-instruct": (1.3465735902799727, 1.8132604340394958, 0.13086079996295005),
    "moonlight-16b-a3b": (1.0, 1.0, 0.07216878364870322),
    "glm-4.7-flash": (1.0, 1.0, 0.0625),
}
# Two roundings more or less (square, square root, product) in the order of operations: a few units in the last place.
ULPS = 4 * 2.0**-53


@pytest.mark.parametrize("name", SCALES)
def test_softmax_scales(name):
    """TRAPS A5, A7, A13: mscale_all_dim squared, times qk_head_dim ** -0.5."""
    config = DeepseekConfig.from_pretrained(name)
    m, square, scale = SCALES[name]
    assert (config.yarn.m(config.yarn.mscale_all_dim) if config.yarn else 1.0) == pytest.approx(m, rel=ULPS)
    assert (config.yarn.softmax_factor if config.yarn else 1.0) == pytest.approx(square, rel=ULPS)
    assert config.softmax_scale == pytest.approx(scale, rel=ULPS)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if DeepseekConfig.from_pretrained(name).yarn])
def test_cosines_and_sines_are_not_scaled_twice(name):
    """TRAPS A6: m(mscale) / m(mscale_all_dim) is 1 in every published file."""
    assert DeepseekConfig.from_pretrained(name).yarn.cos_sin_factor == 1.0


def test_yarn_factors_that_no_published_file_has():
    """TRAPS A6, A7: an explicit attention_factor wins; without mscale_all_dim the softmax is not scaled."""
    tiny = DeepseekConfig.from_pretrained("tiny")
    given = tiny.replace(rope_scaling=YARN | {"attention_factor": 1.5, "mscale": 1.0, "mscale_all_dim": 0.5})
    assert given.yarn.cos_sin_factor == 1.5
    absent = tiny.replace(rope_scaling=YARN)
    assert absent.yarn.softmax_factor == 1.0
    assert absent.yarn.cos_sin_factor == pytest.approx(0.1 * math.log(4) + 1, rel=ULPS)
    assert tiny.replace(rope_scaling=YARN | {"mscale_all_dim": 0}).yarn.softmax_factor == 1.0
    both = tiny.replace(rope_scaling=YARN | {"mscale": 2.0, "mscale_all_dim": 1.0}).yarn
    assert both.cos_sin_factor == pytest.approx((0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1), rel=ULPS)
    assert tiny.replace(rope_scaling=YARN | {"factor": 1, "mscale_all_dim": 1.0}).yarn.softmax_factor == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_scaling": YARN | {"rope_type": "linear"}},
            r"rope_type and type .* got 'linear' and 'yarn'",
        ),
        ({"rope_scaling": YARN | {"rope_type": "default"}}, "to be the same, got 'default' and 'yarn'"),
        (
            {"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 8}},
            "rope_scaling and rope_parameters to be the same",
        ),
        ({"rope_scaling": {"rope_type": []}}, r"rope_scaling of type yarn, .*, got \[\]"),
        ({"rope_scaling": {"type": {}}}, r"rope_scaling of type yarn, .*, got \{\}"),
        ({"rope_scaling": {"factor": 40.0}}, "rope_scaling with a rope_type, got 'factor' without one"),
        ({"rope_parameters": {"factor": 40.0, "rope_theta": 1e4}}, "with a rope_type, got 'factor' without one"),
        ({"rope_scaling": {"type": 0}}, "rope_scaling of type yarn, .*, got 0"),
        ({"num_experts": "8", "n_routed_experts": 8}, "n_routed_experts and num_experts to be the same, got 8 and '8'"),
        ({"num_experts": 8.0, "n_routed_experts": 8}, "to be the same, got 8 and 8.0"),
    ],
)
def test_two_names_of_one_thing_say_the_same(changes, message):
    """One of them won in silence."""
    base = DeepseekConfig.from_pretrained("tiny").to_dict() | {"n_routed_experts": 8, "rope_scaling": None}
    with pytest.raises(ConfigError, match=message):
        DeepseekConfig.from_dict(base | changes)


def test_one_scaling_under_both_names():
    base = DeepseekConfig.from_pretrained("tiny").to_dict() | {"rope_scaling": YARN | {"rope_type": "yarn"}}
    theirs = {key: value for key, value in YARN.items() if key != "type"} | {"rope_type": "yarn"}
    assert DeepseekConfig.from_dict(base | {"rope_parameters": theirs}).yarn == DeepseekConfig.from_dict(base).yarn


@pytest.mark.parametrize("name", ["beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim", "attention_factor"])
@pytest.mark.parametrize("value", [1e308, 1e200, 1e10, 5e-324])
def test_scalings_that_float32_cannot_compute_with(name, value):
    """YaRN's ramp and the softmax scale ended in OverflowError, "math domain error" or NaN logits."""
    tiny = DeepseekConfig.from_pretrained("tiny")
    if value < 1 and not name.startswith(("beta", "factor")):
        assert tiny.replace(rope_scaling=YARN | {name: value}).softmax_scale > 0
        return
    with pytest.raises(ConfigError, match=rf"rope_scaling\['{name}'\] to be a (finite )?number"):
        tiny.replace(rope_scaling=YARN | {name: value})


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta", "routed_scaling_factor", "initializer_range"])
def test_numbers_that_float32_cannot_compute_with(name):
    with pytest.raises(ConfigError, match=rf"expected {name} to be a number <= 1e\+15, got 1e\+308"):
        DeepseekConfig.from_pretrained("tiny").replace(**{name: 1e308})
