"""This rank's part of a published checkpoint, read straight into the model that `parallelize` has cut.

Each rank reads the rows that it keeps, of FP8 tensors to be dequantized the rows of blocks around them, and of tensors
that are cut by columns whole rows. Beside its part it needs memory for a few dozen megabytes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..layout.parallel_layout import LayoutError, ParallelLayout
from ..layout.parameter_map import TensorSlot
from ..layout.published_tensors import bands
from ..models.causal_lm import DeepseekLM
from ..parallel.agreement import on_ranks, raise_alike
from ..parallel.boxes import allocate_parts
from ..quant.fp8_blocks import dequantize_blocks
from .files.reader import DTYPES, ShardError, TensorInfo, TensorReader, memory_of
from .finite_values import NonFinite
from .load_plan import LoadPlan
from .load_setup import LoadReport, check_arguments, finished, planned, read_scales
from .parts import LocalPart, local_part, scale_part
from .problems import CheckpointError, Problem, ProblemKind

__all__ = ["load_part"]


def load_part(
    path: str | Path,
    device: torch.device | str,
    dtype: torch.dtype | str | None,
    fp8: str,
    part: tuple[Iterable[int] | None, int | None, bool],
    layout: ParallelLayout,
    schedule: str | None = None,
    stage_layers: Sequence[int] | None = None,
    param_dtype: torch.dtype | None = None,
) -> DeepseekLM:
    """Reads this rank's part; errors are raised alike on all ranks, before memory is allocated or after the reading."""
    from ..parallel.apply import parallelize  # with torch.distributed, which loading on one device does without
    from ..parallel.pipeline import parallelize_stages

    if not on_ranks():
        raise ValueError("expected a running process group (torch.distributed.init_process_group) for layout, got none")
    started, found, error = time.perf_counter(), None, None
    try:
        device = check_arguments(device, fp8)
        found = planned(path, dtype, fp8, part)
    except Exception as raised:  # whatever it is: the others must not wait for this rank (TRAPS S4)
        error = raised
    raise_alike(error)
    assert found is not None and isinstance(device, torch.device)
    plan, model, fp8_parameters, generation_config = found
    if layout.pp > 1:
        model = parallelize_stages(model, layout, schedule, stage_layers, param_dtype)
    elif schedule is not None or stage_layers is not None:
        raise LayoutError("expected pp > 1 for schedule and stage_layers, got pp = 1")
    else:
        model = parallelize(model, layout, param_dtype)
    report, not_finite = LoadReport(plan.folder, skipped=plan.skipped, warnings=plan.warnings), NonFinite()
    with TensorReader() as reader:
        try:
            scales = read_scales(plan, reader, names_of_parts(model, plan, fp8_parameters))
            allocate_parts(model, device)
            for name, filled in fill_parts(model, plan, fp8_parameters, scales, reader, report):
                not_finite.check(name, filled)
            plan.check_unchanged()
        except ShardError as raised:
            error = CheckpointError(plan.folder, [Problem(ProblemKind.SHARDS, str(raised))])
        except Exception as raised:  # memory runs out on one rank before it does on another
            error = raised
    raise_alike(error)
    report.warnings += not_finite.warnings
    return finished(model, plan, report, generation_config, reader.bytes_read, time.perf_counter() - started)


def fill_part(
    part: LocalPart,
    source: TensorInfo,
    reader: TensorReader,
    scale: Tensor | None = None,
    block_size: tuple[int, int] = (1, 1),
) -> None:
    """Reads a part into its place: as stored and cast, or with `scale` as the values that FP8 codes mean."""
    target, whole_rows = part.target, part.columns is None or part.columns == (0, source.shape[1])
    row_bytes = source.nbytes // source.shape[0]
    as_stored = scale is None and target.dtype == DTYPES[source.dtype]
    if as_stored and whole_rows and target.device.type == "cpu" and target.is_contiguous():
        reader.read_into(source, memory_of(target), part.rows[0] * row_bytes)
        return
    columns = slice(None) if whole_rows or part.columns is None else slice(*part.columns)
    for first, end in bands(*part.rows, row_bytes, block_size[0]):
        wanted = slice(max(first, part.rows[0]), end)
        rows = reader.rows(source, first, end)
        if scale is not None:
            blocks = scale[first // block_size[0] : -(-end // block_size[0])].to(target.device)
            rows = dequantize_blocks(rows.to(target.device), blocks, block_size, target.dtype)
        own = rows[wanted.start - first : wanted.stop - first]
        out = target[wanted.start - part.rows[0] : wanted.stop - part.rows[0]]
        out.copy_(own[:, columns] if own.ndim > 1 else own)


def compare_part(part: LocalPart, source: TensorInfo, reader: TensorReader) -> bool:
    """Returns True if this rank's part equals the stored tensor's, byte for byte after the cast."""
    columns = slice(None) if part.columns is None else slice(*part.columns)
    for first, end in bands(*part.rows, source.nbytes // source.shape[0]):
        own = part.target[first - part.rows[0] : end - part.rows[0]]
        copy = reader.rows(source, first, end)[:, columns].to(own.device, own.dtype).contiguous()
        if not torch.equal(copy.view(torch.uint8), own.contiguous().view(torch.uint8)):
            return False
    return True


def fill_parts(
    model: DeepseekLM,
    plan: LoadPlan,
    fp8_parameters: set[str],
    scales: dict[str, Tensor],
    reader: TensorReader,
    report: LoadReport,
) -> list[tuple[str, Tensor]]:
    """Reads this rank's part of every tensor, in the order of the files; returns the names and parts that were read."""
    state, block_size = model.state_dict(), plan.subset.source.weight_block_size or (1, 1)
    filled = []
    for slot in plan.slots:
        part = local_part(slot, state)
        source, kept = plan.sources[slot.name], slot.parameter in fp8_parameters
        if kept and (scale := scale_part(slot, state, block_size[0])) is not None:
            columns = slice(None) if scale.columns is None else slice(*scale.columns)
            scale.target.copy_(scales[slot.name][slice(*scale.rows), columns])
        if part is None:
            continue
        if slot.name in scales and not kept:
            fill_part(part, source, reader, scales[slot.name], block_size)
            report.dequantized += 1
        else:
            fill_part(part, source, reader)
            report.kept += kept
            report.cast += part.target.dtype != DTYPES[source.dtype]
        report.loaded += 1
        filled.append((slot.name, part.target))
    different = []
    for slot in plan.repeats:
        part = local_part(slot, state)
        if part is not None and not compare_part(part, plan.sources[slot.name], reader):
            different.append(Problem(ProblemKind.REPEATS_DIFFER, f"{slot.name} is not {slot.parameter}"))
        report.aliases.append(slot.name)
    if different:
        raise CheckpointError(plan.folder, different)
    return filled


def names_of_parts(model: DeepseekLM, plan: LoadPlan, fp8_parameters: set[str]) -> set[str]:
    """Returns the published names of the FP8 tensors whose scales this rank needs."""
    state, (block_rows, _) = model.state_dict(), plan.subset.source.weight_block_size or (1, 1)

    def needs(slot: TensorSlot) -> bool:  # FSDP may give a rank scales without their codes
        if slot.parameter in fp8_parameters:
            return scale_part(slot, state, block_rows) is not None
        return local_part(slot, state) is not None

    return {slot.name for slot in plan.slots if slot.name in plan.scales and needs(slot)}
