"""The `deepseek-arch` command: what it prints, its exit codes, and that no user error ends in a traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deepseek_arch
import deepseek_kernels
from deepseek_arch.checkpoint.synthetic import write_checkpoint
from deepseek_arch.cli import main
from deepseek_arch.cli.tokenizer import Tokenizer, TokenPrinter
from deepseek_arch.config.deepseek_config import DeepseekConfig, presets

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    "plan",
    "presets",
    "inspect",
    "slice",
    "convert",
    "generate",
    "probe-mtp",
    "place",
    "doctor",
    "build-kernels",
)


@pytest.fixture
def cli(capsys, monkeypatch):
    """Runs a command line -> (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return stopped.value.code or 0, out, err

    return run


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """A checkpoint of the tiny preset in the published FP8 layout."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_checkpoint(folder, DeepseekConfig.from_pretrained("tiny"))
    return folder


@pytest.fixture
def checkpoint(stored, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(stored, tmp_path / "tiny"))


# ------------------------------------------------------------------------ help


def test_help_names_every_command(cli):
    code, out, _ = cli("--help")
    assert code == 0
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(cli, command):
    code, out, _ = cli(command, "--help")
    assert code == 0 and "--json" in out


def test_version(cli):
    assert cli("--version") == (0, f"deepseek-arch {deepseek_arch.__version__}\n", "")


@pytest.mark.parametrize(
    "args",
    [(), ("explode",), ("plan",), ("plan", "tiny", "--context", "0"), ("plan", "tiny", "--batch", "many")]
    + [("slice", "a", "b", "--layers", layers) for layers in ("", "one", "0;3", "-1", "1-")]
    + [("convert", "a", "b"), ("convert", "a", "b", "--to", "int4"), ("convert", "a", "--to", "fp8")]
    + [("generate", "a"), ("generate", "a", "--ids", "1", "--prompt", "x"), ("generate", "a", "--ids", "1-3")]
    + [("generate", "a", "--ids", "1", "--dtype", "int4"), ("generate", "a", "--ids", "1", "--temperature", "-1")],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(cli, args):
    code, _, _ = cli(*args)
    assert code == 2


# ------------------------------------------------------------------------ plan


@pytest.mark.parametrize("preset", presets())
def test_plan_of_every_preset(cli, preset):
    code, out, err = cli("plan", preset)
    total = deepseek_arch.count_parameters(DeepseekConfig.from_pretrained(preset)).total
    assert (code, err) == (0, "")
    assert f"{total:,}" in out


def test_plan_prints_the_figures_of_v3(cli):
    _, out, _ = cli("plan", "deepseek-v3")
    for figure in ("671,026,419,200", "37,552,297,472", "36,625,618,432", "11,610,068,224", "70,272 B", "250.5 GFLOP"):
        assert figure in out


def test_plan_as_json(cli, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DeepseekConfig.from_pretrained("deepseek-v3").to_dict()))
    code, out, _ = cli("plan", tmp_path, "--json", "--context", 1000, "--batch", 3, "--memory", 80, "--memory", 2000)
    plan = json.loads(out)
    assert code == 0
    assert plan["parameters"]["total"] == 671_026_419_200
    assert plan["latent_cache_bytes_per_token"] == 70_272
    assert plan["cache_bytes"] == 3 * 1000 * 70_272
    # All parameters but the 59 x 256 float32 biases are two bytes.
    weights = 2 * (671_026_419_200 + 11_610_068_224 + 59 * 256)
    assert plan["weight_bytes"]["bf16"] == weights
    fits = {(fit["gigabytes"], fit["dtype"]): fit for fit in plan["fits"]}
    assert len(fits) == 6
    assert fits[80, "bf16"]["devices"] == 19 and fits[80, "bf16"]["cache_tokens"] == 0  # 1365.5 GB / 72 GB
    assert fits[2000, "bf16"]["devices"] == 1
    assert fits[2000, "bf16"]["cache_tokens"] == (int(1800e9) - weights) // 70_272


def test_plan_of_v4_says_why_not(cli, tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "deepseek_v4"}')
    for source in (file, tmp_path, "deepseek-v4-flash"):
        code, out, err = cli("plan", source)
        assert (code, out) == (1, "")
        assert re.fullmatch(r"error: .*V4 replaced latent attention.*\n", err)


def test_plan_of_what_does_not_exist_lists_the_presets(cli):
    code, _, err = cli("plan", "deepseek-v9")
    assert code == 1 and len(err.splitlines()) == 1
    assert all(preset in err for preset in presets())


def test_plan_with_an_impossible_memory(cli):
    code, _, err = cli("plan", "tiny", "--memory", "-3")
    assert (code, err) == (1, "error: expected memory > 0, got -3.0\n")


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


# -------------------------------------------------------------------- generate


def expected_tokens(folder: Path, prompt: list[int], fp8: str = "keep", **options) -> list[int]:
    model = deepseek_arch.load(folder, fp8=fp8, mtp=False)
    return deepseek_arch.generate(model, torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


def test_generate_from_token_ids(cli, stored):
    expected = expected_tokens(stored, [5, 7, 9], max_new_tokens=6)
    code, out, err = cli("generate", stored, "--ids", "5, 7 9", "-n", 6)
    assert code == 0 and [int(token) for token in out.split()] == expected
    assert f"{len(expected)} tokens in" in err
    _, out, _ = cli("generate", stored, "--ids", "5,7,9", "-n", 6, "--json")
    assert json.loads(out)["prompt_ids"] == [5, 7, 9] and json.loads(out)["new_ids"] == expected


def test_generate_with_drafts_and_from_dequantized_weights(cli, stored):
    expected = expected_tokens(stored, [5, 7, 9], max_new_tokens=6)
    code, out, err = cli("generate", stored, "--ids", "5,7,9", "-n", 6, "--mtp-depth", 2)
    assert code == 0 and [int(token) for token in out.split()] == expected and "acceptance" in err
    _, out, _ = cli("generate", stored, "--ids", "5,7,9", "-n", 6, "--mtp-depth", 1, "--json")
    assert json.loads(out)["new_ids"] == expected and len(json.loads(out)["acceptance"]) <= 1
    expected = expected_tokens(stored, [5, 7, 9], fp8="dequantize", max_new_tokens=6)
    _, out, _ = cli("generate", stored, "--ids", "5,7,9", "-n", 6, "--fp8", "dequantize")
    assert [int(token) for token in out.split()] == expected


def test_probe_of_the_prediction_layers(cli, stored):
    code, out, _ = cli("probe-mtp", stored, "--ids", "5,7,9", "-n", 8)
    assert code == 0 and out.count("accepted") == 4 and out.count("(as configured)") == 1
    _, out, _ = cli("probe-mtp", stored, "--ids", "5,7,9", "-n", 8, "--mtp-depth", 1, "--json")
    assert {(p["mtp_input"], p["mtp_chain"]) for p in json.loads(out)} == {
        (a, b) for a in ("post_norm", "pre_norm") for b in ("block", "head_norm")
    }


def test_generate_by_sampling(cli, stored):
    options = {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "seed": 3}
    expected = expected_tokens(stored, [1, 2], max_new_tokens=5, **options)
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    _, out, _ = cli("generate", stored, "--ids", "1,2", "-n", 5, *flags)
    assert [int(token) for token in out.split()] == expected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--ids", "1,512"), "between 0 and 511, got 512"),
        (("--prompt", "hello"), "give token ids with --ids"),
        (("--ids", "1", "--device", "no-such-device"), "expected an available device"),
        (("--ids", "1", "--top-p", "0", "--temperature", "1"), "top_p"),
    ],
)
def test_generations_that_cannot_be(cli, stored, args, message):
    code, out, err = cli("generate", stored, *args)
    assert code == 1 and message in err and out.strip() == ""


def test_generate_from_a_broken_checkpoint(cli, checkpoint):
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    code, _, err = cli("generate", checkpoint, "--ids", "1")
    assert code == 1 and shard.name in err


def words() -> dict[str, int]:
    return {"<unk>": 0, **{f"w{index}": index for index in range(1, 512)}}


@pytest.mark.parametrize("library", ["transformers", "tokenizers"])
def test_generate_text(cli, checkpoint, monkeypatch, library):
    """With the folder's own tokenizer, by transformers if installed and else by tokenizers alone."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel(words(), unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    (checkpoint / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    if library == "transformers":
        pytest.importorskip("transformers")
    else:
        monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    expected = expected_tokens(checkpoint, [5, 7], max_new_tokens=4)
    code, out, _ = cli("generate", checkpoint, "--prompt", "w5 w7", "-n", 4)
    assert (code, out) == (0, " ".join(f"w{token}" for token in expected) + "\n")
    code, _, err = cli("generate", checkpoint, "--prompt", "")
    assert code == 1 and "at least one token" in err


def with_remote_code(folder: Path) -> None:
    """As Moonlight and Kimi-K2 come: a tokenizer that is code of the checkpoint."""
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenization_moonshot.py").write_text("raise SystemExit('code of the checkpoint ran')")


@pytest.mark.parametrize("tokenizer", [None, "{}", "not even JSON"])
def test_token_ids_need_no_tokenizer(cli, checkpoint, tokenizer):
    """One that is code of the checkpoint, or broken, is not touched; the ids come back as numbers."""
    if tokenizer is None:
        with_remote_code(checkpoint)
    else:
        (checkpoint / "tokenizer.json").write_text(tokenizer)
    code, out, err = cli("generate", checkpoint, "--ids", "3,1,4", "-n", 3, "--json")
    assert code == 0, err
    assert json.loads(out)["text"] is None and len(json.loads(out)["new_ids"]) == 3


def test_text_for_a_tokenizer_of_code_is_refused(cli, checkpoint):
    with_remote_code(checkpoint)
    code, out, err = cli("generate", checkpoint, "--prompt", "hello", "-n", 3)
    assert code == 1 and out == ""
    assert "code from a checkpoint is never run; give token ids with --ids" in err


def test_the_end_tokens_of_generation_config_end_a_text(cli, checkpoint):
    arguments = ("generate", checkpoint, "--ids", "3,1,4", "-n", 8, "--json")
    free = json.loads(cli(*arguments)[1])["new_ids"]
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [free[2]]}))
    assert json.loads(cli(*arguments)[1])["new_ids"] == free[: free.index(free[2]) + 1]


