"""`convert`: every format and layout into every other, bit for bit, against checkpoints put together by `layouts`."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from deepseek_arch.checkpoint import convert, inspect_checkpoint, load, slice_checkpoint
from deepseek_arch.checkpoint.synthetic import write_checkpoint
from deepseek_arch.config.deepseek_config import DeepseekConfig
from support import checkpoint_files as files
from support import layouts

DENSE = dict.fromkeys(("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts"))
CONFIGS = {
    "tied": {"tie_word_embeddings": True, "num_nextn_predict_layers": 1},
    "alternating": {"moe_layer_freq": 2, "num_hidden_layers": 4},
    "dense": DENSE,
}


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ---------------------------------------------------------------- every direction


def check(folder, config, old: str, new: str) -> None:
    """Converts a checkpoint in layout `old`, and compares every byte of what comes out."""
    known = layouts.all_layouts(config)
    expected = known[new]
    source = layouts.write(folder / "old", config, old)
    if old.startswith("bf16"):  # its config does not say the block size; the published one would be taken
        layouts.edit_config(source, quantization_config=layouts.QUANTIZATION)
        if new.startswith("fp8"):  # the scales are made anew, from values that were rounded
            expected = layouts.to_fp8(known["bf16"], config.weight_block_size)
            expected = layouts.stack(expected) if new.endswith("stacked") else expected
    report = convert(source, folder / "new", **layouts.into(new), max_shard_size="40KB", verify=True)
    got = files.read(folder / "new")
    files.assert_same_tensors(got, expected)
    assert (report.tensors, report.nbytes) == (len(got), sum(t.nbytes for t in got.values()))
    assert report.verified and report.continued == 0


@pytest.mark.parametrize("new", layouts.LAYOUTS)
@pytest.mark.parametrize("old", layouts.LAYOUTS)
def test_every_layout_becomes_every_other_bit_for_bit(tmp_path, old, new):
    check(tmp_path, layouts.small(num_nextn_predict_layers=2), old, new)


@pytest.mark.parametrize(("old", "new"), [("fp8", "bf16 stacked"), ("bf16 stacked", "fp8")])
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_every_shape_of_model_is_converted_bit_for_bit(tmp_path, changes, old, new):
    check(tmp_path, layouts.small(**changes), old, new)


@pytest.fixture(scope="module", params=[None, "ue8m0"])
def tiny(request, tmp_path_factory):
    """The tiny preset, which has a MTP module with copies of embedding and head, in both formats."""
    quantization = layouts.QUANTIZATION | {"weight_block_size": [128, 128], "scale_fmt": request.param}
    config = DeepseekConfig.from_pretrained("tiny").replace(quantization_config=quantization)
    folder = tmp_path_factory.mktemp("tiny")
    for format in ("fp8", "bf16"):
        write_checkpoint(folder / format, config, format)
    return folder


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_the_tiny_preset_in_published_blocks(tmp_path, tiny, layout):
    """192, 144 and 80 rows in blocks of 128."""
    expected = files.read(tiny / layout.split()[0])
    convert(tiny / "fp8", tmp_path / "new", **layouts.into(layout))
    files.assert_same_tensors(
        files.read(tmp_path / "new"), layouts.stack(expected) if layout.endswith("stacked") else expected
    )


def test_experts_stay_as_they_are_unless_asked(tmp_path):
    known = layouts.all_layouts(layouts.small())
    for layout in ("fp8", "fp8 stacked"):
        source = layouts.write(tmp_path / layout, layouts.small(), layout, known[layout])
        convert(source, tmp_path / f"{layout} new")
        files.assert_same_tensors(files.read(tmp_path / f"{layout} new"), known[layout.replace("fp8", "bf16")])


def test_a_checkpoint_that_is_what_is_asked_for_is_copied(tmp_path):
    """Into shards of another size, which is a use of its own."""
    config = layouts.small()
    weights = layouts.all_layouts(config)["fp8"]
    report = convert(
        layouts.write(tmp_path / "old", config, "fp8", weights), tmp_path / "new", "fp8", max_shard_size="5KB"
    )
    files.assert_same_tensors(files.read(tmp_path / "new"), weights)
    assert (report.copied, report.dequantized, report.quantized) == (len(weights), 0, 0)
    assert len(report.files) > 10


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_gives_the_same_bytes(tmp_path, threads, monkeypatch):
    """In bands of a row of blocks, or 300 bytes; the number of torch's threads is as it was."""
    from deepseek_arch.checkpoint.conversion import workers

    monkeypatch.setattr(workers, "BAND_BYTES", 300)
    config, before = layouts.small(), torch.get_num_threads()
    known = layouts.all_layouts(config)
    source = layouts.write(tmp_path / "old", config, "fp8 stacked", known["fp8 stacked"])
    torch.set_num_threads(threads)
    try:
        convert(source, tmp_path / "new", stacked=False)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    files.assert_same_tensors(files.read(tmp_path / "new"), known["bf16"])


