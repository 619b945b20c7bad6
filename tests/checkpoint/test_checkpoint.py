"""Checkpoints that are as they should be: loaded, also in part, saved, sliced, inspected, exchanged with transformers.

The files are written by the safetensors library and the expected parameters put together by `published`, both
independent of the code under test. Comparisons are bitwise.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import deepseek_arch as da
from deepseek_arch.checkpoint import LoadReport, load, save, slice_checkpoint
from deepseek_arch.checkpoint.inspection import inspect_checkpoint
from deepseek_arch.checkpoint.synthetic import write_checkpoint
from deepseek_arch.layout.parameter_map import layer_of, layout, scale_name
from deepseek_arch.layout.subset import select_subset
from deepseek_arch.quant.fp8_blocks import block_grid, dequantize_blocks, quantize_blocks
from support import checkpoint_files as files
from support import published, small_models

ROOT = Path(__file__).resolve().parents[2]
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 12]}


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def named(config):
    """The config as it is read back: with the architecture that `to_dict` fills in."""
    return da.DeepseekConfig.from_dict(config.to_dict())


def in_fp8(weights: dict, config, scale=lambda scale: scale) -> dict:
    """The published FP8 layout of float32 weights: projections become codes beside their scales."""
    block = config.weight_block_size
    out = {}
    for name, weight in weights.items():
        plain = ("norm.weight", "gate.weight", "embed_tokens.weight", "head.weight", "eh_proj.weight", "bias")
        if name.endswith(plain):
            out[name] = weight if name.endswith("bias") else weight.bfloat16()
        else:
            codes, factors = quantize_blocks(weight, block)
            out[name], out[f"{name}_scale_inv"] = codes, scale(factors)
    return out


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("preset", "tensors", "scales"),
    [
        ("deepseek-v3", 91_991, 45_808),
        ("deepseek-v3.2", 92_425, 45_932),
        ("kimi-k2-instruct", 139_644 - 61, None),  # without its stray rotary tables
        ("deepseek-v2-lite", 5_291, 0),
        ("deepseek-v2", 29_102, 0),
        ("glm-4.7-flash", 9_703, 0),
    ],
)
def test_the_table_of_names_has_the_published_number_of_tensors(preset, tensors, scales):
    config = da.DeepseekConfig.from_pretrained(preset)
    slots = list(layout(config))
    fp8 = sum(slot.fp8 for slot in slots) if config.weight_block_size else 0
    assert len({slot.name for slot in slots}) == len(slots) == tensors - fp8
    assert scales is None or fp8 == scales


@pytest.mark.parametrize("kind", small_models.KINDS)
def test_every_parameter_is_filled_exactly_once(kind):
    config = small_models.config(kind, num_nextn_predict_layers=2, attention_bias=True)
    model = da.DeepseekLM(config)
    times = {name: torch.zeros(tensor.shape, dtype=torch.int) for name, tensor in model.state_dict().items()}
    for slot in layout(config):
        if not slot.repeats:
            slot.of(times).add_(1)
    assert all((count == 1).all() for count in times.values())


def test_layer_numbers_are_whole_components():
    """TRAPS F7: model.layers.6 is a prefix of model.layers.61, and 61 occurs in other places."""
    assert layer_of("model.layers.61.mlp.gate.weight") == 61
    assert layer_of("model.layers.6.mlp.experts.61.up_proj.weight") == 6
    assert layer_of("model.norm.weight") is None
    assert layer_of("encoder.model.layers.6.x") is None


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("kind", small_models.KINDS)
def test_every_kind_of_model_loads_bit_for_bit(tmp_path, kind):
    config = small_models.config(kind, num_nextn_predict_layers=1)
    weights = files.tensors(config)
    model = load(files.write(tmp_path, weights, config))
    files.assert_same_tensors(model.state_dict(), files.expected_state(config, weights))
    assert not model.training and all(p.requires_grad for p in model.parameters())
    report = model.load_report
    assert isinstance(report, LoadReport)
    assert report.loaded == len(weights) - 2 and len(report.aliases) == 2
    assert report.bytes_read == sum(t.nbytes for t in weights.values())
    assert not report.skipped and not report.warnings and not report.dequantized and not report.cast
    assert len(report.shards) == 3
    assert f"{report.loaded} tensors" in str(report)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_nextn_predict_layers": 2},
        {"tie_word_embeddings": True, "num_nextn_predict_layers": 1},
        {"num_hidden_layers": 12},  # two-digit layers
        {"moe_layer_freq": 2, "num_hidden_layers": 4},
        {
            "n_routed_experts": None,
            "num_experts_per_tok": None,
            "moe_intermediate_size": None,
            "n_shared_experts": None,
        },
        {"n_shared_experts": None},
    ],
    ids=["two-mtp", "tied", "twelve-layers", "every-second", "dense", "no-shared"],
)
def test_every_shape_of_model_loads_bit_for_bit(tmp_path, changes):
    config = small_models.config("v3", **changes)
    weights = files.tensors(config)
    model = load(files.write(tmp_path, weights, config))
    files.assert_same_tensors(model.state_dict(), files.expected_state(config, weights))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == config.tie_word_embeddings


def test_a_loaded_model_computes_what_the_weights_say(tmp_path):
    config = small_models.config("v3", num_nextn_predict_layers=1)
    model = load(files.write(tmp_path, files.tensors(config, seed=3), config))
    ids = small_models.tokens(config, 2, 9)
    assert torch.equal(model(ids).logits, small_models.model(config, seed=3)(ids).logits)


@pytest.mark.parametrize(
    ("pattern", "shards", "index"),
    [
        ("model-{:05d}-of-{:06d}.safetensors", 3, True),  # V3: five digits of six
        ("model-{}-of-{}.safetensors", 11, True),  # Kimi-K2: no padding
        ("model-{:05d}-of-{:05d}.safetensors", 2, False),
        ("model.safetensors", 1, False),
        ("weights_{}.safetensors", 4, False),
    ],
)
def test_shard_names_carry_no_meaning(tmp_path, pattern, shards, index):
    config = small_models.config("v2-lite")
    weights = files.tensors(config)
    folder = files.write(tmp_path, weights, config, shards, index, pattern)
    files.assert_same_tensors(load(folder).state_dict(), files.expected_state(config, weights))


def test_files_that_the_index_does_not_name_are_not_read(tmp_path):
    config = small_models.config()
    folder = files.write(tmp_path, files.tensors(config), config)
    (folder / "adapter_model.safetensors").write_bytes(b"not even a safetensors file")
    with pytest.warns(
        UserWarning, match=f"not read, since {files.INDEX} does not name them: adapter_model.safetensors"
    ):
        load(folder)
    assert inspect_checkpoint(folder).ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "bfloat16"])
def test_dtype_is_for_everything_but_the_router_bias(tmp_path, dtype):
    """TRAPS C2: the bias stays float32, whatever is asked for and however it is stored."""
    config = small_models.config("v3", num_nextn_predict_layers=1)
    weights = files.tensors(config)
    model = load(files.write(tmp_path, weights, config), dtype=dtype)
    wanted = getattr(torch, str(dtype).removeprefix("torch."))
    expected = files.expected_state(config, weights)
    expected = {n: t if n.endswith("correction_bias") else t.to(wanted) for n, t in expected.items()}
    files.assert_same_tensors(model.state_dict(), expected)
    assert model.config.dtype == str(wanted).removeprefix("torch.")
    assert model.load_report.cast == (0 if wanted == torch.float32 else model.load_report.loaded - 3)


def test_the_default_dtype_is_the_configs(tmp_path):
    """V3.2 stores its norms in float32 beside dtype bfloat16: they are cast."""
    config = small_models.config("v3", dtype="bfloat16")
    weights = files.tensors(config, torch.bfloat16)
    weights = {name: t.float() if name.endswith("norm.weight") else t for name, t in weights.items()}
    model = load(files.write(tmp_path, weights, config))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.load_report.cast == sum(name.endswith("norm.weight") for name in weights) > 0


def test_without_a_dtype_in_the_config_the_embeddings_counts(tmp_path):
    config = small_models.config("v3").to_dict()
    del config["torch_dtype"]
    model = load(files.write(tmp_path, files.tensors(small_models.config("v3"), torch.float16), config))
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert model.config.dtype == "float16"


def test_a_default_device_does_not_reach_into_loading(tmp_path):
    config = small_models.config("v3", num_nextn_predict_layers=1)
    folder = files.write(tmp_path, files.tensors(config), config)
    with torch.device("meta"):
        model = load(folder, dtype="bfloat16")
        save(model, tmp_path / "saved", format="fp8")
        write_checkpoint(tmp_path / "random", config)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    load(tmp_path / "saved")
    load(tmp_path / "random")


# ---------------------------------------------------------------- FP8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_dequantized_exactly(tmp_path, dtype):
    """Blocks of 16 x 12 on sizes that neither divides; three shards dealt in turn part every weight from its scale."""
    config = small_models.config("v3", num_nextn_predict_layers=1, quantization_config=FP8, dtype="bfloat16")
    weights = in_fp8(files.tensors(config), config)
    folder = files.write(tmp_path, weights, config)
    shard_of = json.loads((folder / files.INDEX).read_text())["weight_map"]
    assert all(shard_of[name] != shard_of[scale_name(name)] for name in weights if scale_name(name) in weights)
    model = load(folder, dtype=dtype, fp8="dequantize")
    plain = {}
    for name, tensor in weights.items():
        if tensor.dtype == torch.float8_e4m3fn:
            rows, columns = tensor.shape
            scale = weights[scale_name(name)].repeat_interleave(16, 0)[:rows].repeat_interleave(12, 1)[:, :columns]
            plain[name] = (tensor.float() * scale).to(dtype)
        elif not name.endswith("_scale_inv"):
            plain[name] = tensor if name.endswith("correction_bias") else tensor.to(dtype)
    files.assert_same_tensors(model.state_dict(), files.expected_state(config, plain))
    report = model.load_report
    assert report.dequantized == sum(t.dtype == torch.float8_e4m3fn for t in weights.values()) > 0 == report.kept
    assert report.bytes_read == sum(t.nbytes for t in weights.values())
    # TRAPS E12: what is no longer FP8 must not say so.
    assert model.config.quantization_config is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_holds_the_same_bits(tmp_path, dtype):
    config = small_models.config("v3", num_nextn_predict_layers=1, quantization_config=FP8, dtype="bfloat16")
    folder = files.write(tmp_path, in_fp8(files.tensors(config), config), config)
    model = load(folder, device="cuda", dtype=dtype)
    assert {t.device.type for t in model.state_dict().values()} == {"cuda"}
    files.assert_same_tensors(model.cpu().state_dict(), load(folder, dtype=dtype).state_dict())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8])
def test_power_of_two_scales_in_every_storage_mean_the_same(tmp_path, stored):
    config = small_models.config("v3", quantization_config=FP8 | {"scale_fmt": "ue8m0"}, dtype="bfloat16")

    def store(scale):
        scale = torch.exp2(scale.log2().ceil())
        exponents = (scale.log2() + 127).to(torch.uint8)
        return exponents.view(stored) if stored.itemsize == 1 else scale.to(stored)

    weights = files.tensors(config)
    model = load(files.write(tmp_path / "a", in_fp8(weights, config, store), config))
    plain = in_fp8(weights, config, lambda scale: torch.exp2(scale.log2().ceil()))
    files.assert_same_tensors(model.state_dict(), load(files.write(tmp_path / "b", plain, config)).state_dict())


def test_some_tensors_of_an_fp8_checkpoint_may_be_plain(tmp_path):
    """The stored dtype says what a tensor is, not the config."""
    config = small_models.config("v3", quantization_config=FP8, dtype="bfloat16")
    weights = in_fp8(files.tensors(config), config)
    name = "model.layers.1.self_attn.o_proj.weight"
    weights[name] = torch.randn(weights[name].shape).bfloat16()
    del weights[scale_name(name)]
    model = load(files.write(tmp_path, weights, config))
    assert torch.equal(model.state_dict()[name], weights[name])


# ---------------------------------------------------------------- MTP modules, repeats, strays


def test_repeated_embeddings_may_be_absent(tmp_path):
    config = small_models.config("v3", num_nextn_predict_layers=1)
    weights = files.tensors(config)
    del weights["model.layers.3.embed_tokens.weight"], weights["model.layers.3.shared_head.head.weight"]
    model = load(files.write(tmp_path, weights, config))
    assert model.load_report.aliases == []
    files.assert_same_tensors(model.state_dict(), files.expected_state(config, weights))


def test_a_repeated_embedding_may_be_stored_in_another_dtype(tmp_path):
    config = small_models.config("v3", num_nextn_predict_layers=1, dtype="bfloat16")
    weights = files.tensors(config, torch.bfloat16)
    name = "model.layers.3.embed_tokens.weight"
    weights[name] = weights[name].float()
    assert name in load(files.write(tmp_path, weights, config)).load_report.aliases


def test_a_tied_head_may_be_stored_and_must_then_be_equal(tmp_path):
    config = small_models.config("v3", tie_word_embeddings=True)
    weights = files.tensors(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    model = load(files.write(tmp_path, weights, config))
    assert model.load_report.aliases == ["lm_head.weight"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_prediction_layers_are_left_out_when_not_wanted(tmp_path):
    config = small_models.config("v3", num_nextn_predict_layers=1)
    weights = files.tensors(config)
    folder = files.write(tmp_path, weights, config)
    drafts = [name for name in weights if name.startswith("model.layers.3.")]
    model = load(folder, mtp=False)
    assert len(model.mtp) == 0 and model.config.num_nextn_predict_layers == 0
    assert sorted(model.load_report.skipped) == sorted(drafts)
    assert model.load_report.bytes_read == sum(t.nbytes for name, t in weights.items() if name not in drafts)

    # The same when the config does not know of them.
    (folder / "config.json").write_text(json.dumps(config.replace(num_nextn_predict_layers=0).to_dict()))
    assert sorted(load(folder).load_report.skipped) == sorted(drafts)


def test_prediction_layers_that_the_files_lack_are_dropped_with_a_warning(tmp_path):
    """transformers writes such folders: no tensor of the layer, its number still in the config."""
    config = small_models.config("v3", num_nextn_predict_layers=1)
    weights = {n: t for n, t in files.tensors(config).items() if not n.startswith("model.layers.3.")}
    folder = files.write(tmp_path, weights, config)
    with pytest.warns(UserWarning, match="num_nextn_predict_layers=1, but the files hold no tensor of layer 3"):
        model = load(folder)
    assert model.config.num_nextn_predict_layers == 0 and len(model.mtp) == 0
    assert len(model.load_report.warnings) == 1
    assert not load(folder, mtp=False).load_report.warnings


def test_stray_rotary_tables_are_skipped_and_reported(tmp_path):
    """TRAPS H2, and Kimi-K2's: [56] fits no rotary dimension."""
    config = small_models.config("kimi")
    weights = files.tensors(config)
    strays = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(3)]
    weights |= {name: torch.ones(56, dtype=torch.bfloat16) for name in strays}
    model = load(files.write(tmp_path, weights, config))
    assert sorted(model.load_report.skipped) == strays
    assert model.load_report.loaded == len(weights) - 3


