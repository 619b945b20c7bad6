"""Checkpoints that are not as they should be, and writes that fail: what is said, and what is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from unittest import mock

import pytest
import torch

import deepseek_arch as da
from deepseek_arch.checkpoint import CheckpointError, load, loading, save, slice_checkpoint
from deepseek_arch.checkpoint.files import writer
from deepseek_arch.checkpoint.files.reader import ShardError, read_header
from deepseek_arch.checkpoint.files.writer import parse_size
from deepseek_arch.checkpoint.inspection import inspect_checkpoint
from deepseek_arch.layout.parameter_map import scale_name
from deepseek_arch.quant.fp8_blocks import quantize_blocks
from support import checkpoint_files as files
from support import small_models

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 12]}
GATE = "model.layers.1.mlp.gate.weight"
UP = "model.layers.2.mlp.experts.5.up_proj.weight"
O_PROJ = "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture
def folder(tmp_path):
    """A good float32 checkpoint in three shards, with one MTP module."""
    config = small_models.config("v3", num_nextn_predict_layers=1)
    return files.write(tmp_path / "checkpoint", files.tensors(config), config)


@pytest.fixture
def fp8_folder(tmp_path):
    """A good checkpoint with two FP8 tensors, one of them of an expert among others that are not."""
    config = small_models.config("v3", quantization_config=FP8)
    weights = files.tensors(config)
    for name in (UP, O_PROJ):
        weights[name], weights[scale_name(name)] = quantize_blocks(weights[name], (16, 12))
    return files.write(tmp_path / "fp8", weights, config)


def fails(folder, kind: str, *details: str) -> CheckpointError:
    """Loading, slicing and inspecting agree on the problem; the error names everything, and comes before the model is
    allocated."""
    allocated = AssertionError("memory was allocated for a checkpoint that cannot be loaded")
    with mock.patch.object(loading, "allocate", side_effect=allocated), pytest.raises(CheckpointError) as caught:
        load(folder, fp8="dequantize")
    error = caught.value
    assert isinstance(error, ValueError)
    assert set(error.problems) == {kind}, error.problems
    assert len(error.problems[kind]) == len(details), error.problems
    for detail in details:
        assert detail in str(error)
    if kind != "scales":
        report = inspect_checkpoint(folder)
        assert not report.ok and report.problems == error.problems
        with pytest.raises(CheckpointError):
            slice_checkpoint(folder, folder.parent / "slice")
        assert not (folder.parent / "slice").exists()
    return error


# ---------------------------------------------------------------- tensors


def test_missing_tensors_are_named(folder):
    files.edit(folder, lambda weights: [weights.pop(GATE), weights.pop(UP), weights.pop("lm_head.weight")])
    fails(folder, "missing tensors", GATE, UP, "lm_head.weight")


def test_a_prediction_layer_that_is_there_in_part_is_an_error(folder):
    files.edit(folder, lambda weights: weights.pop("model.layers.3.eh_proj.weight"))
    fails(folder, "missing tensors", "model.layers.3.eh_proj.weight")


def test_unexpected_tensors_are_named(folder):
    names = [
        "model.layers.0.mlp.gate.weight",  # layer 0 is dense
        "model.layers.1.mlp.experts.8.up_proj.weight",  # there are 8
        "model.layers.01.input_layernorm.weight",
        "model.layers.3.lm_head.weight",
        "something",
        f"{GATE}_scale_inv_",
    ]
    files.edit(folder, lambda weights: weights.update({name: torch.zeros(2) for name in names}))
    fails(folder, "unexpected tensors", *names)


def test_layers_that_the_config_does_not_know_are_unexpected(folder):
    """Fewer layers in the config than in the files is no selection."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}))
    with pytest.raises(CheckpointError, match="unexpected tensors") as caught:
        load(folder)
    names = caught.value.problems["unexpected tensors"]
    assert UP in names and not any(name.startswith("model.layers.3.") for name in names)


def test_a_second_prediction_layer_is_unexpected(folder):
    files.edit(folder, lambda weights: weights.update({"model.layers.4.eh_proj.weight": torch.zeros(32, 64)}))
    fails(folder, "unexpected tensors", "model.layers.4.eh_proj.weight")


