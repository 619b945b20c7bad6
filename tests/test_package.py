"""The wheel: built from this checkout, installed into an empty folder, used from elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Builds a wheel in a folder of links, since a build leaves files in its folder."""
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "deepseek_arch", "kernels"):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), "."]
    run = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_both_packages_whole(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package, folder in (("deepseek_arch", ROOT), ("deepseek_kernels", ROOT / "kernels")):
        sources = {str(path.relative_to(folder)) for path in (folder / package).rglob("*.py")}
        presets = {str(path.relative_to(folder)) for path in (folder / package).rglob("*.json")}
        recipes = {str(path.relative_to(folder)) for path in (folder / package).rglob("*.yaml")}
        sources |= {str(path.relative_to(folder)) for path in (folder / package).rglob("csrc/*")}
        assert sources | presets | recipes | {f"{package}/py.typed"} <= names
    assert {"deepseek_arch/__init__.pyi", "deepseek_arch/TRAPS.md"} <= names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not [name for name in names if name.split("/")[0] in ("kernels", "tests", "benchmarks")]


def test_an_installed_wheel_works_from_elsewhere(wheel, tmp_path):
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True)
    script = f"""
import deepseek_arch as da, deepseek_kernels as dk, torch
assert da.__file__.startswith({str(site)!r}) and dk.__file__.startswith({str(site)!r})
model = da.DeepseekLM(da.DeepseekConfig.from_pretrained("tiny"))
assert da.generate(model, torch.tensor([[0, 17, 4]]), max_new_tokens=2).shape == (1, 5)
assert len(da.presets()) > 10
"""
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    command = [sys.executable, str(site / "bin" / "deepseek-arch"), "plan", "tiny", "--json"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert '"activated"' in run.stdout
