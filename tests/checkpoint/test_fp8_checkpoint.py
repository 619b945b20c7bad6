"""Checkpoints whose FP8 stays FP8: loaded byte for byte, whole and in part, and written back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import deepseek_arch as da
from deepseek_arch.checkpoint import CheckpointError, inspect_checkpoint, load, save
from deepseek_arch.checkpoint.synthetic import write_checkpoint
from deepseek_arch.layers.linear import Linear
from deepseek_arch.layout.parameter_map import layout, scale_name
from deepseek_arch.moe.moe import Experts
from deepseek_arch.quant.fp8_blocks import quantize_blocks
from deepseek_arch.quant.fp8_convert import fp8_layers
from deepseek_arch.quant.fp8_experts import FP8Experts
from deepseek_arch.quant.fp8_linear import FP8Linear
from support import checkpoint_files as files
from support import small_models

ROOT = Path(__file__).resolve().parents[2]
E4M3 = torch.float8_e4m3fn
# No size of the small models is a multiple of either, so that every matrix has partial blocks.
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 12]}
PLAIN = ("norm.weight", "gate.weight", "embed_tokens.weight", "head.weight", "eh_proj.weight", "bias")  # TRAPS E7
O_PROJ, GATE = "model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.gate.weight"


def in_fp8(weights: dict[str, Tensor], block=(16, 12), scale=lambda scale: scale) -> dict[str, Tensor]:
    """The published FP8 layout of float32 weights."""
    out = {}
    for name, weight in weights.items():
        if name.endswith(PLAIN):
            out[name] = weight if name.endswith("bias") else weight.bfloat16()
        else:
            out[name], factors = quantize_blocks(weight, block)
            out[scale_name(name)] = scale(factors)
    return out


def checkpoint(folder: Path, kind: str = "v3", change=lambda weights: None, **changes) -> dict[str, Tensor]:
    """Writes one and returns its tensors; dealt out so that a weight and its scales lie in different files."""
    fields = {"quantization_config": FP8, "dtype": "bfloat16", "num_nextn_predict_layers": 1}
    config = small_models.config(kind, **(fields | changes))
    weights = in_fp8(files.tensors(config))
    biases = [slot for slot in layout(config) if slot.name.endswith(("proj.bias", "mqa.bias"))]
    weights |= {slot.name: torch.randn(slot.shape).bfloat16() for slot in biases}
    change(weights)
    files.write(folder, weights, config)
    return weights


def expected_state(config, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state that the model must have: codes and scales stacked alike, as bytes, since each is a grid of rows."""
    codes = {name: t.view(torch.uint8) if t.dtype == E4M3 else t for name, t in weights.items()}
    ordinary = {name: t for name, t in codes.items() if not name.endswith("_scale_inv")}
    state = files.expected_state(config, ordinary)
    scales = {name: weights.get(scale_name(name), torch.zeros(1)) for name in ordinary}
    stacked = files.expected_state(config, scales)
    for name in list(state):
        if state[name].dtype == torch.uint8:
            state[name], state[scale_name(name)] = state[name].view(E4M3), stacked[name]
    return state


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("kind", ["v3", "v2-lite", "moonlight"])
def test_what_is_fp8_stays_fp8_byte_for_byte(tmp_path, kind):
    weights = checkpoint(tmp_path, kind, attention_bias=kind == "v3")
    model = load(tmp_path)  # the default
    config = da.DeepseekConfig.from_pretrained(tmp_path)
    files.assert_same_tensors(model.state_dict(), expected_state(config, weights))
    assert model.config == config  # the quantization_config too
    codes = sum(t.dtype == E4M3 for t in weights.values())
    report = model.load_report
    assert report.kept == codes > 0 == report.dequantized
    assert report.bytes_read == sum(t.nbytes for t in weights.values())
    assert f"{codes} kept in FP8" in str(report)
    assert not model.training
    for name, parameter in model.named_parameters():
        held = parameter.dtype == E4M3 or name.endswith("_scale_inv")
        assert parameter.requires_grad != held, name
    assert {layer.block_size for layer in fp8_layers(model).values()} == {(16, 12)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, "bfloat16"])