# ---------------------------------------------------------------- there and back


def test_fp8_comes_back_from_a_stack_byte_for_byte(tmp_path):
    config = layouts.small(num_nextn_predict_layers=1)
    weights = layouts.all_layouts(config)["fp8"]
    source = layouts.write(tmp_path / "old", config, "fp8", weights)
    convert(source, tmp_path / "stacked", "fp8", stacked=True)
    convert(tmp_path / "stacked", tmp_path / "back", "fp8", stacked=False)
    files.assert_same_tensors(files.read(tmp_path / "back"), weights)


@pytest.mark.parametrize("scale_format", [None, "ue8m0"])
def test_what_comes_back_from_bf16(tmp_path, scale_format):
    """As the docstring of `convert` promises. Power-of-two scales: the model itself. Float32 scales: the codes, because
    a relative change of 2^-7 (value and scale each rounded to 8 bits) is less than half a step of e4m3's 4 bits."""
    config = layouts.small(quantization_config=layouts.QUANTIZATION | {"scale_fmt": scale_format})
    weights = layouts.all_layouts(config, scale_format)["fp8"]
    source = layouts.write(tmp_path / "old", config, "fp8", weights)
    convert(source, tmp_path / "bf16", "bf16")
    layouts.edit_config(tmp_path / "bf16", quantization_config=config.quantization_config)
    convert(tmp_path / "bf16", tmp_path / "back", "fp8")
    back = files.read(tmp_path / "back")
    if scale_format:
        block = config.weight_block_size
        files.assert_same_tensors(layouts.to_bf16(back, block), layouts.to_bf16(weights, block))
        return
    scales = {name for name in weights if name.endswith("_scale_inv")}
    files.assert_same_tensors(
        {n: back[n] for n in weights if n not in scales}, {n: weights[n] for n in weights if n not in scales}
    )
    assert all(((back[n] / weights[n]).log2().abs() <= 2**-8 * 1.45).all() for n in scales)  # log2(1 + x) < 1.45 x


# ---------------------------------------------------------------- what is kept


def test_what_is_no_projection_keeps_its_bytes(tmp_path):
    """TRAPS E7, C2: float32 norms as in V3.2, router and its bias, eh_proj, embeddings, heads, stray rotary tables; and
    NaNs with whatever payload they have."""
    config = layouts.small(num_nextn_predict_layers=1)
    weights = layouts.all_layouts(config)["fp8"]
    weights = {n: t.float() * 1.0001 if n.endswith("norm.weight") else t for n, t in weights.items()}
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.randn(4).bfloat16()
    weights["model.layers.1.mlp.gate.e_score_correction_bias"].view(torch.int32)[0] = 0x7FC12345
    source = layouts.write(tmp_path / "old", config, "fp8", weights)
    for layout in layouts.LAYOUTS:
        with pytest.warns(UserWarning, match="gate.e_score_correction_bias has values that are not finite"):
            convert(source, tmp_path / layout, **layouts.into(layout))
        got = files.read(tmp_path / layout)
        kept = {name for name in weights if not layouts.is_projection(name) and not name.endswith("_scale_inv")}
        files.assert_same_tensors({name: got[name] for name in kept}, {name: weights[name] for name in kept})


def test_some_tensors_of_an_fp8_checkpoint_may_be_plain(tmp_path):
    """They stay as they are on the way to BF16, and are rounded on the way to FP8, by the rule of the config."""
    quantization = layouts.QUANTIZATION | {"scale_fmt": "ue8m0"}
    config = layouts.small(quantization_config=quantization)
    block = config.weight_block_size
    plain = layouts.bfloat16(config)
    name = "model.layers.1.mlp.shared_experts.up_proj.weight"
    full = layouts.to_fp8(plain, block, "ue8m0")
    mixed = {n: t for n, t in full.items() if not n.startswith(name)} | {name: plain[name]}
    source = layouts.write(tmp_path / "old", config, "fp8", mixed)
    convert(source, tmp_path / "bf16")
    files.assert_same_tensors(files.read(tmp_path / "bf16"), layouts.to_bf16(mixed, block))
    report = convert(source, tmp_path / "fp8", "fp8")
    files.assert_same_tensors(files.read(tmp_path / "fp8"), full)
    assert report.quantized == 1


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.uint8, torch.float8_e8m0fnu], ids=str)
def test_scales_of_every_storage(tmp_path, stored):
    """TRAPS E3: 16-bit floats, or exponent bytes. They mean the same in BF16, and keep their bytes in FP8."""
    config = layouts.small()
    weights = layouts.to_fp8(layouts.bfloat16(config), config.weight_block_size, "ue8m0")

    def store(scale):
        if stored.is_floating_point and stored.itemsize == 2:
            return (scale * 2**10).to(stored)  # float16 has no numbers as small as these
        return ((scale * 2**10).view(torch.int32) >> 23).to(torch.uint8).view(stored)

    other = {n: store(t) if n.endswith("_scale_inv") else t for n, t in weights.items()}
    larger = {n: t * 2**10 if n.endswith("_scale_inv") else t for n, t in weights.items()}
    source = layouts.write(tmp_path / "old", config, "fp8", other)
    convert(source, tmp_path / "bf16")
    files.assert_same_tensors(files.read(tmp_path / "bf16"), layouts.to_bf16(larger, config.weight_block_size))
    convert(source, tmp_path / "stacked", "fp8", stacked=True, verify=True)
    files.assert_same_tensors(files.read(tmp_path / "stacked"), layouts.stack(other))


