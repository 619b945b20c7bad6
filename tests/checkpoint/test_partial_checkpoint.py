"""Parts of checkpoints: chosen layers and experts, slices, what inspection lists, and synthetic files."""

from __future__ import annotations

import json

import pytest
import torch

import deepseek_arch as da
from deepseek_arch.checkpoint import load, slice_checkpoint
from deepseek_arch.checkpoint.inspection import inspect_checkpoint
from deepseek_arch.checkpoint.synthetic import write_checkpoint
from deepseek_arch.layout.parameter_map import layer_of, scale_name
from deepseek_arch.layout.subset import select_subset
from support import checkpoint_files as files
from support import published, small_models

pytestmark = pytest.mark.filterwarnings("error")


# ---------------------------------------------------------------- loading in part


@pytest.mark.parametrize(
    ("base", "layers", "dense"),
    [
        ("deepseek-v3", [0, 3, 60], 1),
        ("deepseek-v3", [1, 2], 2),
        ("deepseek-v3", [5], 0),
        ("deepseek-v2-lite", range(0, 27, 2), 1),
    ],
)
def test_selected_layers_keep_their_kind(base, layers, dense):
    source = da.DeepseekConfig.from_pretrained(base)
    chosen = select_subset(source, layers=layers)
    assert chosen.config.first_k_dense_replace == dense
    kinds = [chosen.config.is_moe_layer(i) for i in range(chosen.config.num_hidden_layers)]
    assert kinds == [source.is_moe_layer(layer) for layer in layers]
    # The MTP module keeps its experts.
    assert chosen.config.is_moe_layer(chosen.config.num_hidden_layers)


def test_layers_of_an_alternating_model_must_stay_regular():
    source = small_models.config("v3", num_hidden_layers=6, moe_layer_freq=2)  # dense, dense, E, dense, E, dense
    assert select_subset(source, layers=[2, 4]).config.moe_layer_freq == 1
    assert select_subset(source, layers=[0, 1, 2, 3]).config.moe_layer_freq == 2
    with pytest.raises(ValueError, match="regular pattern"):
        select_subset(source, layers=[2, 3, 5])


def test_a_dense_prediction_layer_stays_dense():
    source = small_models.config("v3", first_k_dense_replace=5, num_nextn_predict_layers=1)
    assert not source.is_moe_layer(3)
    assert not select_subset(source, layers=[1]).config.is_moe_layer(1)


@pytest.mark.parametrize(
    ("base", "experts", "groups", "kept_groups", "top_k"),
    [
        ("deepseek-v3", 32, 1, 1, 8),
        ("deepseek-v3", 64, 2, 2, 8),
        ("deepseek-v3", 192, 6, 4, 8),
        ("deepseek-v3", 256, 8, 4, 8),
        ("deepseek-v3", 6, 1, 1, 6),
        ("deepseek-v2", 40, 2, 2, 6),
        ("kimi-k2-instruct", 100, 1, 1, 8),
        ("deepseek-v2-lite", 5, 1, 1, 5),
    ],
)
def test_selected_experts_are_whole_groups(base, experts, groups, kept_groups, top_k):
    config = select_subset(da.DeepseekConfig.from_pretrained(base), experts=experts).config
    assert (config.n_routed_experts, config.num_experts_per_tok) == (experts, top_k)
    assert (config.n_group, config.topk_group) == (groups, kept_groups)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": []}, "expected layers to be some of the numbers 0 to 60"),
        ({"layers": [0, 61]}, r"got \[0, 61\]"),
        ({"layers": [-1]}, r"got \[-1\]"),
        ({"layers": [True]}, r"got \[True\]"),
        ({"layers": 4}, "got 4"),
        ({"layers": "012"}, "got '012'"),
        ({"layers": [1, 1]}, "ascending, each once"),
        ({"layers": [2, 1]}, "ascending, each once"),
        ({"experts": 0}, "between 1 and 256, got 0"),
        ({"experts": 257}, "between 1 and 256, got 257"),
        ({"experts": 2.0}, "between 1 and 256, got 2.0"),
        ({"experts": 40}, r"at most 32 \(one group\) or whole groups \(64, 96, .*256\), got 40"),
    ],
)
def test_impossible_selections_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        select_subset(da.DeepseekConfig.from_pretrained("deepseek-v3"), **arguments)