def test_dtype_is_that_of_everything_else(tmp_path, dtype):
    weights = checkpoint(tmp_path)
    model = load(tmp_path, dtype=dtype)
    wanted = getattr(torch, str(dtype).removeprefix("torch."))
    narrow = {
        name: t if t.dtype == E4M3 or name.endswith(("_scale_inv", "correction_bias")) else t.to(wanted)
        for name, t in weights.items()
    }
    files.assert_same_tensors(model.state_dict(), expected_state(model.config, narrow))
    assert {layer.compute_dtype for layer in fp8_layers(model).values()} == {wanted}
    assert model(small_models.tokens(model.config, 1, 5)).logits.dtype == wanted


def test_kept_and_dequantized_weights_are_the_same_model(tmp_path):
    """In float32, where dequantizing rounds a product of two numbers of few bits: only the order of sums differs."""
    checkpoint(tmp_path, dtype="float32")
    kept, plain = load(tmp_path, fp8="keep"), load(tmp_path, fp8="dequantize")
    assert plain.load_report.kept == 0 < plain.load_report.dequantized == kept.load_report.kept
    ids = small_models.tokens(kept.config, 2, 9)
    assert small_models.error(kept(ids).logits, plain(ids).logits) < 2.0**-16
    assert torch.equal(da.generate(kept, ids, max_new_tokens=5), da.generate(plain, ids, max_new_tokens=5))
    files.assert_same_tensors(da.dequantize(kept).state_dict(), plain.state_dict())
    assert kept.config == plain.config


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8])
def test_scales_of_every_storage_become_float32(tmp_path, stored):
    """TRAPS E3: exponent bytes b mean 2^(b - 127)."""

    def store(scale):
        exponents = scale.log2().ceil()
        return (exponents + 127).to(torch.uint8).view(stored) if stored.itemsize == 1 else exponents.exp2().to(stored)

    config = small_models.config("v3", quantization_config=FP8 | {"scale_fmt": "ue8m0"}, dtype="bfloat16")
    weights = in_fp8(files.tensors(config), scale=store)
    model = load(files.write(tmp_path, weights, config))
    plain = in_fp8(files.tensors(config), scale=lambda scale: scale.log2().ceil().exp2())
    files.assert_same_tensors(model.state_dict(), expected_state(config, plain))
    assert {layer.scale_format for layer in fp8_layers(model).values()} == {"ue8m0"}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scales_that_are_not_finite_are_named(tmp_path, bad):
    checkpoint(tmp_path, change=lambda weights: weights[scale_name(O_PROJ)][0].fill_(bad))
    with pytest.raises(CheckpointError, match=rf"{O_PROJ}_scale_inv: expected finite scales"):
        load(tmp_path)


@pytest.mark.parametrize("fp8", ["keep", "dequantize"])
def test_negative_scales_are_refused_and_scales_of_zero_named(tmp_path, fp8):
    """A scale is a largest magnitude divided by 448: none is below 0, and 0 makes zeros of a whole block."""
    checkpoint(tmp_path / "negative", change=lambda weights: weights[scale_name(O_PROJ)][0, 1].fill_(-0.5))
    with pytest.raises(CheckpointError, match=rf"{O_PROJ}_scale_inv: expected scales >= 0, got -0.5 at \[0, 1\]"):
        load(tmp_path / "negative", fp8=fp8)
    checkpoint(tmp_path / "zero", change=lambda weights: weights[scale_name(O_PROJ)][0, 1].fill_(0))
    with pytest.warns(UserWarning, match=rf"{O_PROJ}_scale_inv has scales of 0"):
        model = load(tmp_path / "zero", fp8=fp8)
    assert any("scales of 0" in warning for warning in model.load_report.warnings)


