"""The command line as tests run it, and a checkpoint for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deepseek_arch.checkpoint.synthetic import write_checkpoint
from deepseek_arch.cli import main
from deepseek_arch.config.deepseek_config import DeepseekConfig


@pytest.fixture
def cli(capsys, monkeypatch, request):
    """Returns a function that runs a command line and returns its exit code, stdout and stderr.

    A module's `COMMAND` comes before the arguments.
    """
    monkeypatch.setenv("COLUMNS", "120")
    command = getattr(request.module, "COMMAND", ())

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(arg) for arg in (*command, *args)])
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