@pytest.mark.parametrize("dtype", [torch.float32, "float16", torch.bfloat16])
def test_what_was_fp8_gets_the_dtype_asked_for(tmp_path, dtype):
    config = layouts.small()
    weights = layouts.all_layouts(config)["fp8"]
    convert(layouts.write(tmp_path / "old", config, "fp8", weights), tmp_path / "new", dtype=dtype)
    wanted = getattr(torch, str(dtype).removeprefix("torch."))
    expected = layouts.to_bf16(weights, config.weight_block_size, wanted)
    files.assert_same_tensors(files.read(tmp_path / "new"), expected)
    # Wide enough for what was bfloat16 and what is new.
    said = {torch.bfloat16: "bfloat16"}.get(wanted, "float32")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["torch_dtype"] == said


# ---------------------------------------------------------------- values that are no numbers


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("stacked", [True, False])
def test_weights_that_are_not_finite_are_named(tmp_path, bad, stacked):
    config = layouts.small(quantization_config=None)
    weights = layouts.bfloat16(config)
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    weights[name][19, 31] = bad
    source = files.write(tmp_path / "old", layouts.stack(weights) if stacked else weights, config)
    with pytest.raises(ValueError, match=f"{name}: expected finite weights"):
        convert(source, tmp_path / "new", "fp8")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_named(tmp_path, bad):
    config = layouts.small()
    weights = layouts.all_layouts(config)["fp8"]
    name = "model.layers.2.self_attn.o_proj.weight"
    weights[f"{name}_scale_inv"][1, 0] = bad
    source = layouts.write(tmp_path / "old", config, "fp8", weights)
    with pytest.raises(ValueError, match=rf"{name}: expected finite scales, got (nan|inf) at \[1, 0\]"):
        convert(source, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_codes_that_mean_nan_stay_nan(tmp_path):
    config = layouts.small()
    weights = layouts.all_layouts(config)["fp8"]
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name].view(torch.uint8)[3, 4:6] = torch.tensor([0x7F, 0xFF], dtype=torch.uint8)
    with pytest.warns(UserWarning, match=f"{name} has values that are not finite"):
        convert(layouts.write(tmp_path / "old", config, "fp8", weights), tmp_path / "new")
    nan = files.read(tmp_path / "new")[name].isnan()
    assert nan[3, 4:6].all() and nan.sum() == 2


@pytest.mark.parametrize("to", ["bf16", "fp8"])
def test_a_stacked_checkpoint_loads_slices_and_passes_inspection(tmp_path, to):
    config = DeepseekConfig.from_pretrained("tiny")
    write_checkpoint(tmp_path / "published", config, "fp8", shards=3)
    convert(tmp_path / "published", tmp_path / "single", to)
    convert(tmp_path / "published", tmp_path / "stacked", to, stacked=True, max_shard_size="1MB")
    assert inspect_checkpoint(tmp_path / "stacked").ok
    parts = {"layers": [0, 2], "experts": 4, "mtp": False}
    for how in ({}, parts):
        expected, got = (load(tmp_path / name, **how).state_dict() for name in ("single", "stacked"))
        assert expected.keys() == got.keys()
        for name, tensor in expected.items():
            assert got[name].dtype == tensor.dtype, name
            assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name
    for name in ("single", "stacked"):
        slice_checkpoint(tmp_path / name, tmp_path / f"{name}-part", **parts)
    single, stacked = (load(tmp_path / f"{name}-part").state_dict() for name in ("single", "stacked"))
    assert all(torch.equal(stacked[name].view(torch.uint8), t.view(torch.uint8)) for name, t in single.items())
