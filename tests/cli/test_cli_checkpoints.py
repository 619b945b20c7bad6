"""`deepseek-arch inspect`, `slice` and `convert`: what becomes of checkpoint folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepseek_arch.config.deepseek_config import DeepseekConfig

# --------------------------------------------------------------------- inspect


def test_inspect_a_good_checkpoint(cli, stored):
    code, out, err = cli("inspect", stored)
    assert (code, err) == (0, "")
    assert "F8_E4M3" in out and "This checkpoint loads." in out
    code, out, _ = cli("inspect", stored, "--json")
    found = json.loads(out)
    assert code == 0 and found["ok"] and found["dtypes"]["F8_E4M3"]["tensors"] == found["dequantized"] == 176


def test_inspect_a_damaged_checkpoint(cli, checkpoint):
    shard = sorted(checkpoint.glob("*.safetensors"))[1]
    shard.unlink()
    code, out, _ = cli("inspect", checkpoint)
    assert code == 1
    assert shard.name in out and "This checkpoint does not load." in out
    code, out, _ = cli("inspect", checkpoint, "--json")
    assert code == 1 and not json.loads(out)["ok"]


def test_inspect_no_checkpoint(cli, tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        code, _, err = cli("inspect", path)
        assert code == 1 and err.startswith("error: expected a checkpoint folder")


# ----------------------------------------------------------------------- slice


@pytest.mark.parametrize(("layers", "kept"), [("0,2", 2), ("0-1", 2), ("0-1,2", 3), ("1", 1)])
def test_slice_keeps_layers(cli, stored, tmp_path, layers, kept):
    code, _, err = cli("slice", stored, tmp_path / "out", "--layers", layers, "--experts", 8, "--no-mtp")
    assert (code, err) == (0, "")
    config = DeepseekConfig.from_pretrained(tmp_path / "out")
    assert (config.num_hidden_layers, config.n_routed_experts, config.num_nextn_predict_layers) == (kept, 8, 0)
    assert cli("inspect", tmp_path / "out")[0] == 0


def test_slice_as_json(cli, stored, tmp_path):
    code, out, _ = cli("slice", stored, tmp_path / "out", "--layers", "0", "--json")
    written = json.loads(out)
    _, out, _ = cli("inspect", tmp_path / "out", "--json")
    found = json.loads(out)
    assert code == 0
    assert (written["tensors"], written["bytes"]) == (len(found["tensors"]), found["bytes"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--layers", "0,9"), "layers to be some of the numbers 0 to 2"),
        (("--layers", "2,0"), "layers to be ascending"),
        (("--experts", "7"), "experts"),
        (("--max-shard-size", "huge"), "huge"),
    ],
)
def test_slices_that_cannot_be(cli, stored, tmp_path, args, message):
    code, _, err = cli("slice", stored, tmp_path / "out", *args)
    assert code == 1 and message in err
    assert not (tmp_path / "out").exists()


def test_slice_into_a_file(cli, stored, tmp_path):
    (tmp_path / "out").write_text("in the way")
    code, _, err = cli("slice", stored, tmp_path / "out", "--layers", "0")
    assert code == 1 and "out" in err
    assert (tmp_path / "out").read_text() == "in the way"


# --------------------------------------------------------------------- convert


def test_convert_there_and_back(cli, stored, tmp_path):
    """To stacked BF16 and back to FP8: what each step says, and what the files hold in the end."""
    code, out, err = cli("convert", stored, tmp_path / "bf16", "--to", "bf16", "--stacked", "--verify")
    assert (code, err) == (0, "")
    assert "69 tensors" in out and "31 copied, 176 dequantized, verified" in out
    code, out, _ = cli(
        "convert", tmp_path / "bf16", tmp_path / "fp8", "--to", "fp8", "--per-expert", "--ue8m0", "--json"
    )
    done = json.loads(out)
    assert (code, done["quantized"], done["tensors"]) == (0, 176, 383)
    assert done["nbytes"] == sum(file.stat().st_size for file in stored.glob("*.safetensors")) - headers(stored)
    _, out, _ = cli("inspect", tmp_path / "fp8", "--json")
    found = json.loads(out)
    assert found["ok"] and found["dtypes"]["F8_E4M3"]["tensors"] == 176
    config = DeepseekConfig.from_pretrained(tmp_path / "fp8")
    assert config.quantization_config["scale_fmt"] == "ue8m0"


def headers(folder: Path) -> int:
    """Bytes of the shards' headers."""
    return sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in folder.glob("*.safetensors"))


def test_convert_as_a_dry_run(cli, stored, tmp_path):
    arguments = ("convert", stored, tmp_path / "out", "--to", "bf16", "--dry-run", "--max-shard-size", "3MB")
    code, out, err = cli(*arguments)
    assert (code, err) == (0, "")
    assert all(
        text in out for text in ("experts", "7,962,624", "disk needed", "10.53 MB", "memory needed", "one tensor")
    )
    code, out, _ = cli(*arguments, "--json")
    planned = json.loads(out)
    assert code == 0
    assert planned["bytes_written"] == planned["disk_needed"] == 10_532_800
    assert planned["shards"] == 4 and planned["largest_shard"] <= 3_000_000 < planned["disk_free"]
    assert planned["memory_needed"] > 0 and planned["finished_shards"] == 0
    assert not (tmp_path / "out").exists()


def test_convert_goes_on_or_starts_afresh(cli, stored, tmp_path, monkeypatch):
    from deepseek_arch.checkpoint.files import resumable_writer as resuming

    arguments = ("convert", stored, tmp_path / "out", "--to", "bf16", "--max-shard-size", "3MB")

    def full(self, *_):
        raise OSError(28, "No space left on device")

    finish = resuming.ResumableWriter._finish
    with monkeypatch.context() as patch:
        patch.setattr(
            resuming.ResumableWriter,
            "_finish",
            lambda self, name: finish(self, name) if "2-of" not in name else full(self),
        )
        code, out, err = cli(*arguments)
    assert (code, out) == (1, "") and err == "error: [Errno 28] No space left on device\n"
    code, out, _ = cli(*arguments, "--dry-run")
    assert code == 0 and "1 of an interrupted conversion" in out
    code, _, err = cli(*arguments, "--stacked")
    assert code == 1 and len(err.splitlines()) == 1 and "--no-resume" in err
    code, out, _ = cli(*arguments)
    assert code == 0 and "1 files continued from before" in out
    code, out, _ = cli(*arguments, "--stacked", "--no-resume")
    assert code == 0 and "continued" not in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--to", "fp8", "--ue8m0"), "in FP8 already"),
        (("--to", "bf16", "--ue8m0"), "scale_format None"),
        (("--to", "bf16", "--max-shard-size", "huge"), "huge"),
    ],
)
def test_conversions_that_cannot_be(cli, stored, tmp_path, args, message):
    for more in ((), ("--dry-run",)):
        code, out, err = cli("convert", stored, tmp_path / "out", *args, *more)
        assert (code, out) == (1, "") and message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    code, _, err = cli("convert", stored, stored, "--to", "bf16")
    assert code == 1 and "another folder" in err


def test_converting_a_broken_checkpoint(cli, checkpoint, tmp_path):
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    code, _, err = cli("convert", checkpoint, tmp_path / "out", "--to", "bf16")
    assert code == 1 and shard.name in err
    assert not (tmp_path / "out").exists()
