"""Checkpoints as they are saved, and exchanged with transformers, bit for bit."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

import deepseek_arch as da
from deepseek_arch.checkpoint import load, save
from deepseek_arch.layout.parameter_map import layer_of, scale_name
from deepseek_arch.quant.fp8_blocks import block_grid, dequantize_blocks, quantize_blocks
from support import checkpoint_files as files
from support import published, small_models

pytestmark = pytest.mark.filterwarnings("error")


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["v3", "v2-lite"])
def test_saving_and_loading_is_bit_exact(tmp_path, kind, dtype):
    config = small_models.config(kind, num_nextn_predict_layers=2 if kind == "v3" else 0)
    model = da.DeepseekLM(config, dtype=dtype)
    report = save(model, tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    again = load(tmp_path / "saved")
    files.assert_same_tensors(again.state_dict(), model.state_dict())
    assert again.config == files.named(report.config) == files.named(config.replace(dtype=str(dtype)))
    assert not again.load_report.cast


def test_saved_files_have_the_published_names_and_shapes(tmp_path):
    config = small_models.config("v3", num_nextn_predict_layers=1)
    model = da.DeepseekLM(config)
    report = save(model, tmp_path)
    stored = files.read(tmp_path)
    assert {name: tuple(t.shape) for name, t in stored.items()} == published.shapes(config)
    expected = published.published_state(model)
    expected["model.layers.3.embed_tokens.weight"] = model.model.embed_tokens.weight.data
    expected["model.layers.3.shared_head.head.weight"] = model.lm_head.weight.data
    files.assert_same_tensors(stored, expected)
    index = json.loads((tmp_path / files.INDEX).read_text())
    nbytes = sum(t.nbytes for t in stored.values())
    assert index["metadata"]["total_size"] == nbytes == report.nbytes
    assert report.tensors == len(stored)
    assert sorted(report.files) == sorted(tmp_path.iterdir())


def test_shards_stay_below_the_size_asked_for(tmp_path):
    model = da.DeepseekLM(small_models.config("v3"))
    save(model, tmp_path, max_shard_size=10_000)
    names = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert names == [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    sizes = [sum(t.nbytes for t in files.load_file(str(tmp_path / name)).values()) for name in names]
    assert len(sizes) > 5 and max(sizes) <= 10_000
    # A tensor larger than that gets a file of its own.
    save(model, tmp_path / "tiny", max_shard_size="1KB")
    files.assert_same_tensors(load(tmp_path / "tiny").state_dict(), model.state_dict())


def test_a_model_of_two_dtypes_keeps_every_value(tmp_path):
    """One word in config.json for all dtypes: the widest, so that loading loses nothing; the files keep them apart."""
    model = da.DeepseekLM(small_models.config("v3"), dtype=torch.bfloat16)
    model.model.norm.float()
    model.model.norm.weight.data.normal_()
    save(model, tmp_path)
    assert files.read(tmp_path)["lm_head.weight"].dtype == torch.bfloat16
    again = load(tmp_path)
    files.assert_same_tensors(again.state_dict(), {name: t.float() for name, t in model.state_dict().items()})


def test_a_tied_head_is_stored_once(tmp_path):
    config = small_models.config("v3", tie_word_embeddings=True, num_nextn_predict_layers=1)
    model = da.DeepseekLM(config)
    save(model, tmp_path)
    assert "lm_head.weight" not in files.read(tmp_path)
    files.assert_same_tensors(load(tmp_path).state_dict(), model.state_dict())


def test_unknown_config_fields_survive(tmp_path):
    """TRAPS H4."""
    config = small_models.config("v3", extra={"ep_size": 1, "something_new": [1, {"a": None}]})
    save(da.DeepseekLM(config), tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["something_new"] == [1, {"a": None}] and stored["ep_size"] == 1
    assert stored["architectures"] == ["DeepseekV3ForCausalLM"] and stored["torch_dtype"] == "float32"


def test_saving_fp8_rounds_what_the_published_files_have_in_fp8(tmp_path):
    """TRAPS E7 by name; the values are those of `quantize_blocks`."""
    config = small_models.config("v3", num_nextn_predict_layers=1, quantization_config=files.FP8)
    model = da.DeepseekLM(config, dtype=torch.bfloat16)
    report = save(model, tmp_path, format="fp8", max_shard_size="20KB")
    stored = files.read(tmp_path)
    fp8 = {name for name, t in stored.items() if t.dtype == torch.float8_e4m3fn}
    weights = published.published_state(model)
    expected = {name for name, t in weights.items() if name.endswith("_proj.weight") and "eh_proj" not in name}
    expected |= {name for name in weights if name.endswith("kv_a_proj_with_mqa.weight")}
    assert fp8 == expected and report.quantized == len(fp8)
    assert {name for name in stored if name.endswith("_scale_inv")} == {scale_name(name) for name in fp8}
    for name in fp8:
        codes, scale = quantize_blocks(weights[name], (16, 12))
        assert torch.equal(stored[name].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(stored[scale_name(name)], scale)
        assert tuple(scale.shape) == block_grid(codes.shape, (16, 12))
    for name in set(weights) - fp8:
        assert torch.equal(stored[name], weights[name])
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == files.FP8
    again = published.published_state(load(tmp_path, fp8="dequantize"))
    for name in fp8:
        assert torch.equal(again[name], dequantize_blocks(*quantize_blocks(weights[name], (16, 12)), (16, 12)))


def test_saving_fp8_with_power_of_two_scales(tmp_path):
    config = small_models.config("v3", quantization_config=files.FP8 | {"scale_fmt": "ue8m0"})
    save(da.DeepseekLM(config), tmp_path, format="fp8")
    scales = [t for name, t in files.read(tmp_path).items() if name.endswith("_scale_inv")]
    assert scales and all((torch.frexp(scale).mantissa == 0.5).all() for scale in scales)


def test_saving_fp8_without_a_quantization_config_uses_the_published_one(tmp_path):
    save(da.DeepseekLM(small_models.config("v3")), tmp_path, format="fp8")
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored == files.FP8 | {"weight_block_size": [128, 128]}
    load(tmp_path)


def test_saving_without_fp8_says_so(tmp_path):
    """TRAPS E12: a quantization_config beside plain tensors makes the next reader quantize or fail."""
    save(da.DeepseekLM(small_models.config("v3", quantization_config=files.FP8)), tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_saving_over_a_checkpoint_replaces_it_and_nothing_else(tmp_path):
    config = small_models.config("v3")
    files.write(tmp_path, files.tensors(config), config, shards=7)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "notes.bin").write_bytes(b"someone else's")
    model = da.DeepseekLM(config)
    save(model, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        files.INDEX,
        "notes.bin",
        "tokenizer.json",
    }
    assert (tmp_path / "notes.bin").read_bytes() == b"someone else's"
    files.assert_same_tensors(load(tmp_path).state_dict(), model.state_dict())
    # Onto the folder that the model came from, in more files than before.
    again = load(tmp_path)
    save(again, tmp_path, max_shard_size="30KB")
    assert not (tmp_path / "model.safetensors").exists()
    files.assert_same_tensors(load(tmp_path).state_dict(), model.state_dict())


# ---------------------------------------------------------------- transformers


@pytest.mark.parametrize("kind", ["v3", "v2", "v2-lite"])
@pytest.mark.parametrize("drafts", [0, 1])
def test_transformers_loads_what_is_saved(tmp_path, kind, drafts):
    transformers = pytest.importorskip("transformers")
    config = small_models.config(kind, num_nextn_predict_layers=drafts)
    model = small_models.model(config)
    save(model, tmp_path, max_shard_size="20KB")
    cls = transformers.DeepseekV3ForCausalLM if kind == "v3" else transformers.DeepseekV2ForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, info = cls.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(layer_of(name) == 3 for name in info["unexpected_keys"])
    ours = {name: t for name, t in model.state_dict().items() if not name.startswith("mtp.")}
    files.assert_same_tensors(theirs.state_dict(), ours)


@pytest.mark.parametrize("kind", ["v3", "v2", "v2-lite"])
def test_what_transformers_saves_loads(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    v3 = kind == "v3"
    config_class = transformers.DeepseekV3Config if v3 else transformers.DeepseekV2Config
    cls = transformers.DeepseekV3ForCausalLM if v3 else transformers.DeepseekV2ForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = small_models.config(kind, dtype="bfloat16").to_dict()
        theirs = cls(config_class.from_dict(data)).bfloat16()
        theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    model = load(tmp_path)
    state = theirs.state_dict()
    expected = {n: t.float() if n.endswith("correction_bias") else t for n, t in state.items()}
    files.assert_same_tensors(model.state_dict(), expected)
