"""A local checkpoint folder, read by the rules of `checkpoint.load`: the files of the model, and what is in FP8."""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from pathlib import Path
from typing import Any

from transformers import FineGrainedFP8Config

from ..checkpoint.files.shards import GENERATION_CONFIG_NAME, INDEX_NAME, Shards
from ..checkpoint.files.staging import CONFIG_NAME
from ..checkpoint.problems import CheckpointError, Problem, ProblemKind
from ..config.argument_types import shown
from ..config.json_format import MOST_JSON, parse_json
from ..config.regular_file import PinnedFiles, open_regular
from .fp8_config import FP8_METHOD, DeepseekFP8Config

__all__ = ["check_unchanged", "pinned_files", "settle_files"]

_LOCATED_OTHERWISE = ("gguf_file", "state_dict", "subfolder", "variant")


def pinned_files(source: Any, kwargs: dict[str, Any]) -> PinnedFiles | None:
    """Returns the files of a checkpoint folder as they are before transformers reads the first; None of another source.

    Args:
        source, kwargs: as for `settle_files`.
    """
    if not isinstance(source, str | os.PathLike) or not os.path.isdir(source):
        return None
    pins = PinnedFiles(Path(source, kwargs.get("subfolder") or ""))
    for name in (CONFIG_NAME, GENERATION_CONFIG_NAME, INDEX_NAME):
        pins.look_at(name)
    if kwargs.get("state_dict") is None:
        for name in Shards(PinnedFiles(pins.folder), []).shards:
            pins.look_at(name)
    return pins


def check_unchanged(pins: PinnedFiles | None) -> None:
    """Raises a CheckpointError if a file is no longer the one that was pinned: what was read may be a mixture."""
    changed = [] if pins is None else pins.changed()
    if pins is not None and changed:
        raise CheckpointError(pins.folder, [Problem(ProblemKind.CHANGED, name) for name in changed])


def settle_files(config: Any, source: Any, kwargs: dict[str, Any]) -> Any:
    """Returns a config by which transformers reads the files that `checkpoint.load` would.

    transformers takes a model.safetensors before an index that names other files; and where config.json says FP8, it
    says so for files without any FP8 tensor too, which load, train and save as what they are.

    Args:
        source: the first argument of `from_pretrained`; nothing is done unless it is a folder.
        kwargs: its others; a quantization argument about FP8 that is not there is removed.

    Raises:
        OSError: a shard is a FIFO, a socket or a device, for which transformers would wait for ever.
        ValueError: generation_config.json is no JSON object, or has end tokens that are none; transformers would skip
            it, or fail when it generates.

    Warns:
        UserWarning: other safetensors files of the folder are not read.
    """
    if not isinstance(source, str | os.PathLike) or not os.path.isdir(source):
        return config
    folder = Path(source, kwargs.get("subfolder") or "")
    _check_files(folder)
    _check_generation_config(folder)
    if any(kwargs.get(name) for name in _LOCATED_OTHERWISE):
        return config
    problems: list[Problem] = []  # of files that cannot be read: transformers finds them again
    shards = Shards(PinnedFiles(Path(source)), problems)
    if not shards.shards or problems:
        return config
    adapter = (Path(source) / "adapter_config.json").is_file()  # transformers applies it
    others = [name for name in shards.others if not (adapter and name.startswith("adapter"))]
    if others:
        warnings.warn(f"{source}: not read, since {shards.chosen_by}: {', '.join(others)}", stacklevel=3)
    config = copy.deepcopy(config)
    if shards.index:
        config.transformers_weights = INDEX_NAME
    elif len(shards.shards) == 1:
        config.transformers_weights = shards.shards[0]
    if _says_fp8(config) and not _has_fp8(shards):
        del config.quantization_config
        if isinstance(kwargs.get("quantization_config"), FineGrainedFP8Config | DeepseekFP8Config):
            del kwargs["quantization_config"]
    return config


def _check_files(folder: Path) -> None:
    """Raises an OSError for a shard that exists and is no regular file; transformers opens it without a look."""
    for name in Shards(PinnedFiles(folder), []).shards:
        with contextlib.suppress(FileNotFoundError):  # transformers names what is missing
            open_regular(folder / name).close()


def _check_generation_config(folder: Path) -> None:
    """Raises ValueError for a generation_config.json that `checkpoint.load` refuses, or whose tokens are none."""
    try:
        data = PinnedFiles(folder).read(GENERATION_CONFIG_NAME, MOST_JSON)
        fields = {} if data is None else parse_json(data.decode("utf-8"))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = fields.get(name)
            several = value if name == "eos_token_id" and isinstance(value, list) else [value]
            if value is not None and not all(isinstance(one, int) and not isinstance(one, bool) for one in several):
                raise ValueError(f"{name} {shown(value)}")
    except ValueError as error:
        raise ValueError(f"expected a generation config in {folder / GENERATION_CONFIG_NAME}, got {error}") from None


def _says_fp8(config: Any) -> bool:
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict):
        return quantization.get("quant_method") == FP8_METHOD
    return isinstance(quantization, DeepseekFP8Config)


def _has_fp8(shards: Shards) -> bool:
    """Returns True if a tensor is FP8, is a scale, or cannot be known."""
    shards.open_all()
    tensors = shards.tensors.items()
    return bool(shards.problems) or any(t.dtype == "F8_E4M3" or n.endswith("_scale_inv") for n, t in tensors)
