"""Published safetensors -> `DeepseekLM`: checked, streamed, exact; what is FP8 stays FP8 unless asked otherwise.

`load` compares the whole checkpoint with its config before it allocates anything, then reads each tensor once, in file
order, straight into its place in the model: beside the model itself it needs memory for a few dozen megabytes, or one
tensor.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..config.argument_types import check_types
from ..config.json_format import MOST_JSON, parse_json
from ..layout.parallel_layout import ParallelLayout
from ..layout.parameter_map import TensorSlot, scale_name
from ..models.allocate import allocate
from ..models.causal_lm import DeepseekLM
from ..quant.fp8_blocks import decode_scale, dequantize_blocks, scale_format_of
from ..quant.fp8_convert import keep_fp8
from .files.progress import progress
from .files.reader import DTYPES, ShardError, TensorInfo, TensorReader, memory_of
from .files.shards import GENERATION_CONFIG_NAME
from .finite_values import NonFinite
from .load_plan import LoadPlan, plan_load
from .problems import CheckpointError, Problem, ProblemKind

__all__ = ["LoadReport", "check_arguments", "finished", "load", "planned", "read_scales"]

_BAND_BYTES = 16 * 2**20  # what is staged at a time where bytes cannot go straight into the model
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


@check_types
def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    fp8: str = "keep",
    layers: Iterable[int] | None = None,
    experts: int | None = None,
    mtp: bool = True,
    layout: ParallelLayout | None = None,
) -> DeepseekLM:
    """Reads a checkpoint folder in the published layout, or with the experts of a layer stacked (`convert`).

    Args:
        path: a folder with config.json and safetensors: the shards of an index, or every *.safetensors.
        device: where the model goes; tensors are read straight to it.
        dtype: of the activations and of all parameters but those kept in FP8 and the router's bias, which stays
            float32. Default: the config's, or where config.json has none the embedding's.
        fp8: "keep" leaves in FP8, byte for byte, the projections and experts that are stored so, with float32 scales
            (`FP8Linear`, `FP8Experts`); the files say which, tensor by tensor. "dequantize" turns FP8 tensors into
            `dtype`, exactly but for that one rounding. Nothing else is ever made FP8.
        layers, experts, mtp: load part of the model, see `layout.subset.select_subset`. Only the bytes needed are read.
        layout: cuts the model over the ranks of the default process group, as `parallelize` does. Every rank calls
            this, and reads its own part alone; an error of one is raised on all.

    Returns:
        The model in eval mode, with a `LoadReport` as `model.load_report`, and the content of generation_config.json
        ({} without one) as `model.generation_config`, which `generate` reads and `save` writes. Its config has the
        dtype of its parameters, and the checkpoint's `quantization_config` if something stayed in FP8, else none.

    Raises:
        CheckpointError: tensors are missing, unexpected, of a wrong shape or dtype; FP8 tensors lack their scales or
            have wrong or non-finite ones; with "keep", only some of a layer's experts are FP8; shards are missing,
            truncated or unreadable, or changed before the end (another process saves to the folder); repeated
            embeddings differ.
            Everything that headers and scales can tell is reported at once, before memory is allocated.
        ValueError: an argument is wrong, or the config describes no supported model.

    Warns:
        UserWarning: tensors have values that are not finite; MTP modules or other files of the folder are not read.
    """
    if layout is not None:
        from .sharded_loading import load_part  # which imports this module

        return load_part(path, device, dtype, fp8, (layers, experts, mtp), layout)
    started = time.perf_counter()
    device = check_arguments(device, fp8)
    plan, model, fp8_parameters, generation_config = planned(path, dtype, fp8, (layers, experts, mtp))
    report = LoadReport(plan.folder, skipped=plan.skipped, warnings=plan.warnings)
    total = sum(plan.nbytes(slot) for slot in (*plan.slots, *plan.repeats))
    with TensorReader() as reader, progress(f"loading {plan.folder.name}", total) as bar:
        try:
            scales = read_scales(plan, reader)
            allocate(model, device)
            _fill(model, plan, fp8_parameters, scales, reader, report, bar)
            _compare_repeats(model, plan, reader, report, bar)
        except ShardError as error:
            plan.check_unchanged()
            raise CheckpointError(plan.folder, [Problem(ProblemKind.SHARDS, str(error))]) from None
    plan.check_unchanged()
    return finished(model, plan, report, generation_config, reader.bytes_read, time.perf_counter() - started)


def check_arguments(device: torch.device | str, fp8: str) -> torch.device:
    """Returns the device, or raises ValueError where it is not available or `fp8` is no mode."""
    checked = _check_device(device)
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


def _check_device(device: torch.device | str) -> torch.device:
    try:
        checked = torch.device(device)
        torch.empty(0, device=checked)
    except (RuntimeError, AssertionError, TypeError, ImportError, AttributeError) as error:
        # ImportError is what PyTorch raises for the devices of packages that are not installed.
        raise ValueError(f"expected an available device, got {device!r}: {error}") from None
    if checked.type == "meta":
        raise ValueError("expected a device with memory, got 'meta'; DeepseekLM(config, device='meta') builds one")
    return checked


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


def _bands(rows: int, row_bytes: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Cuts `rows` into ranges of about `_BAND_BYTES`, at multiples of `multiple`."""
    step = max(1, _BAND_BYTES // max(1, row_bytes) // multiple) * multiple
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def _fill(
    model: DeepseekLM,
    plan: LoadPlan,
    fp8_parameters: set[str],
    scales: dict[str, Tensor],
    reader: TensorReader,
    report: LoadReport,
    bar: tqdm,
) -> None:
    """Reads every tensor into its place, in the order of the files."""
    state, not_finite = model.state_dict(), NonFinite()
    unfilled = set(state) - {slot.parameter for slot in plan.slots} - {scale_name(name) for name in fp8_parameters}
    # A parameter that no tensor fills would stay random: the table of names and the modules disagree.
    assert unfilled <= ({"lm_head.weight"} if model.config.tie_word_embeddings else set()), unfilled
    block_size = plan.subset.source.weight_block_size
    for slot in plan.slots:
        source, target = plan.sources[slot.name], slot.of(state)
        if slot.parameter in fp8_parameters:
            assert block_size is not None
            _fill_as_stored(target, slot, source, reader)
            slot.scale_of(state, block_size[0]).copy_(scales.pop(slot.name))
            report.kept += 1
        elif slot.name in scales:
            assert block_size is not None
            _fill_dequantized(target, slot, source, scales.pop(slot.name), block_size, reader)
            report.dequantized += 1
        else:
            _fill_as_stored(target, slot, source, reader)
            report.cast += target.dtype != DTYPES[source.dtype]
        for first, last in _bands(slot.rows, target.nbytes // max(1, slot.rows)):
            not_finite.check(slot.name, target[first:last])
        report.loaded += 1
        bar.update(plan.nbytes(slot))
    report.warnings += not_finite.warnings


def _fill_as_stored(target: Tensor, slot: TensorSlot, source: TensorInfo, reader: TensorReader) -> None:
    """Reads the rows of a tensor into `target`, cast to its dtype."""
    if target.device.type == "cpu" and target.dtype == DTYPES[source.dtype] and target.is_contiguous():
        reader.read_into(source, memory_of(target))
        return
    for first, last in _bands(slot.rows, source.nbytes // slot.shape[0]):
        target[first:last].copy_(reader.rows(source, first, last))


def _fill_dequantized(
    target: Tensor,
    slot: TensorSlot,
    source: TensorInfo,
    scale: Tensor,
    block_size: tuple[int, int],
    reader: TensorReader,
) -> None:
    """Reads the rows of an FP8 tensor into `target` as the values that codes and scales mean."""
    block_rows = block_size[0]
    for first, last in _bands(slot.rows, source.nbytes // slot.shape[0], multiple=block_rows):
        codes = reader.rows(source, first, last).to(target.device)
        part = scale[first // block_rows : -(-last // block_rows)].to(target.device)
        dequantize_blocks(codes, part, block_size, out=target[first:last])


def _compare_repeats(model: DeepseekLM, plan: LoadPlan, reader: TensorReader, report: LoadReport, bar: tqdm) -> None:
    """Checks that second copies of the embedding and the head are what the main model has (TRAPS F6)."""
    state, different = model.state_dict(), []
    for slot in plan.repeats:
        source, target = plan.sources[slot.name], slot.of(state)
        for first, last in _bands(slot.rows, source.nbytes // slot.rows):
            # Compared as bytes: equal copies are, whatever they hold.
            copy = reader.rows(source, first, last).to(target.device, target.dtype)
            if not torch.equal(copy.view(torch.uint8), target[first:last].view(torch.uint8)):
                different.append(Problem(ProblemKind.REPEATS_DIFFER, f"{slot.name} is not {slot.parameter}"))
                break
        report.aliases.append(slot.name)
        bar.update(plan.nbytes(slot))
    if different:
        raise CheckpointError(plan.folder, different)