def part_of(config, weights: dict, layers: list[int], experts: int, block: int = 1) -> tuple[dict, int]:
    """The weights of some layers and experts under their new names, and the bytes of what they are."""
    out, nbytes = {}, 0
    first = config.num_hidden_layers
    numbers = {layer: i for i, layer in enumerate(layers)} | {first: len(layers)}
    for name, tensor in weights.items():
        parts = name.split(".")
        if name.startswith("model.layers."):
            if int(parts[2]) not in numbers:
                continue
            parts[2] = str(numbers[int(parts[2])])
        if "experts" in parts and int(parts[parts.index("experts") + 1]) >= experts:
            continue
        if name.endswith(("mlp.gate.weight", "correction_bias")):
            tensor = tensor[:experts]
        out[".".join(parts)] = tensor
        nbytes += tensor.nbytes
    return out, nbytes


@pytest.mark.parametrize("fp8", [False, True])
def test_a_part_is_loaded_by_reading_only_its_bytes(tmp_path, fp8):
    changes = {"quantization_config": files.FP8, "dtype": "bfloat16"} if fp8 else {}
    config = small_models.config("v3", num_hidden_layers=12, num_nextn_predict_layers=1, **changes)
    weights = files.tensors(config)
    weights = files.in_fp8(weights, config) if fp8 else weights
    folder = files.write(tmp_path / "whole", weights, config)
    model = load(folder, layers=[0, 1, 11], experts=4)
    part, nbytes = part_of(config, weights, [0, 1, 11], experts=4)
    assert model.load_report.bytes_read == nbytes < sum(t.nbytes for t in weights.values()) / 2
    smaller = config.replace(num_hidden_layers=3, n_routed_experts=4, n_group=2, topk_group=2)
    expected = load(files.write(tmp_path / "part", part, smaller))
    files.assert_same_tensors(model.state_dict(), expected.state_dict())
    assert model.config == expected.config
    ids = small_models.tokens(config, 1, 5)
    assert torch.equal(model(ids).logits, expected(ids).logits)


def test_shards_that_hold_nothing_needed_may_be_absent(tmp_path):
    """Someone downloads the three files that four layers need."""
    config = small_models.config("v3", num_hidden_layers=6)
    weights = dict(sorted(files.tensors(config).items(), key=lambda item: (layer_of(item[0]) or 0, item[0])))
    folder = files.write(tmp_path, weights, config)
    index = json.loads((folder / files.INDEX).read_text())
    # By layer instead of in turn.
    for file in folder.glob("*.safetensors"):
        file.unlink()
    index["weight_map"] = {name: f"layer{layer_of(name)}.safetensors" for name in weights}
    for layer in {layer_of(name) for name in weights}:
        content = {name: t for name, t in weights.items() if layer_of(name) == layer}
        files.save_file(content, str(folder / f"layer{layer}.safetensors"))
    (folder / files.INDEX).write_text(json.dumps(index))
    (folder / "layer2.safetensors").unlink()
    (folder / "layer5.safetensors").write_bytes(b"half a download")
    model = load(folder, layers=[0, 1, 3])
    assert model.load_report.shards == [f"layer{i}.safetensors" for i in (0, 1, 3, None)]


# ---------------------------------------------------------------- slicing, inspecting, inventing


@pytest.mark.parametrize("fp8", [False, True])
def test_a_slice_loads_as_the_part_does(tmp_path, fp8):
    changes = {"quantization_config": files.FP8, "dtype": "bfloat16"} if fp8 else {}
    config = small_models.config("v3", num_hidden_layers=5, num_nextn_predict_layers=1, **changes)
    weights = files.tensors(config)
    weights = files.in_fp8(weights, config) if fp8 else weights
    folder = files.write(tmp_path / "whole", weights, config)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.bin").write_bytes(b"large")
    report = slice_checkpoint(folder, tmp_path / "part", layers=[0, 4], experts=2, max_shard_size="30KB")
    part, nbytes = part_of(config, weights, [0, 4], experts=2)
    files.assert_same_tensors(files.read(tmp_path / "part"), part)
    assert report.nbytes == nbytes
    assert (tmp_path / "part" / "tokenizer.json").exists() and not (tmp_path / "part" / "notes.bin").exists()
    stored = da.DeepseekConfig.from_pretrained(tmp_path / "part")
    assert stored.quantization_config == config.quantization_config and stored.dtype == config.dtype
    model, expected = load(tmp_path / "part"), load(folder, layers=[0, 4], experts=2)
    files.assert_same_tensors(model.state_dict(), expected.state_dict())
    assert model.config == expected.config


