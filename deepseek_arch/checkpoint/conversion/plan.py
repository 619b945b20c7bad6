"""Plan of a conversion, from headers alone: the tensors it reads, does something to and writes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...config.regular_file import open_regular
from ...layout.parameter_map import is_stray
from ...layout.published_tensors import TensorSpec
from ...quant.fp8_blocks import FP8_QUANTIZATION, scale_format_of
from ..files.reader import DTYPE_NAMES, DTYPES
from ..files.resumable_writer import finished_shards
from ..files.writer import parse_size, plan_shards, shard_names
from ..load_plan import LoadPlan, plan_load
from .steps import ConversionSteps, TensorStep

__all__ = ["BAND_BYTES", "ConversionPlan", "plan_conversion"]

BAND_BYTES = 8 * 2**20  # of the wider side of a tensor: what a thread reads, converts and writes at a time
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class ConversionPlan:
    """Everything about a conversion but the values.

    Attributes:
        shards: the tensors of each file that will be written; steps: how they are made.
        config: the content of the new config.json.
        block_size, scale_format: of the FP8 that is read or written.
        unused: tensors of layers that config.json does not have; they are left out.
        finished: files that an interrupted conversion of the same has left, to continue from.
        manifest: identity of the conversion, by which a later call knows it again; see `ResumableWriter`.
    """

    source: LoadPlan
    out: Path
    format: str
    stacked: bool
    shards: list[list[TensorSpec]]
    steps: list[list[TensorStep]]
    config: dict[str, Any]
    block_size: tuple[int, int]
    scale_format: str | None
    unused: tuple[str, ...]
    manifest: dict[str, Any]
    finished: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """Names of the files that will be written."""
        return shard_names(len(self.shards))

    @property
    def bytes_read(self) -> int:
        return sum(step.bytes_read for steps in self.steps for step in steps)

    @property
    def shard_bytes(self) -> list[int]:
        return [sum(spec.nbytes for spec in shard) for shard in self.shards]

    @property
    def bytes_written(self) -> int:
        return sum(self.shard_bytes)

    @property
    def disk_needed(self) -> int:
        """Bytes still to be written. A checkpoint that is in the folder already stays until they are."""
        return sum(size for name, size in zip(self.names, self.shard_bytes, strict=True) if name not in self.finished)

    @property
    def disk_free(self) -> int:
        folder = self.out.absolute()
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    @property
    def memory_needed(self) -> int:
        """Bytes at most, beside the interpreter, PyTorch and the headers: for each thread a band of a tensor before and
        after, at least one row of blocks, and four times a row of blocks in float32 to compute with."""
        converted = [step.source for steps in self.steps for step in steps if step.action != "copy"]
        row_of_blocks = 4 * self.block_size[0] * max((info.shape[1] for info in converted), default=0)
        return torch.get_num_threads() * (2 * max(BAND_BYTES, row_of_blocks) + 4 * row_of_blocks)

    @property
    def actions(self) -> Counter[str]:
        """Numbers of tensors of the published layout that are copied, dequantized and quantized."""
        return Counter(step.action for steps in self.steps for step in steps)

    @property
    def classes(self) -> dict[tuple[str, str, str], tuple[int, int, int]]:
        """(part of the model, dtype before, dtype after) -> (tensors, bytes read, bytes written)."""
        classes: dict[tuple[str, str, str], tuple[int, int, int]] = {}
        for step in (step for steps in self.steps for step in steps):
            key = step.part, step.source.dtype, step.to.tensor.dtype
            count, read, written = classes.get(key, (0, 0, 0))
            classes[key] = count + 1, read + step.bytes_read, written + step.bytes_written
        return classes

    def to_dict(self) -> dict[str, Any]:
        """Returns the output of `--dry-run`, as JSON can hold it."""
        return {
            "path": str(self.source.folder),
            "out": str(self.out),
            "format": self.format,
            "stacked": self.stacked,
            "classes": [
                {"part": part, "from": old, "to": new, "tensors": count, "bytes_read": read, "bytes_written": written}
                for (part, old, new), (count, read, written) in self.classes.items()
            ],
            "tensors": sum(map(len, self.shards)),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "shards": len(self.shards),
            "largest_shard": max(self.shard_bytes),
            "finished_shards": len(self.finished),
            "disk_needed": self.disk_needed,
            "disk_free": self.disk_free,
            "memory_needed": self.memory_needed,
            "unused": list(self.unused),
            "warnings": list(self.source.warnings),
        }


def plan_conversion(
    path: str | Path,
    out: str | Path,
    format: str = "bf16",
    stacked: bool | None = None,
    max_shard_size: int | str = "5GB",
    scale_format: str | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
) -> ConversionPlan:
    """Plans `convert` with these arguments; writes nothing.

    Raises:
        CheckpointError: the checkpoint is not what its config says, or experts of different dtypes cannot be stacked.
        ValueError: an argument is wrong.
    """
    max_bytes, new_dtype = parse_size(max_shard_size), _check(format, scale_format, dtype)
    plan = plan_load(path, open_all=True)
    plan.raise_problems()
    if Path(out).exists() and Path(out).samefile(path):
        raise ValueError(f"expected another folder to write to than the checkpoint's own, got {str(out)!r}")
    stacked = plan.stacked > 0 if stacked is None else stacked
    scale_format = _scale_format(plan, scale_format)
    made = ConversionSteps(plan, format == "fp8", stacked, DTYPE_NAMES[new_dtype])
    shards = plan_shards(made.groups.values(), max_bytes)
    shard_of = {spec.name: number for number, shard in enumerate(shards) for spec in shard}
    steps: list[list[TensorStep]] = [[] for _ in shards]
    for step in made.steps:
        steps[shard_of[step.to.tensor.name]].append(step)
    unused = tuple(name for name in plan.skipped if not is_stray(name))
    if unused:
        plan.warnings.append(f"{len(unused):,} tensors of layers that config.json does not have are left out")
    options = {"format": format, "stacked": stacked, "scale_format": scale_format, "dtype": str(new_dtype)}
    manifest = {
        "source": _fingerprint(plan),
        "options": options | {"max_shard_size": max_bytes},
        "shards": shard_names(len(shards)),
    }
    return ConversionPlan(
        source=plan,
        out=Path(out),
        format=format,
        stacked=stacked,
        shards=shards,
        steps=steps,
        config=_new_config(plan, format, scale_format, new_dtype),
        block_size=made.block_size,
        scale_format=scale_format,
        unused=unused,
        manifest=manifest,
        finished=tuple(finished_shards(Path(out), manifest)),
    )


def _check(format: str, scale_format: str | None, dtype: torch.dtype | str) -> torch.dtype:
    if format not in ("bf16", "fp8"):
        raise ValueError(f"expected format 'bf16' or 'fp8', got {format!r}")
    if scale_format not in (None, "ue8m0"):
        raise ValueError(f"expected scale_format None or 'ue8m0', got {scale_format!r}")
    if scale_format and format != "fp8":
        raise ValueError(f"expected scale_format None with format {format!r}, got {scale_format!r}")
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"expected dtype to be one of {', '.join(_DTYPES)}, got {dtype!r}")
    return _DTYPES[name]


def _scale_format(plan: LoadPlan, requested: str | None) -> str | None:
    """Returns the format of new scales: the requested one, or the config's."""
    given = scale_format_of(plan.subset.source.quantization_config)
    if requested is not None and plan.scales and requested != given:
        raise ValueError(
            f"expected scale_format None (no --ue8m0) for a checkpoint that is in FP8 already, whose scales stay, got "
            f"{requested!r}"
        )
    return requested or given