def test_router_biases_that_are_not_finite_are_loaded_with_a_warning(tmp_path):
    """TRAPS C13: some published fixtures contain them."""
    config = small_models.config("v3")
    weights = files.tensors(config)
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    weights[name][1] = torch.nan
    with pytest.warns(UserWarning, match=f"{name} has values that are not finite"):
        model = load(files.write(tmp_path, weights, config))
    assert len(model.load_report.warnings) == 1
    files.assert_same_tensors(model.state_dict(), files.expected_state(config, weights))


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
    changes = {"quantization_config": FP8, "dtype": "bfloat16"} if fp8 else {}
    config = small_models.config("v3", num_hidden_layers=12, num_nextn_predict_layers=1, **changes)
    weights = files.tensors(config)
    weights = in_fp8(weights, config) if fp8 else weights
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
    assert again.config == named(report.config) == named(config.replace(dtype=str(dtype)))
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
    config = small_models.config("v3", num_nextn_predict_layers=1, quantization_config=FP8)
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
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == FP8
    again = published.published_state(load(tmp_path, fp8="dequantize"))
    for name in fp8:
        assert torch.equal(again[name], dequantize_blocks(*quantize_blocks(weights[name], (16, 12)), (16, 12)))


def test_saving_fp8_with_power_of_two_scales(tmp_path):
    config = small_models.config("v3", quantization_config=FP8 | {"scale_fmt": "ue8m0"})
    save(da.DeepseekLM(config), tmp_path, format="fp8")
    scales = [t for name, t in files.read(tmp_path).items() if name.endswith("_scale_inv")]
    assert scales and all((torch.frexp(scale).mantissa == 0.5).all() for scale in scales)