def test_copies_of_odd_scales_are_warned_of(tmp_path):
    checkpoint(tmp_path / "from", change=lambda weights: weights[scale_name(O_PROJ)][0, 1].fill_(-0.5))
    with pytest.warns(UserWarning, match=rf"{O_PROJ}_scale_inv has scales below 0, which load refuses"):
        da.slice_checkpoint(tmp_path / "from", tmp_path / "slice", layers=[0, 1], mtp=False)


@pytest.mark.parametrize("bad", [-1.0, torch.nan, torch.inf])
def test_odd_scales_enter_neither_a_model_nor_a_file(tmp_path, bad):
    checkpoint(tmp_path / "from")
    model = load(tmp_path / "from")
    name = "model.layers.1.mlp.experts.down_proj_scale_inv"
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state[name][3, 0, 0] = bad
    with pytest.raises(RuntimeError, match=rf"{name}: expected .*scales.*, got {bad}"):
        model.load_state_dict(state)
    with torch.no_grad():
        model.get_parameter(name)[3, 0, 0] = bad
    with pytest.raises(ValueError, match=rf"experts\.3\.down_proj\.weight_scale_inv: expected .*scales.*, got {bad}"):
        save(model, tmp_path / "to", format="fp8")
    assert not (tmp_path / "to").exists() or not list((tmp_path / "to").glob("*.safetensors"))


def without_fp8(weights: dict[str, Tensor], names) -> None:
    for name in [name for name in weights if weights[name].dtype == E4M3 and names(name)]:
        del weights[scale_name(name)]
        weights[name] = torch.randn(weights[name].shape).bfloat16()


def test_the_files_say_which_tensors_are_fp8_not_the_config(tmp_path):
    """V3.1 keeps to its format but for one projection. A layer's experts count as one."""
    several = (O_PROJ, "model.layers.2.mlp.experts.")
    weights = checkpoint(tmp_path / "mixed", change=lambda w: without_fp8(w, lambda name: name.startswith(several)))
    model = load(tmp_path / "mixed")
    files.assert_same_tensors(model.state_dict(), expected_state(model.config, weights))
    layers = model.model.layers
    assert type(layers[0].self_attn.o_proj) is Linear and type(layers[1].self_attn.o_proj) is FP8Linear
    assert type(layers[2].mlp.experts) is Experts and type(layers[1].mlp.experts) is FP8Experts
    save(model, tmp_path / "saved", format="fp8")  # what is FP8 as it is, and what is not, too
    files.assert_same_tensors(files.read(tmp_path / "saved"), weights)


def test_experts_that_are_fp8_in_part_are_an_error_unless_dequantized(tmp_path):
    some = ("model.layers.2.mlp.experts.1.up_proj.weight", "model.layers.3.mlp.experts.7.down_proj.weight")
    checkpoint(tmp_path, change=lambda weights: without_fp8(weights, lambda name: name in some))
    with pytest.raises(CheckpointError, match="FP8 in part, which only fp8='dequantize' loads") as caught:
        load(tmp_path)
    (found,) = caught.value.problems.values()
    assert found == ["model.layers.2.mlp.experts: 23 of 24 tensors", "model.layers.3.mlp.experts: 23 of 24 tensors"]
    assert load(tmp_path, fp8="dequantize").load_report.dequantized
    assert load(tmp_path, layers=[0, 1], mtp=False).load_report.kept
    report = inspect_checkpoint(tmp_path)
    assert report.ok and len(report.warnings) == 2 and "only fp8='dequantize' loads them" in report.warnings[0]