def test_wrong_shapes_are_named_with_both_shapes(folder):
    def swap(weights):
        weights[UP] = weights[UP].T.contiguous()
        weights[GATE] = weights[GATE][:-1]

    files.edit(folder, swap)
    fails(folder, "wrong shapes", f"{UP}: expected [20, 32], got [32, 20]", f"{GATE}: expected [8, 32], got [7, 32]")


def test_dtypes_that_hold_no_weights_are_named(folder):
    """Packed integers of some quantizer, FP8 of the other kind."""

    def change(weights):
        weights[UP] = weights[UP].to(torch.int8)
        weights[GATE] = weights[GATE].to(torch.float8_e5m2)

    files.edit(folder, change)
    fails(folder, "wrong dtypes", f"{UP}: expected one of F64, F32, F16, BF16, got I8", f"{GATE}: expected")


def test_everything_is_reported_at_once(fp8_folder):
    def change(weights):
        del weights[GATE], weights[scale_name(UP)]
        weights["extra"] = torch.zeros(1)
        weights["lm_head.weight"] = weights["lm_head.weight"][:, :3]
        weights[scale_name(O_PROJ)] = weights[scale_name(O_PROJ)][:, :1]

    files.edit(fp8_folder, change)
    with pytest.raises(CheckpointError) as caught:
        load(fp8_folder)
    assert set(caught.value.problems) == {
        "missing tensors",
        "FP8 tensors without weight_scale_inv",
        "unexpected tensors",
        "wrong shapes",
        "wrong scale grids",
    }


def test_long_lists_are_cut_in_the_message_only(folder):
    names = [f"extra.{i}" for i in range(1000)]
    files.edit(folder, lambda weights: weights.update({name: torch.zeros(1) for name in names}))
    with pytest.raises(CheckpointError, match="and 990 more") as caught:
        load(folder)
    assert sorted(caught.value.problems["unexpected tensors"]) == sorted(names)
    assert len(str(caught.value)) < 1000


# ---------------------------------------------------------------- FP8


def test_an_fp8_tensor_without_scale_is_named(fp8_folder):
    files.edit(fp8_folder, lambda weights: weights.pop(scale_name(UP)))
    fails(fp8_folder, "FP8 tensors without weight_scale_inv", UP)


def test_a_scale_of_another_grid_is_named(fp8_folder):
    """[20, 32] in blocks of 16 x 12 has [2, 3] scales; floor division would have [1, 2] (TRAPS E2)."""
    files.edit(fp8_folder, lambda weights: weights.update({scale_name(UP): torch.ones(1, 2)}))
    detail = f"{scale_name(UP)}: expected [2, 3] for [20, 32] in blocks of [16, 12], got [1, 2]"
    fails(fp8_folder, "wrong scale grids", detail)


def test_a_scale_beside_a_tensor_that_is_not_fp8_is_named(fp8_folder):
    """Half a conversion: multiplied already, or not?"""
    files.edit(fp8_folder, lambda weights: weights.update({UP: weights[UP].to(torch.bfloat16)}))
    fails(fp8_folder, "scales of tensors that are not FP8", f"{scale_name(UP)} beside BF16")


def test_a_scale_of_a_dtype_that_holds_none_is_named(fp8_folder):
    files.edit(fp8_folder, lambda weights: weights.update({scale_name(UP): torch.ones(2, 3, dtype=torch.int32)}))
    fails(fp8_folder, "wrong dtypes", f"{scale_name(UP)}: expected one of F32, F16, BF16, F8_E8M0, U8, got I32")


def test_fp8_without_a_block_size_is_an_error(fp8_folder):
    config = json.loads((fp8_folder / "config.json").read_text())
    del config["quantization_config"]
    (fp8_folder / "config.json").write_text(json.dumps(config))
    fails(fp8_folder, "FP8 tensors, but no quantization_config in config.json to say the block size", UP, O_PROJ)


