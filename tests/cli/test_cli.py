"""The `deepseek-arch` command: what it prints, its exit codes, and that no user error ends in a traceback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deepseek_arch
import deepseek_kernels
from deepseek_arch.cli import main
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


def test_build_kernels_into_the_package(cli, cpu_library, monkeypatch):
    from deepseek_kernels.common import cpu

    monkeypatch.setattr(cpu, "PACKAGED", cpu.cache_folder())  # where the library is, so that nothing is compiled
    code, out, _ = cli("build-kernels", "--into-package", "--json")
    assert code == 0 and Path(json.loads(out)["library"]).is_relative_to(cpu.cache_folder())


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
