"""First and last steps of reading a checkpoint, on one device or a rank of many: checks, plan, model, report."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.json_format import MOST_JSON, parse_json
from ..models.allocate import check_device
from ..models.causal_lm import DeepseekLM
from ..quant.fp8_blocks import decode_scale, scale_format_of
from ..quant.fp8_convert import keep_fp8
from .files.reader import DTYPES, ShardError, TensorReader
from .files.shards import GENERATION_CONFIG_NAME
from .finite_values import NonFinite
from .load_plan import LoadPlan, plan_load
from .problems import CheckpointError, Problem, ProblemKind

__all__ = ["LoadReport", "check_arguments", "finished", "planned", "read_scales"]

_FLOATS = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class LoadReport:
    """Outcome of `load`; `model.load_report`.

    Attributes:
        loaded: tensors read into the model.
        kept: number of FP8 tensors that stayed FP8.
        dequantized: number of FP8 tensors that became `dtype`.
        cast: number of others whose dtype changed.
        aliases: second copies of the embedding and the head that were compared, and equal.
        skipped: stray tensors, and MTP modules that were left out.
        bytes_read: tensor bytes read, FP8 scales and compared copies included, headers not.
        shards: names of the files that tensors were read from.
        warnings: everything that was also passed to `warnings.warn`.
    """

    path: Path
    loaded: int = 0
    kept: int = 0
    dequantized: int = 0
    cast: int = 0
    aliases: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    bytes_read: int = 0
    seconds: float = 0.0
    shards: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{self.loaded:,} tensors from {len(self.shards)} files, {self.bytes_read:,} bytes"]
        for count, what in (
            (self.kept, "kept in FP8"),
            (self.dequantized, "dequantized from FP8"),
            (self.cast, "cast"),
            (len(self.aliases), "repeated tensors found equal"),
            (len(self.skipped), "skipped"),
            (len(self.warnings), "warnings"),
        ):
            if count:
                parts.append(f"{count:,} {what}")
        return ", ".join(parts) + f", in {self.seconds:.1f} s"


def check_arguments(device: torch.device | str, fp8: str) -> torch.device:
    """Returns the device, or raises ValueError where it is not available or `fp8` is no mode."""
    checked = check_device(device)
    if fp8 not in ("keep", "dequantize"):
        raise ValueError(f"expected fp8 'keep' or 'dequantize', got {fp8!r}")
    return checked


def planned(
    path: str | Path, dtype: torch.dtype | str | None, fp8: str, part: tuple[Iterable[int] | None, int | None, bool]
) -> tuple[LoadPlan, DeepseekLM, set[str], dict[str, Any]]:
    """Returns the plan without problems, the model without memory, its FP8 parameters, and the generation config."""
    plan = plan_load(path, *part)
    checked = _check_dtype(dtype, plan)
    fp8_parameters = plan.fp8_parameters if fp8 == "keep" else set()
    if fp8 == "keep":
        plan.report(ProblemKind.FP8_IN_PART, *plan.mixed_experts)
    generation_config = _generation_config(plan)
    plan.raise_problems()
    return plan, _build(plan, checked, fp8_parameters), fp8_parameters, generation_config


def finished(
    model: DeepseekLM,
    plan: LoadPlan,
    report: LoadReport,
    generation_config: dict[str, Any],
    bytes_read: int,
    seconds: float,
) -> DeepseekLM:
    """Warns of what was found, and returns the model in eval mode with its report."""
    report.bytes_read, report.seconds = bytes_read, seconds
    report.shards = sorted({info.file.name for info in plan.sources.values()})
    for message in report.warnings:
        warnings.warn(f"{plan.folder}: {message}", stacklevel=4)  # past `load` and its decorator
    model.load_report = report
    model.generation_config = generation_config
    return model.eval()


def _check_dtype(dtype: torch.dtype | str | None, plan: LoadPlan) -> torch.dtype:
    if dtype is None:
        if plan.config_json.get("torch_dtype") or plan.config_json.get("dtype"):
            dtype = plan.subset.source.dtype
        else:  # not the config class's default, which would round a float32 checkpoint
            embedding = plan.sources.get("model.embed_tokens.weight")
            dtype = torch.bfloat16 if embedding is None else DTYPES[embedding.dtype]
    name = str(dtype).removeprefix("torch.")
    if name not in _FLOATS:
        raise ValueError(f"expected dtype to be one of {', '.join(_FLOATS)}, got {dtype!r}")
    return _FLOATS[name]


def _generation_config(plan: LoadPlan) -> dict[str, Any]:
    """Returns the content of generation_config.json: end tokens and others, which config.json may contradict."""
    try:
        data = plan.pins.read(GENERATION_CONFIG_NAME, MOST_JSON)
        return {} if data is None else parse_json(data.decode("utf-8"))
    except (ValueError, OSError) as error:
        plan.report(ProblemKind.GENERATION_CONFIG, str(error))
        return {}


def _build(plan: LoadPlan, dtype: torch.dtype, fp8_parameters: set[str]) -> DeepseekLM:
    """Returns the model without memory, its `fp8_parameters` in FP8."""
    quantization = plan.subset.source.quantization_config if fp8_parameters else None
    config = plan.subset.config.replace(dtype=str(dtype), quantization_config=quantization)
    model = DeepseekLM(config, device="meta", dtype=dtype)
    if fp8_parameters:
        if dtype == torch.float64:
            raise ValueError("expected dtype float32, bfloat16 or float16 beside weights kept in FP8, got float64")
        assert quantization is not None and config.weight_block_size is not None
        keep_fp8(model, config.weight_block_size, fp8_parameters, scale_format_of(quantization))
    return model


def read_scales(plan: LoadPlan, reader: TensorReader, names: Container[str] | None = None) -> dict[str, Tensor]:
    """Returns the scales of all FP8 tensors, or of those named, float32, by the name of the tensor that they scale.

    Read first, since a tensor and its scales may lie in any two shards; they are 1/16384 of the elements.
    """
    scales, problems, odd = {}, [], NonFinite()
    for name, info in sorted(plan.scales.items(), key=lambda item: (item[1].file.name, item[1].offset)):
        if names is not None and name not in names:
            continue
        try:
            scales[name] = decode_scale(reader.rows(info, 0, info.shape[0])).clone()
            odd.check(info.name, scales[name])
        except ShardError:
            raise
        except ValueError as error:
            problems.append(Problem(ProblemKind.SCALE_VALUES, f"{info.name}: {error}"))
    if problems:
        raise CheckpointError(plan.folder, problems)
    plan.warnings += odd.warnings
    return scales
