"""Tokens that begin, end and fill texts, in config.json and generation_config.json: the core's rules."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM

import deepseek_arch as da
import deepseek_arch.hf as dhf
from support import small_models


@pytest.fixture
def folder(folder_of, tmp_path):
    return shutil.copytree(folder_of("v3", eos_token_id=3), tmp_path / "model")


@pytest.mark.parametrize("value", ["x", 1.5, [1, "x"], {"a": 1}, True, -3, 10**30, [[1]]])
def test_an_end_token_that_is_none_is_a_config_error(folder, value):
    """As the core says it, through our class and the Auto class, from a file and as an argument."""
    fields = json.loads((folder / "config.json").read_text())
    with pytest.raises(da.ConfigError) as core:
        da.DeepseekConfig.from_dict(fields | {"eos_token_id": value})
    with pytest.raises(da.ConfigError) as ours:
        dhf.DeepseekForCausalLM.from_pretrained(folder, eos_token_id=value)
    (folder / "config.json").write_text(json.dumps(fields | {"eos_token_id": value}))
    with pytest.raises(da.ConfigError) as read:
        dhf.DeepseekForCausalLM.from_pretrained(folder)
    with dhf.registered(), pytest.raises(da.ConfigError) as auto:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "eos_token_id" in str(core.value)
    assert str(core.value) in str(read.value) and str(core.value) in str(auto.value)
    assert "eos_token_id" in str(ours.value)


def test_any_other_field_of_a_wrong_type_is_a_config_error_too(folder):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"hidden_size": "x"}))
    with pytest.raises(da.ConfigError, match="expected hidden_size to be an integer"):
        dhf.DeepseekForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "content", ["{", "[]", "3", "\x00", '{"eos_token_id": "x"}', '{"eos_token_id": [1.5]}', '{"pad_token_id": true}']
)
def test_a_broken_generation_config_is_named(folder, content):
    """transformers skips it, and texts end elsewhere."""
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"expected a generation config in .*generation_config\.json, got"):
        dhf.DeepseekForCausalLM.from_pretrained(folder)


def test_end_tokens_of_a_folder_that_are_right(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, -1], "pad_token_id": 2}))
    model = dhf.DeepseekForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == [5, -1] and model.config.eos_token_id == 3


def test_a_core_config_without_end_tokens_has_none():
    """The native classes' defaults are 0 and 1."""
    core = small_models.config("v3")
    assert core.eos_token_id is core.bos_token_id is None
    model = dhf.DeepseekForCausalLM(core)
    for config in (model.config, model.generation_config):
        assert config.eos_token_id is None and config.bos_token_id is None
    assert dhf.DeepseekForCausalLM(core.replace(eos_token_id=7)).generation_config.eos_token_id == 7
    assert model.config.to_core().eos_token_id is None