def test_another_quantization_method_is_an_error(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (folder / "config.json").write_text(json.dumps(config))
    fails(folder, "config", "expected quantization_config with quant_method fp8 or none, got 'compressed-tensors'")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_named(fp8_folder, bad):
    def change(weights):
        weights[scale_name(UP)][1, 2] = bad
        weights[scale_name(O_PROJ)][0, 0] = bad

    files.edit(fp8_folder, change)
    fails(
        fp8_folder,
        "scales",
        f"{scale_name(UP)}: expected finite scales, got {bad} at [1, 2]",
        f"{scale_name(O_PROJ)}: expected finite scales, got {bad} at [0, 0]",
    )


# ---------------------------------------------------------------- repeats


@pytest.mark.parametrize("last", [False, True])
def test_repeated_embeddings_that_differ_are_named(folder, last):
    """TRAPS F6, down to one bit of the last element."""
    names = ["model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"][-1 if last else 0 :]

    def change(weights):
        for name in names:
            weights[name].view(torch.int32)[-1, -1] ^= 1

    files.edit(folder, change)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    trunk = {"embed_tokens": "model.embed_tokens.weight", "head": "lm_head.weight"}
    expected = [f"{name} is not {trunk[name.split('.')[-2]]}" for name in names]
    assert sorted(caught.value.problems["repeated tensors that differ"]) == expected
    load(folder, mtp=False)


def test_a_stored_head_of_a_tied_model_must_be_the_embedding(tmp_path):
    config = small_models.config("v3", tie_word_embeddings=True)
    weights = files.tensors(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not model.embed_tokens.weight"):
        load(files.write(tmp_path, weights, config))


# ---------------------------------------------------------------- files


def shard(folder, number: int = 1):
    return sorted(folder.glob("*.safetensors"))[number]


def test_a_missing_shard_is_named(folder):
    name = shard(folder).name
    tensors = len(read_header(shard(folder)))
    shard(folder).unlink()
    fails(folder, "shards", f"{name} missing (holds {tensors} tensors)")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_shard_is_named(folder, keep):
    data = shard(folder).read_bytes()
    shard(folder).write_bytes(data[:keep])
    assert "truncated" in str(fails(folder, "shards", shard(folder).name))


def test_two_broken_shards_and_a_missing_tensor_are_all_named(folder):
    files.edit(folder, lambda weights: weights.pop(GATE))
    shard(folder, 0).unlink()
    shard(folder, 1).write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert len(caught.value.problems["shards"]) == 2
    assert caught.value.problems["missing tensors"] == [GATE]


def header(content: object, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"\x08\0\0\0", "truncated"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "at most 32,000,000 bytes"),
        (header(b"{not json"), "expected JSON"),
        (header(b"\xff\xfe"), "expected JSON"),
        (header(b"[" * 100_000), "expected JSON"),
        (header([1, 2]), "expected a JSON object, got list"),
        (header({"a": 3}), "expected dtype, shape and data_offsets of a"),
        (header({"a": {"dtype": "F32"}}), "expected dtype, shape and data_offsets of a"),
        (header({"a": ENTRY | {"dtype": ["F32"]}}, bytes(8)), "expected dtype, sizes and offsets of a"),
        (header({"a": ENTRY | {"shape": [-2]}}, bytes(8)), "expected dtype, sizes and offsets of a"),
        (header({"a": ENTRY | {"shape": ["2"]}}, bytes(8)), "expected dtype, sizes and offsets of a"),
        (header({"a": ENTRY | {"shape": 2}}, bytes(8)), "expected dtype, shape and data_offsets of a"),
        (header({"a": ENTRY | {"data_offsets": [8, 0]}}, bytes(8)), "expected dtype, sizes and offsets of a"),
        (header({"a": ENTRY | {"data_offsets": [0, 8, 9]}}, bytes(8)), "expected dtype, shape and data_offsets of a"),
        (header({"a": ENTRY | {"shape": [3]}}, bytes(8)), r"expected 12 bytes of a \(F32 \[3\]\), got 8"),
        (header({"a": ENTRY, "b": ENTRY}, bytes(8)), "b does not start where"),
        (header({"a": ENTRY | {"data_offsets": [8, 16]}}, bytes(16)), "a does not start where"),
        (header({"a": ENTRY}, bytes(7)), "truncated: its header promises"),
        (header({"a": ENTRY}, bytes(9)), "1 bytes follow the last tensor"),
    ],
)
def test_unreadable_headers_say_what_is_wrong(tmp_path, content, message):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(ShardError, match=message):
        read_header(file)