def test_saving_fp8_without_a_quantization_config_uses_the_published_one(tmp_path):
    save(da.DeepseekLM(small_models.config("v3")), tmp_path, format="fp8")
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored == FP8 | {"weight_block_size": [128, 128]}
    load(tmp_path)


def test_saving_without_fp8_says_so(tmp_path):
    """TRAPS E12: a quantization_config beside plain tensors makes the next reader quantize or fail."""
    save(da.DeepseekLM(small_models.config("v3", quantization_config=FP8)), tmp_path)
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


# ---------------------------------------------------------------- slicing, inspecting, inventing


@pytest.mark.parametrize("fp8", [False, True])
def test_a_slice_loads_as_the_part_does(tmp_path, fp8):
    changes = {"quantization_config": FP8, "dtype": "bfloat16"} if fp8 else {}
    config = small_models.config("v3", num_hidden_layers=5, num_nextn_predict_layers=1, **changes)
    weights = files.tensors(config)
    weights = in_fp8(weights, config) if fp8 else weights
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
    config = small_models.config("v3", num_nextn_predict_layers=1, quantization_config=FP8, dtype="bfloat16")
    weights = in_fp8(files.tensors(config), config)
    stray = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = files.write(tmp_path, weights | {stray: torch.ones(4)}, config)
    report = inspect_checkpoint(folder)
    assert report.ok and report.config == named(config)
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


# ---------------------------------------------------------------- memory


def test_loading_needs_the_model_and_little_more(tmp_path):
    """Peak resident memory above the start, in a process of its own, against the bytes of the files: a copy of the
    model, or a mapping of the files, would make it two. The rest is one shard's headers and the allocator's slack."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's account of peak memory")
    config = small_models.config("v3", vocab_size=20_000, hidden_size=512, moe_intermediate_size=512)
    save(da.DeepseekLM(config.replace(n_routed_experts=32), dtype=torch.bfloat16), tmp_path / "large")
    save(da.DeepseekLM(small_models.config("v3")), tmp_path / "small")
    script = """
import sys, torch
import deepseek_arch as da
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
da.load(sys.argv[1])  # imports, and the allocator's own
open("/proc/self/clear_refs", "w").write("5")
start = status("VmRSS")
model = da.load(sys.argv[2])
print((status("VmHWM") - start) / model.load_report.bytes_read)
"""
    path = [str(ROOT), str(ROOT / "kernels")]
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path[:0] = {path!r}\n{script}",
            tmp_path / "small",
            tmp_path / "large",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(run.stdout) < 1.15
