"""Tiny checkpoints in the published layout."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # small_models, however pytest is started

import transformers
from safetensors.torch import load_file, save_file

import deepseek_arch as da
import deepseek_arch.hf as dhf
from support import small_models


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No load reports and progress bars; and whatever a test registers is gone after it."""
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    yield
    dhf.unregister()


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(kind, config changes) -> a folder that `da.save` wrote; the same one for the same arguments."""
    made: dict[str, Path] = {}

    def make(kind: str = "v3", **changes: Any) -> Path:
        key = json.dumps([kind, changes], sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(kind)
            da.save(small_models.model(small_models.config(kind, **changes)), made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def fp8_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The "tiny" preset in the published FP8 layout: several shards, partial blocks, an MTP module."""
    from deepseek_arch.checkpoint.synthetic import write_checkpoint

    folder = tmp_path_factory.mktemp("fp8") / "checkpoint"
    write_checkpoint(folder, da.DeepseekConfig.from_pretrained("tiny"), "fp8")
    return folder


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """(folder, change(tensors, config)) -> a copy of the folder, in one file, changed in place."""

    def edit(source: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Path:
        copy = tmp_path / "edited"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        tensors = {k: v for file in sorted(source.glob("*.safetensors")) for k, v in load_file(file).items()}
        config = json.loads((source / "config.json").read_text())
        change(tensors, config)
        save_file({k: v.contiguous() for k, v in tensors.items()}, copy / "model.safetensors", {"format": "pt"})
        (copy / "config.json").write_text(json.dumps(config))
        return copy

    return edit


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """One word a token, for the 61 tokens of the small models."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(58))]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
