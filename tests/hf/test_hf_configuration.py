"""Config classes: ours in memory, published on disk, and the same model as a `DeepseekConfig`."""

from __future__ import annotations

import json
import pickle

import pytest
from transformers import AutoConfig, DeepseekV3Config

import deepseek_arch as da
import deepseek_arch.hf as dhf
from deepseek_arch.config.deepseek_config import ConfigError
from deepseek_arch.hf.configuration import CONFIG_CLASSES
from support import small_models

# transformers has defaults of its own for these; none changes what is computed.
FILLED = {"architectures", "bos_token_id", "eos_token_id", "extra"}


def fields(config: da.DeepseekConfig) -> dict:
    return {k: v for k, v in vars(config).items() if k not in FILLED}


@pytest.mark.parametrize("name", da.presets())
def test_every_published_config_describes_the_same_model(name):
    core = da.DeepseekConfig.from_pretrained(name)
    config = dhf.as_arch_config(core)
    assert fields(config.to_core()) == fields(core)
    written = config.to_dict()
    again = da.DeepseekConfig.from_dict(written)
    assert fields(again) == fields(core)
    published = core.to_dict()
    assert written["model_type"] == published["model_type"]
    assert written["architectures"] == published["architectures"]


def test_names_are_ours_in_memory_and_published_on_disk(tmp_path):
    """Trainers look `architectures[0]` up in transformers, and would get its class for a published name."""
    config = dhf.as_arch_config(da.DeepseekConfig.from_pretrained("tiny"))
    assert config.architectures == ["DeepseekForCausalLM"]
    assert config.auto_map == {}
    assert config.quantization_config["quant_method"] == "deepseek_fp8"
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == ["DeepseekV3ForCausalLM"]
    assert "auto_map" not in saved
    native = AutoConfig.from_pretrained(tmp_path)
    assert type(native) is DeepseekV3Config
    assert native.rope_parameters["factor"] == 40


@pytest.mark.parametrize("yarn", [None, small_models.YARN])
def test_saved_files_have_the_rope_fields_of_older_readers_too(tmp_path, yarn):
    config = dhf.as_arch_config(small_models.config("v3", rope_theta=50000.0, rope_scaling=yarn))
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["rope_theta"] == saved["rope_parameters"]["rope_theta"] == 50000.0
    if yarn is not None:
        assert saved["rope_scaling"] == yarn
    # Either form alone means the same model.
    for dropped in (("rope_parameters",), ("rope_theta", "rope_scaling")):
        partial = {k: v for k, v in saved.items() if k not in dropped}
        core = da.DeepseekConfig.from_dict(partial)
        assert (core.rope_theta, core.yarn) == (50000.0, config.to_core().yarn)


def test_what_transformers_changes_reaches_the_model():
    config = dhf.as_arch_config(small_models.config("v3"))
    config.num_hidden_layers = 2
    config.num_experts_per_tok = 2
    model = dhf.DeepseekForCausalLM(config)
    assert len(model.model.layers) == 2
    assert model.model.layers[1].mlp.gate.top_k == 2


def test_configs_have_mtp_modules_only_if_given():
    """The native default is one, for files that have none as well."""
    assert dhf.ArchDeepseekV3Config().num_nextn_predict_layers == 0
    assert dhf.ArchDeepseekV3Config(num_nextn_predict_layers=2).num_mtp_layers == 2


@pytest.mark.parametrize("kind", small_models.KINDS)
def test_trainers_find_the_expert_fields(kind):
    config = dhf.as_arch_config(small_models.config(kind))
    assert config.num_experts == config.num_local_experts == 8
    assert config.output_router_logits is False


def test_heads_need_not_divide_the_hidden_size(tmp_path):
    """transformers demands it of V2; with latent attention the two do not depend on each other."""
    config = dhf.as_arch_config(small_models.config("v2", num_attention_heads=3))
    config.save_pretrained(tmp_path)
    assert dhf.ArchDeepseekV2Config.from_pretrained(tmp_path).num_attention_heads == 3


def test_native_configs_are_understood():
    core = small_models.config("v3")
    native = DeepseekV3Config.from_dict(core.to_dict())
    assert fields(dhf.as_arch_config(native).to_core()) == fields(core)
    assert type(dhf.DeepseekForCausalLM(native).config) is dhf.ArchDeepseekV3Config


def test_other_things_are_refused():
    with pytest.raises(ValueError, match="got dict"):
        dhf.DeepseekForCausalLM({"model_type": "deepseek_v3"})
    with pytest.raises(da.ConfigError, match="topk_group"):
        dhf.DeepseekForCausalLM(dhf.ArchDeepseekV3Config(topk_group=9))


@pytest.mark.parametrize("model_type", CONFIG_CLASSES)
def test_fields_of_a_wrong_type_are_named_in_the_cores_words(model_type):
    """Not by huggingface_hub's own error, which is no ValueError, when a config is made or changed."""
    cls = CONFIG_CLASSES[model_type]
    for name, value in (("eos_token_id", "x"), ("hidden_size", 1.5), ("vocab_size", None)):
        with pytest.raises(ConfigError, match=name):
            cls(**{name: value})
        config = cls()
        before = config.to_dict()
        with pytest.raises(ConfigError, match=name):
            setattr(config, name, value)
        assert config.to_dict() == before
        with pytest.raises(ConfigError, match=name):
            cls.from_dict(before | {name: value})
    assert cls(eos_token_id=[1, 2]).eos_token_id == [1, 2]
    assert pickle.loads(pickle.dumps(config)).to_dict() == before