def _new_config(plan: LoadPlan, format: str, scale_format: str | None, new_dtype: torch.dtype) -> dict[str, Any]:
    """Returns config.json with the two fields changed that a conversion changes."""
    config = dict(plan.config_json)
    if format == "fp8":
        given = config.get("quantization_config") or {}
        missing = {key: value for key, value in FP8_QUANTIZATION.items() if given.get(key) is None}
        scales = {"scale_fmt": scale_format} if scale_format else {}
        return config | {"quantization_config": given | missing | scales}
    config.pop("quantization_config", None)  # TRAPS E12
    if plan.scales:
        # One word for all tensors: wide enough for those that were kept and those that are new.
        config_dtype = plan.subset.source.dtype
        embedding = plan.sources["model.embed_tokens.weight"]
        old = getattr(torch, config_dtype) if config_dtype else DTYPES[embedding.dtype]
        both = str(torch.promote_types(old, new_dtype)).removeprefix("torch.")
        config["dtype" if "dtype" in config else "torch_dtype"] = both
    return config


def _fingerprint(plan: LoadPlan) -> dict[str, Any]:
    """Returns name, size, time and header of every file, and the config: with others a conversion does not go on."""
    files = {}
    for file, identity in sorted({info.file: info.identity for info in plan.tensors}.items()):
        with open_regular(file) as stream:
            header = stream.read(int.from_bytes(stream.read(8), "little"))
        files[file.name] = [identity.size, identity.mtime_ns, hashlib.sha256(header).hexdigest()]
    plan.check_unchanged()
    config = json.dumps(plan.config_json, sort_keys=True)
    return {"files": files, "config": hashlib.sha256(config.encode()).hexdigest()}