def test_fp8_where_nobody_publishes_it_is_dequantized(tmp_path):
    """A head or a router in FP8 (TRAPS E7) has no layer that could keep it."""

    def more(weights):
        for name in ("lm_head.weight", GATE):
            weights[name], weights[scale_name(name)] = quantize_blocks(weights[name], (16, 12))

    weights = checkpoint(tmp_path, change=more, num_nextn_predict_layers=0)
    model = load(tmp_path)
    assert model.load_report.dequantized == 2 < model.load_report.kept
    head = (
        weights["lm_head.weight"].float()
        * weights["lm_head.weight_scale_inv"].repeat_interleave(16, 0)[:61].repeat_interleave(12, 1)[:, :32]
    )
    assert torch.equal(model.lm_head.weight, head.bfloat16()) and type(model.lm_head) is Linear


def test_checkpoints_without_fp8_load_as_before(tmp_path):
    config = small_models.config("v3")
    weights = files.tensors(config)
    for name, quantization in (("plain", None), ("said", FP8)):
        folder = files.write(tmp_path / name, weights, config.replace(quantization_config=quantization))
        model = load(folder, fp8="keep")
        files.assert_same_tensors(model.state_dict(), files.expected_state(config, weights))
        assert model.config.quantization_config is None and not model.load_report.kept  # TRAPS E12
        assert load(folder, dtype="float64").dtype == torch.float64


def test_a_dtype_that_fp8_products_do_not_know_is_an_error(tmp_path):
    checkpoint(tmp_path)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16 beside weights kept in FP8, got float64"):
        load(tmp_path, dtype="float64")
    assert load(tmp_path, dtype="float64", fp8="dequantize").dtype == torch.float64


def test_a_part_is_loaded_by_reading_only_its_bytes(tmp_path):
    weights = checkpoint(tmp_path / "whole", num_hidden_layers=6)
    model = load(tmp_path / "whole", layers=[0, 1, 5], experts=4, mtp=False)
    part = {}
    for name, tensor in weights.items():
        pieces = name.split(".")
        if name.startswith("model.layers."):
            if pieces[2] not in "015" or (".experts." in name and int(pieces[5]) >= 4):
                continue
            pieces[2] = {"0": "0", "1": "1", "5": "2"}[pieces[2]]
        tensor = tensor[:4] if name.endswith(("mlp.gate.weight", "correction_bias")) else tensor
        part[".".join(pieces)] = tensor
    files.assert_same_tensors(model.state_dict(), expected_state(model.config, part))
    assert model.load_report.bytes_read == sum(t.nbytes for t in part.values())
    save(model, tmp_path / "part", format="fp8")
    files.assert_same_tensors(files.read(tmp_path / "part"), part)


def test_a_default_device_does_not_reach_into_loading(tmp_path):
    weights = checkpoint(tmp_path / "a")
    with torch.device("meta"):
        model = load(tmp_path / "a")
        save(model, tmp_path / "b", format="fp8")
    files.assert_same_tensors(files.read(tmp_path / "b"), weights)


@pytest.mark.gpu
def test_a_gpu_holds_the_same_bytes(tmp_path):
    weights = checkpoint(tmp_path)
    model = load(tmp_path, device="cuda")
    assert {t.device.type for t in model.state_dict().values()} == {"cuda"}
    files.assert_same_tensors(model.cpu().state_dict(), expected_state(model.config, weights))


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize("quantization", [{}, {"scale_fmt": "ue8m0", "modules_to_not_convert": ["lm_head"]}], ids=str)
def test_loading_and_saving_gives_the_published_files_back(tmp_path, quantization):
    """Blocks of 128 x 128, MTP module and copies of embedding and head included; bytes and config."""
    config = da.DeepseekConfig.from_pretrained("tiny")
    stored = {**(config.quantization_config or {}), **quantization}
    write_checkpoint(tmp_path / "a", config.replace(quantization_config=stored), "fp8")
    report = save(load(tmp_path / "a"), tmp_path / "b", format="fp8", max_shard_size="1MB")
    files.assert_same_tensors(files.read(tmp_path / "b"), files.read(tmp_path / "a"))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in "ab"]
    assert configs[0] == configs[1] and configs[1]["quantization_config"].items() >= quantization.items()
    assert report.quantized == sum(t.dtype == E4M3 for t in files.read(tmp_path / "a").values())
    # A second time, over files that the first one wrote, from a model of another dtype cast back.
    save(load(tmp_path / "b", dtype="float32").bfloat16(), tmp_path / "b", format="fp8")
    files.assert_same_tensors(files.read(tmp_path / "b"), files.read(tmp_path / "a"))


