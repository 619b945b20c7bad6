"""The way that `load` takes through the package: few files, one pass over the headers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import deepseek_arch as da
from deepseek_arch.checkpoint.files import shards as shards_module
from support import checkpoint_files as files
from support import layouts, small_models

PACKAGE = Path(da.__file__).parent


def visited(function) -> set[str]:
    """The files of deepseek_arch whose functions run during `function()`; building the model's modules is not traced:
    that is what `DeepseekLM(config)` costs without any checkpoint."""
    seen, inside = set(), []

    def trace(frame, event, _):
        name, code = frame.f_code.co_filename, frame.f_code
        if not name.startswith(str(PACKAGE)):
            return
        if code.co_qualname == "DeepseekLM.__init__":
            if event == "call":
                inside.append(frame)
            elif event == "return":
                inside.remove(frame)
        elif event == "call" and not inside:
            seen.add(str(Path(name).relative_to(PACKAGE)))

    sys.setprofile(trace)
    try:
        function()
    finally:
        sys.setprofile(None)
    return seen


@pytest.mark.parametrize("layout", ["published", "stacked"])
def test_loading_visits_few_files(tmp_path, layout):
    config = small_models.config("v3", num_nextn_predict_layers=1)
    weights = files.tensors(config)
    folder = files.write(tmp_path / "model", weights if layout == "published" else layouts.stack(weights), config)
    da.load(folder)  # first uses resolve public names
    # The decorator that checks the types of a public function's arguments is no part of what the function does.
    seen = visited(lambda: da.load(folder)) - {"config/argument_types.py"}
    assert "checkpoint/load_plan.py" in seen and "config/deepseek_config.py" in seen
    assert len(seen) <= 17, sorted(seen)


@pytest.mark.parametrize("layout", ["published", "stacked"])
@pytest.mark.parametrize("index", [True, False])
def test_every_header_is_read_once(tmp_path, monkeypatch, layout, index):
    config = small_models.config("v3", num_nextn_predict_layers=1)
    weights = files.tensors(config)
    folder = files.write(
        tmp_path / "model", weights if layout == "published" else layouts.stack(weights), config, index=index
    )
    read_header, opened = shards_module.read_header, []

    def counting(file):
        opened.append(file.name)
        return read_header(file)

    monkeypatch.setattr(shards_module, "read_header", counting)
    model = da.load(folder)
    assert sorted(opened) == sorted(file.name for file in folder.glob("*.safetensors"))
    files.assert_same_tensors(model.state_dict(), files.expected_state(config, weights))


def test_of_stacked_experts_only_the_shards_that_are_needed_are_opened(tmp_path):
    """One layer of three, whose tensors the index puts into two of many files; the others are damaged."""
    config = small_models.config("v3")
    weights = layouts.stack(files.tensors(config))
    folder = files.write(tmp_path / "model", weights, config, shards=len(weights))
    for name, file in zip(weights, sorted(folder.glob("*.safetensors")), strict=True):
        if name.startswith("model.layers.") and not name.startswith("model.layers.1."):
            file.write_bytes(b"damaged")
    model = da.load(folder, layers=[1])
    whole = da.load(files.write(tmp_path / "whole", files.tensors(config), config), layers=[1])
    files.assert_same_tensors(model.state_dict(), whole.state_dict())