def test_random_damage_never_gives_another_exception(folder):
    """One random byte of the header changed, or the file cut: loading works, or says what is wrong."""
    good = shard(folder).read_bytes()
    length = 8 + int.from_bytes(good[:8], "little")
    rng = random.Random(0)
    failed = 0
    for _ in range(60):
        data = bytearray(good)
        data[rng.randrange(length)] = rng.randrange(256)
        if rng.random() < 0.3:
            data = data[: rng.randrange(len(data))]
        shard(folder).write_bytes(bytes(data))
        try:
            load(folder)
        except CheckpointError:
            failed += 1
    assert failed > 40
    shard(folder).write_bytes(good)
    load(folder)


def test_a_shard_that_shrinks_while_it_is_read_is_an_error(folder, monkeypatch):
    allocate = loading.allocate

    def shrink(*arguments):
        allocate(*arguments)
        os.truncate(shard(folder), shard(folder).stat().st_size - 5)

    monkeypatch.setattr(loading, "allocate", shrink)
    with pytest.raises(CheckpointError, match=f"files that changed while they were read.*{shard(folder).name}"):
        load(folder)


def write_index(folder, change) -> None:
    index = json.loads((folder / files.INDEX).read_text())
    change(index)
    (folder / files.INDEX).write_text(json.dumps(index))


def test_tensors_that_only_the_index_knows_are_named(folder):
    name = shard(folder, 0).name
    files.edit(folder, lambda weights: weights.pop(GATE))
    write_index(folder, lambda index: index["weight_map"].update({GATE: name}))
    fails(folder, "tensors that the index names and no shard holds", f"{GATE} (not in {name})")


def test_tensors_that_the_index_forgets_are_found(folder):
    write_index(folder, lambda index: index["weight_map"].pop(GATE))
    load(folder)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../other/x.safetensors"}}',
    ],
)
def test_a_broken_index_is_an_error(folder, text):
    (folder / files.INDEX).write_text(text)
    assert files.INDEX in str(fails(folder, "index", "weight_map"))


def test_a_tensor_in_two_files_without_an_index_is_an_error(folder):
    (folder / files.INDEX).unlink()
    first, second = shard(folder, 0), folder / "zz.safetensors"
    files.save_file({"lm_head.weight": torch.zeros(61, 32)}, str(second))
    holder = next(file for file in sorted(folder.glob("*.safetensors")) if "lm_head.weight" in read_header(file))
    assert first != second
    fails(folder, "tensors in two shards", f"lm_head.weight in {holder.name} and zz.safetensors")


