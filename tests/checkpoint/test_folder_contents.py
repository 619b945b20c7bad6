"""Contents of a folder beside its tensors: generation defaults, other files, a config of FP8 that is not there."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import deepseek_arch as da
from deepseek_arch.checkpoint import CheckpointError, inspect_checkpoint, load, save
from deepseek_arch.checkpoint.files.writer import ShardFiles
from deepseek_arch.checkpoint.synthetic import write_checkpoint
from deepseek_arch.config.deepseek_config import ConfigError
from deepseek_arch.layout.published_tensors import TensorSpec
from support import checkpoint_files as files
from support import layouts, small_models

PROMPT = torch.tensor([[3, 1, 4, 1, 5]])
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 12]}


@pytest.fixture
def config():
    return small_models.config("v3", num_nextn_predict_layers=1, eos_token_id=1)


@pytest.fixture
def weights(config):
    return files.tensors(config)


@pytest.fixture
def folder(tmp_path, config, weights):
    return files.write(tmp_path / "model", weights, config)


def assert_loads(folder, config, weights) -> None:
    files.assert_same_tensors(load(folder).state_dict(), files.expected_state(config, weights))


# ---------------------------------------------------------------- generation_config.json


def test_the_end_tokens_of_generation_config_end_a_text(folder):
    free = da.generate(load(folder), PROMPT, max_new_tokens=8, eos_token_id=[])[0, 5:].tolist()
    end = free[3]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [60, end], "temperature": 0.6}))
    model = load(folder)
    assert model.generation_config == {"eos_token_id": [60, end], "temperature": 0.6}
    expected = free[: free.index(end) + 1]
    assert da.generate(model, PROMPT, max_new_tokens=8)[0, 5:].tolist() == expected
    assert da.generate(model, PROMPT, max_new_tokens=8, eos_token_id=[])[0, 5:].tolist() == free


def test_generation_config_is_kept_by_everything_that_writes(folder, tmp_path):
    assert load(folder).generation_config == {}
    content = {"eos_token_id": 7, "top_p": 0.95, "_from_model_config": True}
    (folder / "generation_config.json").write_text(json.dumps(content))
    save(load(folder), tmp_path / "saved")
    da.convert(folder, tmp_path / "converted")
    da.slice_checkpoint(folder, tmp_path / "sliced", layers=[0, 1])
    for name in ("saved", "converted", "sliced"):
        assert json.loads((tmp_path / name / "generation_config.json").read_text()) == content
        assert load(tmp_path / name).generation_config == content
    save(da.DeepseekLM(load(folder).config), tmp_path / "random")
    assert not (tmp_path / "random" / "generation_config.json").exists()


@pytest.mark.parametrize("content", ["{", "[]", "3", "[" * 100_000, '{"a": ' + "[" * 200 + "]" * 200 + "}", "\ud800"])
def test_a_broken_generation_config_is_named(folder, content):
    (folder / "generation_config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=r"generation config"):
        load(folder)


def test_what_json_cannot_hold_is_refused_before_anything_is_written(folder, tmp_path):
    model = load(folder)
    model.generation_config = {"eos_token_id": {1, 2}}
    with pytest.raises(ValueError, match=r"expected model.generation_config to hold what JSON can hold"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_kimi_ends_its_turns():
    """config.json of Kimi-K2-Instruct has the end of a text, its generation_config.json that of a turn."""
    assert da.DeepseekConfig.from_pretrained("kimi-k2-instruct").eos_token_id == (163586, 163585)


# ---------------------------------------------------------------- other files


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("name", ["adapter_model", "consolidated.00", "consolidated", "optimizer", "model"])
def test_files_of_no_model_are_not_read_and_named(tmp_path, config, weights, name, index):
    if name == "model" and not index:
        pytest.skip("it is the model")
    folder = files.write(tmp_path / "model", weights, config, index=index)
    save_file({key: tensor + 1 for key, tensor in weights.items()}, folder / f"{name}.safetensors")
    (folder / "._model-00001-of-00003.safetensors").write_bytes(b"of a Macintosh")
    for write in (
        load,
        lambda path: da.convert(path, tmp_path / "converted", dtype="float32"),
        lambda path: da.slice_checkpoint(path, tmp_path / "sliced"),
    ):
        with pytest.warns(UserWarning, match=rf"not read, since .*: {name}\.safetensors$"):
            write(folder)
    report = inspect_checkpoint(folder)
    assert report.ok and any(f"{name}.safetensors" in warning for warning in report.warnings)
    with pytest.warns(UserWarning, match="not read"):
        assert_loads(folder, config, weights)
    assert_loads(tmp_path / "converted", config, weights)
    assert_loads(tmp_path / "sliced", config, weights)


def test_without_an_index_the_model_is_in_its_one_file(tmp_path, config, weights):
    folder = files.write(tmp_path / "model", weights, config, shards=1, index=False, pattern="model.safetensors")
    save_file({key: tensor + 1 for key, tensor in weights.items()}, folder / "model-fp32.safetensors")
    with pytest.warns(UserWarning, match=r"the model is in model\.safetensors: model-fp32\.safetensors"):
        assert_loads(folder, config, weights)


def test_other_formats_are_refused_with_what_to_do(folder):
    for file in folder.glob("*safetensors*"):
        file.unlink()
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"found none but pytorch_model-00001-of-00002\.bin; only safetensors"):
        load(folder)
    (folder / "pytorch_model-00001-of-00002.bin").unlink()
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"found none of a model but adapter_model\.safetensors"):
        load(folder)


@pytest.mark.parametrize("function", [load, inspect_checkpoint, da.DeepseekConfig.from_pretrained])
def test_names_of_the_hub_are_refused_with_what_to_do(function, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"hf download deepseek-ai/DeepSeek-V3\.1 --local-dir DeepSeek-V3\.1"):
        function("deepseek-ai/DeepSeek-V3.1")
    (tmp_path / "deepseek-ai").mkdir()
    with pytest.raises(ValueError, match="expected") as caught:
        function("deepseek-ai/DeepSeek-V3.1")
    assert "hf download" not in str(caught.value)  # a folder of that name: a mistyped path


def test_single_files_are_refused_with_their_folder(folder):
    file = next(folder.glob("*.safetensors"))
    with pytest.raises(ValueError, match=rf"expected a checkpoint folder, got .*give the folder .*{folder.name}'"):
        load(file)


def test_a_cache_of_the_hub_names_its_snapshot(folder, tmp_path):
    cache = tmp_path / "models--a--b"
    shutil.copytree(folder, cache / "snapshots" / "0123abc")
    with pytest.raises(ConfigError, match=r"the checkpoint of this cache is .*snapshots/0123abc"):
        load(cache)


# ---------------------------------------------------------------- FP8 that is not there


def test_files_without_fp8_load_and_save_without_it(tmp_path):
    config = layouts.small(num_nextn_predict_layers=1)
    weights = layouts.bfloat16(config)
    folder = files.write(tmp_path / "model", weights, config.to_dict() | {"quantization_config": FP8})
    model = load(folder)
    assert model.config.quantization_config is None and model.load_report.kept == 0
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16, torch.float32}
    save(model, tmp_path / "saved")
    da.convert(folder, tmp_path / "converted")
    da.slice_checkpoint(folder, tmp_path / "sliced")
    for name in ("saved", "converted", "sliced"):
        assert "quantization_config" not in json.loads((tmp_path / name / "config.json").read_text())
        files.assert_same_tensors(load(tmp_path / name).state_dict(), model.state_dict())


# ---------------------------------------------------------------- values that are not finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.0.mlp.down_proj.weight"]
)
def test_values_that_are_not_finite_are_named(tmp_path, config, name, value, dtype):
    weights = files.tensors(config, dtype)
    weights[name].view(-1)[-1] = value
    folder = files.write(tmp_path / "model", weights, config)
    message = f"{name} has values that are not finite"
    for function in (load, lambda path: load(path, dtype="bfloat16"), lambda path: da.convert(path, tmp_path / "out")):
        with pytest.warns(UserWarning, match=message):
            function(folder)
    with pytest.warns(UserWarning, match=message):
        da.slice_checkpoint(folder, tmp_path / "slice")
    with pytest.warns(UserWarning, match=message):
        model = load(folder)
    assert message in str(model.load_report.warnings)
    with pytest.warns(UserWarning, match=message):
        save(model, tmp_path / "saved")


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("fp8", ["keep", "dequantize"])
def test_fp8_codes_that_mean_nan_are_named(tmp_path, code, fp8):
    config = layouts.small(num_nextn_predict_layers=1)
    weights = layouts.all_layouts(config)["fp8"]
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    weights[name].view(torch.uint8)[-1, -1] = code
    folder = layouts.write(tmp_path / "model", config, "fp8", weights)
    with pytest.warns(UserWarning, match=f"{name} has values that are not finite"):
        model = load(folder, fp8=fp8)
    with pytest.warns(UserWarning, match=f"{name} has values that are not finite"):
        save(model, tmp_path / "saved")
    for how in ({"format": "fp8"}, {"format": "bf16"}, {"format": "fp8", "stacked": True}):
        with pytest.warns(UserWarning, match=f"{name} has values that are not finite"):
            da.convert(folder, tmp_path / str(how), **how)


def test_all_other_codes_and_extremes_are_finite(tmp_path):
    config = layouts.small()
    weights = layouts.all_layouts(config)["fp8"]
    codes = torch.tensor([code for code in range(256) if code not in (0x7F, 0xFF)], dtype=torch.uint8)
    weights["model.layers.1.mlp.experts.3.down_proj.weight"].view(torch.uint8).view(-1)[:254] = codes
    weights["model.norm.weight"].fill_(torch.finfo(torch.bfloat16).max)
    model = load(layouts.write(tmp_path / "model", config, "fp8", weights))
    assert model.load_report.warnings == []


def test_many_tensors_are_counted(tmp_path, config, weights):
    for tensor in weights.values():
        tensor.view(-1)[0] = torch.nan
    with pytest.warns(UserWarning, match=r"\d+ tensors have values that are not finite.*: model\..* and \d+ more"):
        load(files.write(tmp_path, weights, config))


# ---------------------------------------------------------------- sizes without measure


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10_000}, "expected about .* tensors for num_hidden_layers"),
        ({"num_nextn_predict_layers": 10_000}, "expected about .* tensors for num_hidden_layers"),
        ({"n_routed_experts": 100_000, "n_group": 1, "topk_group": 1}, "n_routed_experts=100,000"),
    ],
)
@pytest.mark.parametrize("layout", ["published", "stacked"])
def test_a_config_of_far_more_tensors_than_the_files_hold(tmp_path, config, weights, changes, message, layout, index):
    content = weights if layout == "published" else layouts.stack(weights)
    folder = files.write(tmp_path / "model", content, config.to_dict() | changes, index=index)
    for function in (load, lambda path: da.convert(path, tmp_path / "out"), lambda path: load(path, layers=[0])):
        with pytest.raises(CheckpointError, match=rf"far fewer tensors than the config describes.*\n?.*{message}"):
            function(folder)
    assert not inspect_checkpoint(folder).ok


@pytest.mark.parametrize("device", ["hpu", "xpu", "cuda:99", "nonsense", "meta", "privateuseone", "", 1e9, None])
def test_devices_that_are_not_there(folder, device):
    if device == "xpu" and hasattr(torch, "xpu") and torch.xpu.is_available():
        pytest.skip("it is there")
    with pytest.raises(ValueError, match="expected"):
        load(folder, device=device)


def test_a_checkpoint_written_under_another_default_dtype(tmp_path, config):
    write_checkpoint(tmp_path / "one", config, "bf16", shards=1)
    torch.set_default_dtype(torch.float64)
    try:
        write_checkpoint(tmp_path / "two", config, "bf16", shards=1)
    finally:
        torch.set_default_dtype(torch.float32)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    files.assert_same_tensors(one, two)


def test_every_tensor_of_a_shard_is_aligned(tmp_path):
    """Readers map float32 scales in place: behind three bytes of codes they would not stand at a multiple of four."""
    specs = [TensorSpec("codes", "F8_E4M3", (3,)), TensorSpec("scale", "F32", (2,)), TensorSpec("norm", "BF16", (1,))]
    ShardFiles(tmp_path, [specs], ["model.safetensors"]).start_shards()
    text = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(text[:8], "little")
    header = json.loads(text[8 : 8 + length])
    for spec in specs:
        assert (8 + length + header[spec.name]["data_offsets"][0]) % spec.itemsize == 0, spec.name
