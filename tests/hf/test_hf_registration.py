"""Auto classes give ours when asked to, and only then."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DeepseekV3ForCausalLM,
    PreTrainedConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from twins import NATIVE, load_silently

import deepseek_arch as da
import deepseek_arch.hf as dhf
from support import small_models

HEADS = {
    AutoModel: dhf.DeepseekModel,
    AutoModelForCausalLM: dhf.DeepseekForCausalLM,
    AutoModelForSequenceClassification: dhf.DeepseekForSequenceClassification,
    AutoModelForTokenClassification: dhf.DeepseekForTokenClassification,
}


def tables() -> list[dict]:
    return [dict(CONFIG_MAPPING._extra_content), *(dict(auto._model_mapping._extra_content) for auto in HEADS)]


@pytest.mark.parametrize("kind", small_models.KINDS)
def test_auto_classes_give_our_classes_for_every_family(folder_of, kind):
    folder = folder_of(kind)
    dhf.register()
    config = AutoConfig.from_pretrained(folder)
    assert type(config).__module__.startswith("deepseek_arch.")
    assert config.model_type == small_models.config(kind).model_type
    for auto, expected in HEADS.items():
        assert type(auto.from_pretrained(folder)) is expected
    assert type(AutoModelForCausalLM.from_config(config)) is dhf.DeepseekForCausalLM


def test_without_registration_transformers_gives_its_own(folder_of):
    for kind in ("v2", "v3", "glm"):
        assert type(AutoModelForCausalLM.from_pretrained(folder_of(kind))) in {model for _, model in NATIVE.values()}
    assert "kimi_k2" not in CONFIG_MAPPING


def test_unregister_leaves_no_trace():
    before = tables()
    dhf.register()
    registered = tables()
    dhf.register()
    assert tables() == registered != before
    dhf.unregister()
    assert tables() == before
    dhf.unregister()
    assert tables() == before


def test_with_registered_ends_with_the_block_also_after_an_error():
    before = tables()
    with pytest.raises(KeyError), dhf.registered():
        assert tables() != before
        raise KeyError
    assert tables() == before


def test_with_registered_keeps_a_registration_that_was_there():
    dhf.register()
    registered = tables()
    with dhf.registered():
        pass
    assert tables() == registered


def test_what_others_registered_comes_back():
    class OtherKimiConfig(PreTrainedConfig):
        model_type = "kimi_k2"

    AutoConfig.register("kimi_k2", OtherKimiConfig)
    try:
        with dhf.registered():
            assert CONFIG_MAPPING["kimi_k2"] is dhf.ArchKimiK2Config
        assert CONFIG_MAPPING["kimi_k2"] is OtherKimiConfig
    finally:
        CONFIG_MAPPING._extra_content.pop("kimi_k2")


def test_only_the_families_asked_for_are_registered(folder_of):
    with dhf.registered("deepseek_v2"):
        assert type(AutoModelForCausalLM.from_pretrained(folder_of("v2"))) is dhf.DeepseekForCausalLM
        assert type(AutoModelForCausalLM.from_pretrained(folder_of("v3"))) is DeepseekV3ForCausalLM


def test_classes_asked_for_by_name_stay_native_and_load_every_expert(folder_of):
    dhf.register()
    model, info = DeepseekV3ForCausalLM.from_pretrained(folder_of("v3"), output_loading_info=True)
    assert type(model) is DeepseekV3ForCausalLM
    assert not info["missing_keys"] and not info["mismatched_keys"]


def test_remote_code_in_the_folder_is_never_asked_about(folder_of, tmp_path):
    """Published folders name modeling files in `auto_map`; with our code registered there is nothing to trust."""
    shutil.copytree(folder_of("v3"), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with dhf.registered():
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is dhf.DeepseekForCausalLM
    assert type(load_silently(dhf.DeepseekForCausalLM, tmp_path)) is dhf.DeepseekForCausalLM


def test_our_classes_need_no_registration(folder_of):
    for kind in small_models.KINDS:
        for cls in HEADS.values():
            assert type(cls.from_pretrained(folder_of(kind))) is cls


def test_other_families_are_refused_by_name():
    with pytest.raises(da.UnsupportedModelError, match="got 'llama'"):
        dhf.register("llama")


def test_the_folders_tokenizer_is_found(folder_of, tokenizer, tmp_path):
    """Also for a model type that transformers does not know."""
    shutil.copytree(folder_of("kimi"), tmp_path, dirs_exist_ok=True)
    tokenizer.save_pretrained(tmp_path)
    with dhf.registered():
        loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("w1 w57").input_ids == [4, 60]