def test_a_slice_keeps_the_tokenizer_that_is_there(tmp_path):
    config = small_models.config("v3")
    folder = files.write(tmp_path / "whole", files.tensors(config), config)
    (folder / "tokenizer.json").write_text("from the checkpoint")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "tokenizer.json").write_text("my own")
    slice_checkpoint(folder, tmp_path / "part", layers=[1])
    assert (tmp_path / "part" / "tokenizer.json").read_text() == "my own"


def test_a_slice_without_prediction_layers(tmp_path):
    config = small_models.config("v3", num_nextn_predict_layers=1)
    folder = files.write(tmp_path / "whole", files.tensors(config), config)
    slice_checkpoint(folder, tmp_path / "part", mtp=False)
    assert set(files.read(tmp_path / "part")) == set(published.shapes(config, mtp=False))
    assert not load(tmp_path / "part").load_report.skipped


def test_inspecting_lists_tensors_and_what_becomes_of_them(tmp_path):
    config = small_models.config("v3", num_nextn_predict_layers=1, quantization_config=files.FP8, dtype="bfloat16")
    weights = files.in_fp8(files.tensors(config), config)
    stray = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = files.write(tmp_path, weights | {stray: torch.ones(4)}, config)
    report = inspect_checkpoint(folder)
    assert report.ok and report.config == files.named(config)
    assert {i.name: i.shape for i in report.tensors} == {n: tuple(t.shape) for n, t in weights.items()} | {stray: (4,)}
    fp8 = [name for name, t in weights.items() if t.dtype == torch.float8_e4m3fn]
    assert report.dequantized == len(fp8)
    assert len(report.loads) == len(weights) - len(fp8) - 2
    assert set(report.aliases) == {f"model.layers.3.{n}.weight" for n in ("embed_tokens", "shared_head.head")}
    assert report.skipped == (stray,)
    assert report.dtypes["F8_E4M3"] == (len(fp8), sum(weights[name].nbytes for name in fp8))
    assert sum(report.shards.values()) == report.nbytes == sum(t.nbytes for t in weights.values()) + 16
    assert len(report.shards) == 3
    as_json = json.loads(json.dumps(report.to_dict()))
    assert as_json["ok"] and len(as_json["tensors"]) == len(weights) + 1


def test_synthetic_checkpoints_have_what_the_published_ones_have(tmp_path):
    config = da.DeepseekConfig.from_pretrained("tiny")
    report = write_checkpoint(tmp_path / "fp8", config)
    write_checkpoint(tmp_path / "bf16", config, "bf16")
    stored = files.read(tmp_path / "fp8")
    shapes = published.shapes(config)
    assert {n: tuple(t.shape) for n, t in stored.items() if not n.endswith("_scale_inv")} == shapes
    fp8 = {name for name, t in stored.items() if t.dtype == torch.float8_e4m3fn}
    assert len(fp8) == report.quantized > 0 and len(stored) == report.tensors
    shard_of = json.loads((tmp_path / "fp8" / files.INDEX).read_text())["weight_map"]
    assert len(set(shard_of.values())) == 4
    apart = sum(shard_of[name] != shard_of[scale_name(name)] for name in fp8)
    assert 0 < apart < len(fp8)
    assert any(size % 128 for name in fp8 for size in stored[name].shape)
    biases = torch.cat([t for name, t in stored.items() if name.endswith("correction_bias")])
    assert biases.dtype == torch.float32 and (biases < 0).any() and (biases > 0).any()
    # Both formats mean the same model.
    dequantized = load(tmp_path / "fp8", fp8="dequantize")
    files.assert_same_tensors(dequantized.state_dict(), load(tmp_path / "bf16").state_dict())
    write_checkpoint(tmp_path / "again", config, seed=1, shards=1)
    other = files.read(tmp_path / "again")
    assert not torch.equal(other["lm_head.weight"], stored["lm_head.weight"])
    assert inspect_checkpoint(tmp_path / "again").ok
