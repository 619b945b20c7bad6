"""`convert` around the tensors: config, index, companions, the plan, and what cannot be converted."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

import deepseek_arch as da
from deepseek_arch.checkpoint import CheckpointError, convert, plan_conversion
from support import checkpoint_files as files
from support import layouts, small_models


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ---------------------------------------------------------------- config, index, companions


def test_config_says_what_the_files_are(tmp_path):
    """TRAPS E12: quantization_config goes with the last FP8 tensor and comes with the first; all else is untouched."""
    published = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    config = layouts.small()
    source = layouts.write(tmp_path / "fp8", config, "fp8")
    odd = {"num_nextn_predict_layers": 0, "a_field": {"of": ["someone"]}, "rope_theta": 10000, "auto_map": {"A": "b.B"}}
    old = layouts.edit_config(source, **odd)
    without = {name: value for name, value in old.items() if name != "quantization_config"}

    def new(name):
        return json.loads((tmp_path / name / "config.json").read_text())

    convert(source, tmp_path / "bf16")
    assert new("bf16") == without
    convert(source, tmp_path / "moved", "fp8", stacked=True)
    assert new("moved") == old
    convert(tmp_path / "bf16", tmp_path / "again", "fp8")
    assert new("again") == without | {"quantization_config": published}
    convert(tmp_path / "bf16", tmp_path / "powers", "fp8", scale_format="ue8m0")
    assert new("powers") == without | {"quantization_config": published | {"scale_fmt": "ue8m0"}}
    scales = [t for n, t in files.read(tmp_path / "powers").items() if n.endswith("_scale_inv")]
    assert all((torch.frexp(scale).mantissa == 0.5).all() for scale in scales)


def test_a_dtype_under_its_new_name_is_changed_there(tmp_path):
    config = layouts.small(dtype="float16")
    source = layouts.write(tmp_path / "old", config, "fp8")
    changed = layouts.edit_config(source, dtype="float16")
    del changed["torch_dtype"]
    (source / "config.json").write_text(json.dumps(changed))
    convert(source, tmp_path / "new")  # float16 and bfloat16 beside each other
    new = json.loads((tmp_path / "new" / "config.json").read_text())
    assert new["dtype"] == "float32" and "torch_dtype" not in new


def test_a_stale_quantization_config_goes(tmp_path):
    config = layouts.small()
    weights = layouts.all_layouts(config)["bf16"]
    convert(files.write(tmp_path / "old", weights, config), tmp_path / "new")
    assert "quantization_config" not in json.loads((tmp_path / "new" / "config.json").read_text())
    files.assert_same_tensors(files.read(tmp_path / "new"), weights)


def test_the_index_counts_bytes_and_names_every_tensor(tmp_path):
    config = layouts.small(num_nextn_predict_layers=1)
    source = layouts.write(tmp_path / "old", config, "fp8", index=False)
    for layout in layouts.LAYOUTS:
        convert(source, tmp_path / layout, **layouts.into(layout), max_shard_size="30KB")
        tensors = files.read(tmp_path / layout)  # each where the index says
        index = json.loads((tmp_path / layout / files.INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        shards = sorted(set(index["weight_map"].values()))
        assert shards == sorted(file.name for file in (tmp_path / layout).glob("*.safetensors"))
        assert len(shards) > 2
        assert all(
            index["weight_map"].get(f"{name}_scale_inv", shard) == shard for name, shard in index["weight_map"].items()
        )


def test_companions_come_along_unless_there_are_others(tmp_path):
    config = layouts.small()
    source = layouts.write(tmp_path / "old", config, "fp8")
    (source / "tokenizer.json").write_text("theirs")
    (source / "modeling_x.py").write_text("code")
    (source / "pytorch_model.bin").write_bytes(b"large")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "tokenizer.json").write_text("mine")
    convert(source, tmp_path / "new")
    texts = {f.name: f.read_text() for f in (tmp_path / "new").iterdir() if f.suffix in (".json", ".py", ".bin")}
    assert texts["tokenizer.json"] == "mine" and texts["modeling_x.py"] == "code"
    assert "pytorch_model.bin" not in texts
    assert [f.name for f in (tmp_path / "new").iterdir() if f.name.startswith(".")] == []


# ---------------------------------------------------------------- with others


def test_what_is_converted_loads_as_before(tmp_path):
    config = layouts.small(num_nextn_predict_layers=1)
    source = layouts.write(tmp_path / "old", config, "fp8")
    for step, layout in enumerate(("fp8 stacked", "bf16 stacked", "bf16")):
        convert(source if step == 0 else tmp_path / str(step - 1), tmp_path / str(step), **layouts.into(layout))
    files.assert_same_tensors(da.load(tmp_path / "2").state_dict(), da.load(source, fp8="dequantize").state_dict())


@pytest.mark.parametrize("kind", ["v3", "v2"])
def test_transformers_loads_stacked_experts_and_saves_them(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    cls = transformers.DeepseekV3ForCausalLM if kind == "v3" else transformers.DeepseekV2ForCausalLM
    config = small_models.config(kind, dtype="bfloat16")
    weights = layouts.bfloat16(config)
    source = files.write(tmp_path / "published", weights, config)
    convert(source, tmp_path / "stacked", stacked=True, max_shard_size="20KB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, info = cls.from_pretrained(tmp_path / "stacked", dtype="auto", output_loading_info=True)
        theirs.save_pretrained(tmp_path / "theirs", save_original_format=False)
    assert not any(info[key] for key in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    convert(tmp_path / "theirs", tmp_path / "back", stacked=False)
    back = files.read(tmp_path / "back")
    assert any(".experts.7.up_proj" in name for name in back)
    expected = {n: t.to(back[n].dtype) for n, t in weights.items()}  # V2 has no float32 bias; V3's stays float32
    files.assert_same_tensors(back, expected)


# ---------------------------------------------------------------- the plan


def test_a_plan_writes_nothing_and_says_what_will_be_written(tmp_path):
    config = layouts.small(num_nextn_predict_layers=1)
    source = layouts.write(tmp_path / "old", config, "fp8")
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    out = tmp_path / "not" / "there"
    plans = {x: plan_conversion(source, out / x, **layouts.into(x), max_shard_size="30KB") for x in layouts.LAYOUTS}
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before
    for layout, plan in plans.items():
        report = convert(source, out / layout, **layouts.into(layout), max_shard_size="30KB")
        assert (plan.bytes_read, plan.bytes_written) == (report.bytes_read, report.nbytes)
        assert plan.bytes_written == plan.disk_needed == sum(written for _, _, written in plan.classes.values())
        assert plan.bytes_read == sum(read for _, read, _ in plan.classes.values())
        assert plan.bytes_read == sum(t.nbytes for t in files.read(source).values())
        assert len(plan.shards) == len(list((out / layout).glob("*.safetensors")))
        assert json.loads(json.dumps(plan.to_dict()))["tensors"] == report.tensors
    experts = plans["bf16"].classes["experts", "F8_E4M3", "BF16"]
    assert experts[0] == 3 * 8 * 3 and experts[2] == 2 * 3 * 8 * 3 * 20 * 32
    assert plans["fp8"].classes["mtp", "BF16", "BF16"][0] == 4


# ---------------------------------------------------------------- what cannot be converted


def test_stacked_checkpoints_are_checked_as_published_ones(tmp_path):
    """Everything that is wrong is told at once, and by the names that the files have."""
    config = layouts.small(num_hidden_layers=6)
    weights = layouts.all_layouts(config)["fp8 stacked"]
    prefix = "model.layers.{}.mlp.experts."

    def name(layer, rest):
        return prefix.format(layer) + rest

    del weights[name(1, "down_proj")], weights[name(1, "down_proj_scale_inv")]
    weights[name(2, "gate_up_proj")] = weights[name(2, "gate_up_proj")][:, :-1]
    del weights[name(2, "down_proj_scale_inv")]
    weights[name(3, "gate_up_proj_scale_inv")] = weights[name(3, "gate_up_proj_scale_inv")][:, :3]  # one grid for both
    weights[name(3, "down_proj")] = weights[name(3, "down_proj")].view(torch.uint8)
    weights[name(4, "gate_up_proj")] = weights[name(4, "gate_up_proj")].float()
    weights[name(4, "down_proj_scale_inv")] = weights[name(4, "down_proj_scale_inv")].double()
    weights[name(5, "gate_proj")] = torch.zeros(3)
    del weights[name(5, "down_proj")]
    weights["model.layers.0.mlp.experts.gate_up_proj"] = torch.zeros(3)  # of a dense layer
    source = layouts.write(tmp_path / "old", config, "fp8 stacked", weights)
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "new")
    found = caught.value.problems
    missing = {f"model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in range(8)}
    assert set(found.pop("missing tensors")) == missing | {name(5, "down_proj")}
    assert found.pop("wrong shapes") == [f"{name(2, 'gate_up_proj')}: expected [8, 40, 32], got [8, 39, 32]"]
    assert name(2, "down_proj") in found.pop("FP8 tensors without weight_scale_inv")[0]
    assert "expected [8, 4, 3] for [8, 40, 32]" in found.pop("wrong scale grids")[0]
    assert [line.split(":")[0] for line in found.pop("wrong dtypes")] == [
        name(3, "down_proj"),
        name(4, "down_proj_scale_inv"),
    ]
    assert len(found.pop("scales of tensors that are not FP8")) == 1
    assert set(found.pop("unexpected tensors")) == {name(5, "gate_proj"), name(0, "gate_up_proj")}
    assert not found and not (tmp_path / "new").exists()


def test_a_layer_with_experts_in_both_ways_is_an_error(tmp_path):
    known = layouts.all_layouts(layouts.small())
    single = {n: t for n, t in known["fp8"].items() if n.startswith("model.layers.1.mlp.experts.3.")}
    source = layouts.write(tmp_path / "old", layouts.small(), "fp8 stacked", known["fp8 stacked"] | single)
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "new")
    assert "model.layers.1.mlp.experts.gate_up_proj" in caught.value.problems["unexpected tensors"]


def test_a_stacked_tensor_that_only_the_index_knows_is_named(tmp_path):
    name = "model.layers.2.mlp.experts.down_proj"
    source = layouts.write(tmp_path / "old", layouts.small(), "bf16 stacked")
    files.edit(source, lambda weights: weights.pop(name))
    index = json.loads((source / files.INDEX).read_text())
    index["weight_map"][name] = shard = min(index["weight_map"].values())
    (source / files.INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        plan_conversion(source, tmp_path / "new")
    assert caught.value.problems == {"tensors that the index names and no shard holds": [f"{name} (not in {shard})"]}


def test_experts_of_two_dtypes_cannot_be_stacked(tmp_path):
    config = layouts.small(quantization_config=None)
    weights = layouts.bfloat16(config)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    weights[name] = weights[name].float()
    source = files.write(tmp_path / "old", weights, config)
    with pytest.raises(CheckpointError, match=f"{name}: expected BF16 as the first of .*gate_up_proj, got F32"):
        convert(source, tmp_path / "new", stacked=True)
    convert(source, tmp_path / "new")
    files.assert_same_tensors(files.read(tmp_path / "new"), weights)


def test_layers_that_the_config_does_not_have_are_left_out_with_a_warning(tmp_path):
    """A config that says no MTP modules beside files that have one, as `load` skips them too."""
    config = layouts.small(num_nextn_predict_layers=1)
    weights = layouts.all_layouts(config)["fp8"]
    source = layouts.write(tmp_path / "old", config.replace(num_nextn_predict_layers=0), "fp8", weights)
    left_out = {name for name in weights if name.startswith("model.layers.3.")}
    with pytest.warns(UserWarning, match=f"{len(left_out)} tensors of layers that config.json does not have"):
        convert(source, tmp_path / "new", "fp8", stacked=True)
    kept = {name: t for name, t in weights.items() if name not in left_out}
    files.assert_same_tensors(files.read(tmp_path / "new"), layouts.stack(kept))


def test_prediction_layers_that_transformers_dropped_stay_dropped(tmp_path):
    config = layouts.small(num_nextn_predict_layers=1)
    weights = {n: t for n, t in layouts.all_layouts(config)["bf16"].items() if not n.startswith("model.layers.3.")}
    source = layouts.write(tmp_path / "old", config, "bf16", weights)
    with pytest.warns(UserWarning, match="no tensor of layer 3"):
        convert(source, tmp_path / "new", stacked=True)
    files.assert_same_tensors(files.read(tmp_path / "new"), layouts.stack(weights))
    assert json.loads((tmp_path / "new" / "config.json").read_text())["num_nextn_predict_layers"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "int4"}, "format 'bf16' or 'fp8', got 'int4'"),
        ({"format": "fp8", "scale_format": "float"}, "scale_format None or 'ue8m0', got 'float'"),
        ({"scale_format": "ue8m0"}, "scale_format None with format 'bf16'"),
        ({"format": "fp8", "scale_format": "ue8m0"}, "in FP8 already"),
        ({"dtype": "int8"}, "dtype to be one of bfloat16, float16, float32, got 'int8'"),
        ({"max_shard_size": "huge"}, "huge"),
    ],
)
def test_wrong_arguments_are_errors(tmp_path, arguments, message):
    source = layouts.write(tmp_path / "old", layouts.small(), "fp8")
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_the_checkpoint_itself_is_never_written_to(tmp_path):
    source = layouts.write(tmp_path / "old", layouts.small(), "fp8")
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in source.iterdir()}
    (tmp_path / "link").symlink_to(source)
    for out in (source, tmp_path / "link", source / ".." / "old"):
        with pytest.raises(ValueError, match="another folder to write to than the checkpoint's own"):
            convert(source, out)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="expected a folder to write to, got the file"):
        convert(source, tmp_path / "file")
    convert(source, tmp_path / "new", verify=True)
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in source.iterdir()} == before
