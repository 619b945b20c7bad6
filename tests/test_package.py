"""The wheel and the source distribution: built from this checkout, unpacked and used elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
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


def test_a_wheel_with_the_library_needs_no_compiler(cpu_library, tmp_path):
    """As `deepseek-arch build-kernels --into-package` and `pip wheel` make it (kernels/README.md)."""
    from deepseek_kernels.common.cpu import cache_folder

    pytest.importorskip("setuptools", minversion="77")
    source, site = tmp_path / "source", tmp_path / "site"
    for name in ("deepseek_arch", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "lib"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(cache_folder(), source / "kernels/deepseek_kernels/common/cpu/lib")
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    run = subprocess.run(
        [*command, f"-C--build-option=--plat-name={platform}", "."], cwd=source, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    (path,) = tmp_path.glob(f"*-{platform}.whl")
    zipfile.ZipFile(path).extractall(site)
    script = """
import torch
from deepseek_kernels import describe, rms_norm
rms_norm(torch.ones(1, 8), torch.ones(8), 1e-6)
print(*(choice.implementation for choice in describe() if choice.op == "rms_norm"))
"""
    variables = {"PYTHONPATH": str(site), "PATH": str(tmp_path), "DEEPSEEK_KERNELS_CPU": "1", "CXX": ""}
    environment = os.environ | variables | {"DEEPSEEK_KERNELS_CACHE": str(tmp_path / "none")}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "cpu\n"


# ------------------------------------------------------------------ source distribution

PARTS = ("deepseek_arch", "kernels", "tests", "benchmarks")
FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CONTRIBUTING.md", "Makefile", "constraints.txt")
CACHES = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "*.egg-info")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """Builds the source distribution from a copy of this checkout, and unpacks it."""
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("unpacked")
    for name in PARTS:
        shutil.copytree(ROOT / name, source / name, ignore=CACHES)
    for name in (*FILES, "requirements-oldest.txt"):
        shutil.copy(ROOT / name, source / name)
    build = f"import setuptools.build_meta as backend; backend.build_sdist({str(out)!r})"
    run = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="data")
    archive.unlink()
    (folder,) = out.iterdir()
    return folder


def test_the_source_distribution_holds_the_checkout(unpacked):
    """Code, tests with their oracles and data, benchmarks, documents, and the C++ of the processor's kernels."""
    names = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    for part in PARTS:
        here = [path.relative_to(ROOT) for path in (ROOT / part).rglob("*") if path.is_file()]
        generated = {"__pycache__", "deepseek_arch.egg-info"}
        expected = {str(path) for path in here if not generated & set(path.parts) and not path.name.startswith(".")}
        assert expected <= names, sorted(expected - names)[:10]
    assert set(FILES) <= names
    assert not [name for name in names if "__pycache__" in name]


def test_tests_run_from_the_source_distribution(unpacked):
    """A sample that needs helpers of the tests and both packages, with nothing of this checkout on the path."""
    sample = ["tests/attention/test_masking.py", "tests/models/test_losses.py", "tests/config/test_checked_types.py"]
    where = "import deepseek_arch, deepseek_kernels; print(deepseek_arch.__file__, deepseek_kernels.__file__)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(("kernels", ".")), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", *sample]
    found = subprocess.run([sys.executable, "-c", where], cwd=unpacked, env=environment, capture_output=True, text=True)
    assert found.stdout.count(str(unpacked)) == 2, found.stdout + found.stderr
    run = subprocess.run(command, cwd=unpacked, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
