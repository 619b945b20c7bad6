"""Folders as the core reads and writes them: the same files, the same FP8, replaced all at once."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import deepseek_arch as da
import deepseek_arch.hf as dhf
from deepseek_arch.checkpoint import CheckpointError
from deepseek_arch.checkpoint.files import staging
from deepseek_arch.config.deepseek_config import ConfigError
from deepseek_arch.hf import strict_loading
from support import checkpoint_files as files
from support import layouts, small_models

IDS = torch.tensor([[3, 1, 4, 1, 5]])
QUANTIZATION = {"quant_method": "fp8", "weight_block_size": [16, 12]}


@pytest.fixture
def config():
    return small_models.config("v3")


@pytest.fixture
def weights(config):
    return files.tensors(config)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ["consolidated", "adapter_model", "model", "model-fp32"])
def test_the_same_files_are_read_as_by_the_core(tmp_path, config, weights, name, shards):
    """An index, or model.safetensors alone, and beside it what is none of the model."""
    if name == "model" and shards == 1:
        pytest.skip("it is the model")
    index, pattern = shards > 1, "model.safetensors" if shards == 1 else "model-{}-of-{}.safetensors"
    folder = files.write(tmp_path / "model", weights, config, shards=shards, index=index, pattern=pattern)
    expected = logits(da.load(folder))
    save_file({key: tensor + 1 for key, tensor in weights.items()}, folder / f"{name}.safetensors")
    for read in (da.load, dhf.DeepseekForCausalLM.from_pretrained):
        with pytest.warns(UserWarning, match=rf"not read, since .*: {name}\.safetensors$"):
            model = read(folder)
        torch.testing.assert_close(logits(model), expected)
    model.save_pretrained(tmp_path / "saved")
    assert "transformers_weights" not in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.parametrize("argument", [None, dhf.DeepseekFP8Config(dequantize=True)])
def test_files_without_fp8_load_cast_and_save_without_it(tmp_path, argument):
    config = layouts.small()
    content = config.to_dict() | {"quantization_config": QUANTIZATION}
    folder = files.write(tmp_path / "model", layouts.bfloat16(config), content)
    model = dhf.DeepseekForCausalLM.from_pretrained(folder, quantization_config=argument)
    assert not any(parameter.dtype == torch.float8_e4m3fn for parameter in model.parameters())
    torch.testing.assert_close(logits(model), logits(da.load(folder)))
    model.float().train()(IDS, labels=IDS).loss.backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad is not None
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    files.assert_same_tensors(da.load(tmp_path / "saved").state_dict(), da.load(folder, dtype="float32").state_dict())


def test_files_with_fp8_stay_fp8(tmp_path):
    folder = layouts.write(tmp_path / "model", layouts.small(), "fp8")
    model = dhf.DeepseekForCausalLM.from_pretrained(folder)
    assert any(parameter.dtype == torch.float8_e4m3fn for parameter in model.parameters())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("renames", [None, 0, 2, 5])
def test_a_killed_save_leaves_the_old_model_or_none(tmp_path, config, monkeypatch, renames):
    """Killed while files are written (None), or between the renames at the end."""
    old, new = (dhf.DeepseekForCausalLM(config) for _ in range(2))
    folder = tmp_path / "model"
    old.save_pretrained(folder, max_shard_size="100KB")
    before = da.load(folder).state_dict()
    replace, swap, calls = os.replace, staging.swap_in, []

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def dying(source, target):
        if len(calls) == renames:
            die()
        calls.append(target)
        replace(source, target)

    def swapping(*arguments):
        monkeypatch.setattr(staging.os, "replace", dying)
        swap(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(staging, "swap_in", die if renames is None else swapping)
        child = os.fork()
        if child == 0:
            try:
                new.save_pretrained(folder, max_shard_size="100KB")
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    if renames:
        with pytest.raises(ConfigError, match="The files from before are in"):
            da.load(folder)
    else:
        files.assert_same_tensors(da.load(folder).state_dict(), before)
    new.save_pretrained(folder)
    torch.testing.assert_close(logits(da.load(folder)), logits(new))
    assert {file.suffix for file in folder.iterdir()} == {".json", ".safetensors"}
    assert len(list(folder.glob("*.safetensors"))) == 1


def test_a_failed_save_leaves_the_old_model(tmp_path, config, monkeypatch):
    dhf.DeepseekForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(b"the trainer's")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def failing(*_):
        raise OSError("no")

    monkeypatch.setattr(staging, "swap_in", failing)
    with pytest.raises(OSError, match="no"):
        dhf.DeepseekForCausalLM(config).save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.skipif(staging.fcntl is None, reason="needs locks of folders")
def test_a_second_writer_is_refused(tmp_path, config):
    model = dhf.DeepseekForCausalLM(config)
    lock = staging.FolderLock(tmp_path)
    try:
        with pytest.raises(ValueError, match="expected no other process to write to"):
            model.save_pretrained(tmp_path)
    finally:
        lock.release()
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize("positional", [False, True])
def test_a_variant_leaves_the_weights_beside_it(tmp_path, config, positional):
    model = dhf.DeepseekForCausalLM(config)

    def save_variant(size):
        if positional:
            model.save_pretrained(tmp_path, True, None, False, size, "fp16")
        else:
            model.save_pretrained(tmp_path, max_shard_size=size, variant="fp16")

    model.save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    save_variant("100KB")
    assert len(list(tmp_path.glob("model.fp16-*.safetensors"))) > 1
    save_variant("1GB")  # its own shards go
    assert {file.name for file in tmp_path.glob("model*")} == {"model.safetensors", "model.fp16.safetensors"}
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    model.save_pretrained(tmp_path)
    read = dhf.DeepseekForCausalLM.from_pretrained(tmp_path, variant="fp16")
    torch.testing.assert_close(logits(read), logits(model))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.parametrize("subfolder", ["", "model"])
def test_a_shard_that_is_a_fifo_is_refused_at_once(tmp_path, config, weights, subfolder):
    """To open it is to wait for a writer, and no signal ends that."""
    folder = files.write(tmp_path / "model", weights, config, shards=3, index=True)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    os.mkfifo(shard)
    source = {"pretrained_model_name_or_path": tmp_path if subfolder else folder, "subfolder": subfolder}
    with pytest.raises(OSError, match="expected a regular file, got a FIFO"):
        dhf.DeepseekForCausalLM.from_pretrained(**source)


@pytest.mark.parametrize("quantization", [{}, None])
def test_an_empty_quantization_config_is_none(tmp_path, config, weights, quantization):
    folder = files.write(tmp_path / "model", weights, config)
    content = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(content))
    expected = logits(da.load(folder))
    model = dhf.DeepseekForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(model), expected)
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.parametrize("quantization", [[], "fp8", 8])
def test_a_quantization_config_of_another_type_is_named(tmp_path, config, weights, quantization):
    folder = files.write(tmp_path / "model", weights, config)
    content = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(content))
    for read in (da.load, dhf.DeepseekForCausalLM.from_pretrained):
        with pytest.raises(ConfigError, match="expected quantization_config to be a mapping from names, got"):
            read(folder)


@pytest.mark.parametrize("positional", [True, False])
def test_what_is_pushed_has_the_folders_own_name(tmp_path, monkeypatch, positional):
    """transformers names the repository after the folder that it writes to."""
    import transformers.modeling_utils as written

    created = []

    class Hub:
        def create_repo(self, repo_id, **settings):
            created.append(repo_id)
            raise InterruptedError

    monkeypatch.setattr(written, "hf_api", Hub)
    model = dhf.DeepseekForCausalLM(small_models.config("v3"))
    with pytest.raises(InterruptedError):
        if positional:
            model.save_pretrained(tmp_path / "model", True, None, True)
        else:
            model.save_pretrained(tmp_path / "model", push_to_hub=True)
    assert created == ["model"]


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.gate.e_score_correction_bias"])
def test_values_that_are_not_finite_are_named_on_loading(tmp_path, config, weights, name):
    weights[name].view(-1)[3] = float("nan")
    folder = files.write(tmp_path / "model", weights, config)
    with pytest.warns(UserWarning, match=rf"{name} has values that are not finite"):
        dhf.DeepseekForCausalLM.from_pretrained(folder)


def test_fp8_codes_that_are_not_finite_are_named_on_loading(tmp_path):
    folder = tmp_path / "fp8"
    model = small_models.model(small_models.config("v3"))
    da.save(model, tmp_path / "plain")
    da.convert(tmp_path / "plain", folder, "fp8")
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(torch.uint8)[-1, -1] = 0xFF
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=rf"{name} has values that are not finite"):
        dhf.DeepseekForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("when", ["config", "weights", "end"])
def test_a_folder_that_is_saved_to_meanwhile_is_refused(tmp_path, monkeypatch, when):
    """Between its first file and its last, transformers would take some of each checkpoint."""
    old, new = (small_models.model(small_models.config("v3"), seed=seed) for seed in (1, 2))
    da.save(old, tmp_path / "model", max_shard_size="40KB")
    place = {
        "config": (strict_loading, "settle_files"),
        "weights": (PreTrainedModel, "_load_pretrained_model"),
        "end": (strict_loading, "warn_of_values"),
    }[when]
    real = getattr(*place)

    def saving(*args, **kwargs):
        da.save(new, tmp_path / "model", max_shard_size="30KB")
        return real(*args, **kwargs)

    monkeypatch.setattr(*place, saving)
    with pytest.raises(CheckpointError, match=r"changed while they were read .*config\.json"):
        dhf.DeepseekForCausalLM.from_pretrained(tmp_path / "model")
    monkeypatch.undo()
    assert dhf.DeepseekForCausalLM.from_pretrained(tmp_path / "model") is not None


def test_a_folder_without_config_says_where_the_files_are(tmp_path):
    """It was called a model of another type; a killed save leaves such a folder."""
    da.save(small_models.model(small_models.config("v3")), tmp_path / "model")
    aside = tmp_path / "model" / ".saving" / "replaced"
    aside.mkdir(parents=True)
    (tmp_path / "model" / "config.json").rename(aside / "config.json")
    with pytest.raises(ConfigError, match=r"without one: a process is replacing its files.*\.saving/replaced"):
        dhf.DeepseekForCausalLM.from_pretrained(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"expected a checkpoint folder with a config\.json, got .*empty' without"):
        dhf.DeepseekForCausalLM.from_pretrained(str(tmp_path / "empty"))