@pytest.mark.parametrize("how", [("--ids", "1,2"), ("--prompt", "hello")])
@pytest.mark.parametrize("command", ["generate", "probe-mtp", "inspect", "convert"])
def test_names_of_the_hub_are_refused_with_what_to_do(cli, command, how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rest = {"inspect": (), "convert": ("out", "--to", "bf16")}.get(command, how)
    code, _, err = cli(command, "moonshotai/Kimi-K2-Instruct", *rest)
    assert code == 1 and "hf download moonshotai/Kimi-K2-Instruct --local-dir Kimi-K2-Instruct" in err


def test_probing_a_model_without_mtp_modules_says_so(cli, tmp_path):
    write_checkpoint(tmp_path, DeepseekConfig.from_pretrained("tiny").replace(num_nextn_predict_layers=0))
    code, _, err = cli("probe-mtp", tmp_path, "--ids", "1,2,3")
    assert code == 1 and "expected a model with MTP modules to probe, got one without" in err


def test_text_without_any_tokenizer_library(cli, checkpoint, monkeypatch):
    (checkpoint / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    code, _, err = cli("generate", checkpoint, "--prompt", "w5")
    assert code == 1 and "transformers or tokenizers to be installed" in err


def test_a_character_of_several_tokens_is_printed_whole():
    text = "aé€z"
    tokenizer = Tokenizer(list, lambda ids: bytes(ids).decode("utf-8", errors="replace"))
    pieces: list[str] = []
    printer = TokenPrinter(tokenizer, pieces.append)
    for byte in text.encode():
        printer(torch.tensor([byte]))
    printer.end()
    assert [piece for piece in pieces if piece] == ["a", "é", "€", "z", "\n"]


def test_text_that_ends_inside_a_character_is_printed_as_it_is():
    pieces: list[str] = []
    printer = TokenPrinter(Tokenizer(list, lambda ids: bytes(ids).decode("utf-8", errors="replace")), pieces.append)
    printer(torch.tensor(["€".encode()[0]]))
    printer.end()
    assert "".join(pieces) == "\ufffd\n"


# ---------------------------------------------------------------------- doctor


def test_doctor_names_versions_devices_and_every_operator(cli):
    code, out, _ = cli("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["packages"]["torch"] == torch.__version__
    assert found["devices"][0]["device"] == "cpu" and found["devices"][0]["instructions"]
    chosen = {(row["op"], row["implementation"], row["reason"]) for row in found["operators"]}
    assert chosen == {(c.op, c.implementation, c.reason) for c in deepseek_kernels.describe()}
    assert len(chosen) >= 3 and all(reason for _, _, reason in chosen)
    code, out, _ = cli("doctor")
    assert code == 0 and all(op in out for op, _, _ in chosen) and torch.__version__ in out


# ---------------------------------------------------------------------- build-kernels


def test_build_kernels_builds_what_doctor_then_finds(cli, cpu_library, monkeypatch):
    from deepseek_kernels.common import cpu

    code, out, _ = cli("build-kernels", "--json")
    library = Path(json.loads(out)["library"])
    assert code == 0 and library.is_relative_to(cpu.cache_folder()) and library.is_file()
    assert cli("build-kernels") == (0, f"Built: {library}\n", "")
    assert json.loads(cli("doctor", "--json")[1])["cpu_library"] == "DEEPSEEK_KERNELS_CPU is 0"
    monkeypatch.setattr(cpu, "_turned_off", lambda: False)
    assert json.loads(cli("doctor", "--json")[1])["cpu_library"] == "built"
    assert re.search(r"C\+\+ operators\W+built", cli("doctor")[1])


def test_build_kernels_says_why_it_cannot(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("DEEPSEEK_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    code, out, error = cli("build-kernels")
    assert code == 1 and not out
    assert error.startswith("error: expected a C++ compiler that builds the operators for this CPU: ")


# ---------------------------------------------------------------------- errors


def test_warnings_are_one_line(cli, monkeypatch):
    import warnings

    from deepseek_arch.cli import memory_plan as planning

    def warn(*args):
        warnings.warn("something to know", stacklevel=1)
        raise ValueError("and then it failed")

    monkeypatch.setattr(planning, "plan_memory", warn)
    assert cli("plan", "tiny") == (1, "", "warning: something to know\nerror: and then it failed\n")


def test_a_traceback_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("DEEPSEEK_ARCH_TRACEBACK", "1")
    with pytest.raises(ValueError, match="expected a preset name"):
        main(["plan", "deepseek-v9"])


@pytest.mark.parametrize(
    ("args", "variables", "message"),
    [
        (("plan", "deepseek-v9"), {}, "expected a preset name"),
        # Read once, when the operators are imported.
        (("doctor",), {"DEEPSEEK_KERNELS_BACKEND": "cobol"}, "DEEPSEEK_KERNELS_BACKEND to be one of"),
    ],
    ids=["plan", "doctor"],
)
def test_as_a_process(args, variables, message):
    run = subprocess.run(
        [sys.executable, "-m", "deepseek_arch.cli", *args],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])} | variables,
    )
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith("error: ") and len(run.stderr.splitlines()) == 1
    assert message in run.stderr


# ------------------------------------------------------- presets and completion


def test_presets_are_listed(cli):
    code, out, _ = cli("presets")
    assert code == 0
    assert all(name in out for name in presets())
    assert "671.0B" in out and "8 of 384" in out
    assert json.loads(cli("presets", "--json")[1]) == presets()


def test_the_shell_completes_presets(monkeypatch):
    from typer.testing import CliRunner

    from deepseek_arch.cli import app

    words = {
        "_DEEPSEEK_ARCH_COMPLETE": "complete_bash",
        "COMP_WORDS": "deepseek-arch plan deepseek-v3.",
        "COMP_CWORD": "2",
    }
    done = CliRunner().invoke(app, [], prog_name="deepseek-arch", env=words)
    assert set(done.stdout.split()) == {name for name in presets() if name.startswith("deepseek-v3.")}


# ----------------------------------------------------------- numbers at the edge


@pytest.mark.parametrize("memory", ["nan", "inf", "1e300"])
def test_memory_without_measure_is_an_error(cli, memory):
    code, _, err = cli("plan", "tiny", "--memory", memory)
    assert code == 1 and err == f"error: expected memory to be a number of at most 1e+15, got {float(memory)}\n"


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("0-999999999999", "error: expected layers to be some of the numbers 0 to 2, got [0, 1, 2, 3]"),
        ("1-0", "expected a range that ascends, got '1-0'"),
        ("9" * 5000, "expected numbers such as 0,3,60 or 0-3"),
    ],
)
def test_layers_without_measure_are_errors(cli, stored, tmp_path, layers, message):
    code, _, err = cli("slice", stored, tmp_path / "out", "--layers", layers)
    assert code in (1, 2) and message in " ".join(err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "value"), [("--seed", "9" * 23), ("--max-new-tokens", "999999999999")])
def test_numbers_that_no_generator_takes_are_wrong_usage(cli, stored, option, value):
    code, out, err = cli("generate", stored, "--ids", "1,2", option, value)
    assert (code, out) == (2, "") and f"Invalid value for '{option}'" in err


def test_names_that_no_terminal_shows_are_escaped(cli, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "\\ud800"}')
    code, _, err = cli("plan", tmp_path / "config.json")
    assert code == 1 and "\\ud800" in err