def test_a_folder_without_tensors_is_an_error(folder):
    for file in folder.glob("*safetensors*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"expected at least one \*.safetensors file, found none"):
        load(folder)


# ---------------------------------------------------------------- arguments and configs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "meta"}, "expected a device with memory, got 'meta'"),
        ({"device": "no such device"}, "expected an available device, got 'no such device'"),
        ({"device": "cuda:99"}, "expected an available device, got 'cuda:99'"),
        ({"dtype": torch.int8}, "expected dtype to be one of .*got torch.int8"),
        ({"dtype": torch.float8_e4m3fn}, "expected dtype to be one of"),
        ({"dtype": "half a float"}, "expected dtype to be one of .*got 'half a float'"),
        ({"fp8": "maybe"}, "expected fp8 'keep' or 'dequantize', got 'maybe'"),
        ({"layers": [0, 7]}, r"expected layers to be some of the numbers 0 to 2, got \[0, 7\]"),
        ({"experts": 3}, "whole groups"),
    ],
)
def test_wrong_arguments_of_load_are_errors(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(folder, **arguments)


def test_what_is_no_checkpoint_is_an_error(tmp_path, folder):
    for path in ("tiny", tmp_path / "nothing", shard(folder)):
        with pytest.raises(ValueError, match="expected a checkpoint folder, got"):
            load(path)
    (folder / "config.json").unlink()
    with pytest.raises(da.ConfigError, match="without one"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "expected model_type to be one of .*got 'llama'"),
        ({"hidden_size": -32}, "expected hidden_size to be an integer >= 1, got -32"),
        ({"n_group": 3}, "divisible by n_group"),
        ({"qk_rope_head_dim": 7}, "even qk_rope_head_dim"),
    ],
)
def test_wrong_configs_are_errors(folder, change, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(da.ConfigError, match=message):
        load(folder)


@pytest.mark.parametrize("size", ["", "5 apples", "-1GB", 0, "0", True, None, 1.5, "0.1B"])
def test_sizes_that_are_none_are_errors(size, tmp_path):
    with pytest.raises(ValueError, match=r"expected (a size|max_shard_size to be an integer or a string)"):
        save(da.DeepseekLM(small_models.config("v3")), tmp_path / "x", max_shard_size=size)
    assert not (tmp_path / "x").exists()


def test_sizes():
    assert parse_size("5GB") == 5 * 10**9 and parse_size("200 mb") == 200 * 10**6
    assert parse_size("1.5GiB") == 3 * 2**29 and parse_size(17) == parse_size("17") == 17


def test_what_cannot_be_saved_is_an_error(tmp_path):
    config = small_models.config("v3")
    model = da.DeepseekLM(config)
    target = tmp_path / "x"
    with pytest.raises(ValueError, match="expected format 'bf16' or 'fp8', got 'gguf'"):
        save(model, target, format="gguf")
    with pytest.raises(ValueError, match="expected a DeepseekLM, got Linear"):
        save(torch.nn.Linear(2, 2), target)
    with pytest.raises(ValueError, match="with memory, got one on device meta"):
        save(da.DeepseekLM(config, device="meta"), target)
    model.config = config.replace(n_routed_experts=4, n_group=2)
    with pytest.raises(ValueError, match="that the model's config describes"):
        save(model, target)
    model.config = config
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts.3.down_proj.weight: expected finite weights"):
        save(model, target, format="fp8")
    assert not target.exists()
    target.write_text("a file")
    with pytest.raises(ValueError, match="expected a folder to write to"):
        save(model, target)


def test_a_slice_cannot_replace_what_it_is_cut_from(folder):
    with pytest.raises(ValueError, match="expected another folder"):
        slice_checkpoint(folder, folder, layers=[0])
    assert inspect_checkpoint(folder).ok


# ---------------------------------------------------------------- writes that fail


def snapshot(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@contextlib.contextmanager
def room_for(nbytes: int):
    """A disk that is full after `nbytes` of any one file: the system refuses the write, as ENOSPC would."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("nbytes", [100, 20_000, 250_000])
@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_a_disk_full_while_saving_leaves_the_old_checkpoint(folder, nbytes, format):
    """Full in the header, in the first tensors, and late."""
    (folder / "tokenizer.json").write_text("{}")
    before = snapshot(folder)
    model = da.DeepseekLM(small_models.config("v3", hidden_size=128))
    with room_for(nbytes), pytest.raises(OSError):
        save(model, folder, format)
    assert snapshot(folder) == before
    assert [file.name for file in folder.iterdir() if file.name.startswith(".")] == []
    save(model, folder, format)
    assert inspect_checkpoint(folder).ok


def test_a_failed_save_to_a_new_folder_leaves_none(tmp_path):
    with room_for(1000), pytest.raises(OSError):
        save(da.DeepseekLM(small_models.config("v3")), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_known_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"bytes to write, 1,000 free"):
        save(da.DeepseekLM(small_models.config("v3")), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("last_good", [0, 1, 3, 4, 5, 7])
def test_a_rename_that_fails_is_undone(folder, monkeypatch, last_good):
    """Old files go aside and new ones come, one rename each; whichever fails, all of them are taken back."""
    before = snapshot(folder)
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == last_good + 1:
            raise PermissionError("no")
        replace(source, target)

    monkeypatch.setattr(writer.os, "replace", failing)
    with pytest.raises(PermissionError):
        save(da.DeepseekLM(small_models.config("v3")), folder)
    assert snapshot(folder) == before


def test_interrupting_a_save_leaves_the_old_checkpoint(folder, monkeypatch):
    before = snapshot(folder)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer.CheckpointWriter, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(da.DeepseekLM(small_models.config("v3")), folder)
    assert snapshot(folder) == before