def test_blocks_of_another_size_come_back_too(tmp_path):
    weights = checkpoint(tmp_path / "a")
    save(load(tmp_path / "a"), tmp_path / "b", format="fp8")
    files.assert_same_tensors(files.read(tmp_path / "b"), weights)


def test_saving_without_fp8_dequantizes(tmp_path):
    """TRAPS E12: and then the config must not say FP8."""
    checkpoint(tmp_path / "a")
    report = save(load(tmp_path / "a"), tmp_path / "kept")
    save(load(tmp_path / "a", fp8="dequantize"), tmp_path / "dequantized")
    files.assert_same_tensors(files.read(tmp_path / "kept"), files.read(tmp_path / "dequantized"))
    assert report.quantized == 0
    assert "quantization_config" not in json.loads((tmp_path / "kept" / "config.json").read_text())
    save(load(tmp_path / "a", dtype="float32"), tmp_path / "wide")
    assert files.read(tmp_path / "wide")[O_PROJ].dtype == torch.float32


def test_a_model_put_into_fp8_saves_what_saving_in_fp8_gives(tmp_path):
    model = small_models.model(small_models.config("v3", num_nextn_predict_layers=1))
    save(model, tmp_path / "rounded", format="fp8")
    save(da.keep_fp8(model), tmp_path / "kept", format="fp8")
    files.assert_same_tensors(files.read(tmp_path / "kept"), files.read(tmp_path / "rounded"))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("kept", "rounded")]
    assert configs[0] == configs[1]


def test_what_cannot_be_saved_is_an_error(tmp_path):
    checkpoint(tmp_path / "a")
    model = load(tmp_path / "a")
    model.model.layers[0].self_attn.o_proj.block_size = (32, 12)
    with pytest.raises(ValueError, match=r"one block size in all FP8 layers, got \[\(16, 12\), \(32, 12\)\]"):
        save(model, tmp_path / "b", format="fp8")
    model = load(tmp_path / "a", fp8="dequantize")
    raw = model.model.layers[0].self_attn.o_proj
    raw.weight = torch.nn.Parameter(raw.weight.detach().to(E4M3), requires_grad=False)  # TRAPS E11
    for format in ("bf16", "fp8"):
        with pytest.raises(ValueError, match=r"o_proj\.weight: .* got them without scales"):
            save(model, tmp_path / "b", format=format)
    assert not (tmp_path / "b").exists()


# ---------------------------------------------------------------- memory


def test_keeping_fp8_needs_the_bytes_of_the_files_and_little_more(tmp_path):
    """Peak resident memory above the start against the bytes of the files, as for ordinary checkpoints: bytes go
    straight into the model, and a cast or a copy of codes on the way would double what they take."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's account of peak memory")
    config = small_models.config("v3", vocab_size=20_000, hidden_size=512, moe_intermediate_size=640)
    write_checkpoint(tmp_path / "large", config.replace(n_routed_experts=24), "fp8")
    write_checkpoint(tmp_path / "small", small_models.config("v3"), "fp8")
    script = """
import sys, torch
import deepseek_arch as da
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
da.load(sys.argv[1])  # imports, and the allocator's own
open("/proc/self/clear_refs", "w").write("5")
start = status("VmRSS")
model = da.load(sys.argv[2])
assert model.load_report.kept
print((status("VmHWM") - start) / model.load_report.bytes_read)
"""
    path = [str(ROOT), str(ROOT / "kernels")]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{script}"]
    run = subprocess.run([*command, tmp_path / "small", tmp_path / "large"], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 1.15
