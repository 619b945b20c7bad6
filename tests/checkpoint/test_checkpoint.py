"""Checkpoints that are as they should be: every name filled once, and loaded bit for bit.

The files are written by the safetensors library and the expected parameters put together by `published`, both
independent of the code under test. Comparisons are bitwise.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deepseek_arch as da
from deepseek_arch.checkpoint import LoadReport, load, save
from deepseek_arch.checkpoint.inspection import inspect_checkpoint
from deepseek_arch.checkpoint.synthetic import write_checkpoint
from deepseek_arch.layout.parameter_map import layer_of, layout, scale_name
from support import checkpoint_files as files
from support import small_models

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.filterwarnings("error")


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
    config = small_models.config("v3", num_nextn_predict_layers=1, quantization_config=files.FP8, dtype="bfloat16")
    weights = files.in_fp8(files.tensors(config), config)
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
    config = small_models.config("v3", num_nextn_predict_layers=1, quantization_config=files.FP8, dtype="bfloat16")
    folder = files.write(tmp_path, files.in_fp8(files.tensors(config), config), config)
    model = load(folder, device="cuda", dtype=dtype)
    assert {t.device.type for t in model.state_dict().values()} == {"cuda"}
    files.assert_same_tensors(model.cpu().state_dict(), load(folder, dtype=dtype).state_dict())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8])
def test_power_of_two_scales_in_every_storage_mean_the_same(tmp_path, stored):
    config = small_models.config("v3", quantization_config=files.FP8 | {"scale_fmt": "ue8m0"}, dtype="bfloat16")

    def store(scale):
        scale = torch.exp2(scale.log2().ceil())
        exponents = (scale.log2() + 127).to(torch.uint8)
        return exponents.view(stored) if stored.itemsize == 1 else scale.to(stored)

    weights = files.tensors(config)
    model = load(files.write(tmp_path / "a", files.in_fp8(weights, config, store), config))
    plain = files.in_fp8(weights, config, lambda scale: torch.exp2(scale.log2().ceil()))
    files.assert_same_tensors(model.state_dict(), load(files.write(tmp_path / "b", plain, config)).state_dict())


def test_some_tensors_of_an_fp8_checkpoint_may_be_plain(tmp_path):
    """The stored dtype says what a tensor is, not the config."""
    config = small_models.config("v3", quantization_config=files.FP8, dtype="bfloat16")
    weights = files.in_fp8(files.tensors(config), config)
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
