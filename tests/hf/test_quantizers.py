"""Every quantizer of transformers: it converts linear layers, or an error says why not; nothing is done in silence."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from transformers import QuantoConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from twins import WIDE, ours

import deepseek_arch as da
import deepseek_arch.hf as dhf
from deepseek_arch.hf.fp8_config import FP8_METHOD
from support import small_models
from support.small_models import error, tokens

SETTINGS = {  # that a method has no default for
    "bitsandbytes_4bit": {"load_in_4bit": True},
    "bitsandbytes_8bit": {"load_in_8bit": True},
    "gptq": {"bits": 4},
    "torchao": {"quant_type": "int8_weight_only"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wide") / "model"
    da.save(small_models.model(WIDE), path)
    return path


@pytest.mark.parametrize("method", sorted(set(AUTO_QUANTIZATION_CONFIG_MAPPING) - {FP8_METHOD, "quanto"}))
def test_a_method_converts_or_says_why_not(folder, method):
    """Packages that are installed decide; the fault would be a model whose weights all stay as they were."""
    kind = AUTO_QUANTIZATION_CONFIG_MAPPING[method]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = kind(**SETTINGS.get(method, {}))
            model = dhf.DeepseekForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cpu")
    except (ImportError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError) as refusal:
        assert str(refusal)
        return
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    plain = [module for module in linear if type(module.weight) is nn.Parameter and module.weight.is_floating_point()]
    assert len(plain) < len([module for module in ours(WIDE).modules() if isinstance(module, nn.Linear)])


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quanto_converts_every_linear_layer_but_the_head(folder, weights):
    quanto = pytest.importorskip("optimum.quanto")
    with pytest.warns(UserWarning, match="quanto converts linear layers; the stacked experts, 393216 parameters, stay"):
        model = dhf.DeepseekForCausalLM.from_pretrained(
            folder, quantization_config=QuantoConfig(weights=weights), dtype=torch.float32
        )
    converted = {name for name, module in model.named_modules() if isinstance(module, quanto.QLinear)}
    plain = ours(WIDE)
    assert converted == {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    with torch.no_grad():
        for name in converted:
            plain.get_submodule(name).weight.copy_(model.get_submodule(name).weight.dequantize())
        ids = tokens(WIDE, 2, 9)
        assert error(model(ids).logits, plain(ids).logits) <= 1e-4
        options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        text = model.generate(ids, pad_token_id=None, **options)
        whole = plain(text.sequences).logits
        assert all(error(step, whole[:, 8 + i]) <= 1e-4 for i, step in enumerate(text.logits))
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(folder.parent / "again")


@pytest.mark.parametrize("config", [True, False])
def test_a_gguf_file_is_refused(folder, tmp_path, config):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    if config:
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"expected a folder of safetensors files, got gguf_file='model\.gguf'"):
        dhf.DeepseekForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
