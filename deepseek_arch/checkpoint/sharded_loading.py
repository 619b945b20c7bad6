"""This rank's part of a published checkpoint, read straight into the model that `parallelize` has cut.

Each rank reads the rows that it keeps, of FP8 tensors to be dequantized the rows of blocks around them, and of tensors
that are cut by columns whole rows. Beside its part it needs memory for a few dozen megabytes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layout.parallel_layout import ParallelLayout
from ..layout.parameter_map import TensorSlot, scale_name
from ..models.causal_lm import DeepseekLM
from ..quant.fp8_blocks import dequantize_blocks
from .files.reader import DTYPES, ShardError, TensorInfo, TensorReader, memory_of
from .finite_values import NonFinite
from .load_plan import LoadPlan
from .loading import LoadReport, check_arguments, finished, planned, read_scales
from .problems import CheckpointError, Problem, ProblemKind

__all__ = ["load_part"]

_BAND_BYTES = 16 * 2**20


class LocalPart(NamedTuple):
    """Part of a published tensor that this rank has.

    Attributes:
        target: this rank's memory of it, [rows] or [rows, columns].
        rows, columns: (first, end) in the published tensor; columns are None where it has none.
    """

    target: Tensor
    rows: tuple[int, int]
    columns: tuple[int, int] | None


def load_part(
    path: str | Path,
    device: torch.device | str,
    dtype: torch.dtype | str | None,
    fp8: str,
    part: tuple[Iterable[int] | None, int | None, bool],
    layout: ParallelLayout,
) -> DeepseekLM:
    """Reads this rank's part; errors are raised alike on all ranks, before memory is allocated or after the reading."""
    from ..parallel.apply import parallelize  # with torch.distributed, which loading on one device does without

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError("expected a running process group (torch.distributed.init_process_group) for layout, got none")
    started, folder, found, error = time.perf_counter(), Path(path), None, None
    try:
        device = check_arguments(device, fp8)
        found = planned(path, dtype, fp8, part)
    except Exception as raised:  # whatever it is: the others must not wait for this rank (TRAPS S4)
        error = raised
    raise_alike(folder, error)
    assert found is not None and isinstance(device, torch.device)
    plan, model, fp8_parameters, generation_config = found
    model = parallelize(model, layout)
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
    raise_alike(folder, error)
    report.warnings += not_finite.warnings
    return finished(model, plan, report, generation_config, reader.bytes_read, time.perf_counter() - started)


def raise_alike(folder: Path, error: Exception | None) -> None:
    """Raises on every rank what went wrong on the first one that has an error; every rank calls this.

    Raises:
        CheckpointError, ValueError: with the message of that rank, the same on all. An error of another kind is raised
            as it is where it happened, and as a RuntimeError elsewhere.
    """
    problems = [(kind, each) for kind, details in getattr(error, "problems", {}).items() for each in details]
    named = isinstance(error, ValueError | OSError)
    own = None if error is None else (problems, str(error) if named else f"{type(error).__name__}: {error}", named)
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, own)
    first = next((each for each in gathered if each is not None), None)
    if first is None:
        return
    if first[0]:
        raise CheckpointError(folder, [Problem(ProblemKind(kind), detail) for kind, detail in first[0]]) from None
    if error is not None and not named:
        raise error
    raise (ValueError if first[2] else RuntimeError)(first[1]) from None


def allocate_parts(model: nn.Module, device: torch.device) -> None:
    """Gives meta parameters and buffers memory for this rank's part, uninitialized; what was shared stays shared."""
    from torch.distributed.tensor import DTensor

    made: dict[int, Tensor] = {}
    for module in model.modules():
        kinds: tuple[Any, Any] = module._parameters, module._buffers
        for tensors in kinds:
            for name, meta in tensors.items():
                if meta is None or not meta.is_meta:
                    continue
                if id(meta) not in made:
                    part = meta.to_local() if isinstance(meta, DTensor) else meta
                    memory: Tensor = torch.empty(part.shape, dtype=part.dtype, device=device)
                    if isinstance(meta, DTensor):
                        shape, stride = meta.shape, meta.stride()
                        rest: dict[str, Any] = {"run_check": False, "shape": shape, "stride": stride}
                        memory = DTensor.from_local(memory, meta.device_mesh, meta.placements, **rest)
                    made[id(meta)] = (
                        nn.Parameter(memory, meta.requires_grad) if tensors is module._parameters else memory
                    )
                tensors[name] = made[id(meta)]


def _box(tensor: Tensor) -> list[tuple[int, int]]:
    """Returns the (first, end) of this rank's part along each dimension.

    The axis of `parallelize`'s own cut is the last of a mesh, FSDP's cut of what that leaves is before it.
    """
    box = [(0, size) for size in tensor.shape]
    if hasattr(tensor, "placements"):
        mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
        for axis, placement in reversed(list(enumerate(tensor.placements))):
            if not placement.is_replicate():
                first, end = box[placement.dim]
                step = -(-(end - first) // mesh.size(axis))
                start = min(first + step * mesh.get_local_rank(axis), end)
                box[placement.dim] = (start, min(start + step, end))
    return box


def _part(tensor: Tensor, expert: int | None, rows: tuple[int, int]) -> LocalPart | None:
    """Returns what this rank has of rows `rows` of a parameter, or of one expert's matrix in it; None for nothing."""
    local, box = tensor.to_local() if hasattr(tensor, "to_local") else tensor, _box(tensor)
    if expert is not None:
        first, end = box.pop(0)
        if not first <= expert < end:
            return None
        local = local[expert - first]
    first, end = max(rows[0], box[0][0]), min(rows[1], box[0][1])
    if first >= end or not local.numel():
        return None
    target = local[first - box[0][0] : end - box[0][0]]
    return LocalPart(target, (first - rows[0], end - rows[0]), box[1] if len(box) > 1 else None)


def local_part(slot: TensorSlot, state: dict[str, Tensor]) -> LocalPart | None:
    """Returns what this rank has of a published tensor, or None."""
    expert, first, end = slot.index or (None, 0, slot.rows)
    return _part(state[slot.parameter], expert, (first, end))


def scale_part(slot: TensorSlot, state: dict[str, Tensor], block_rows: int) -> LocalPart | None:
    """Returns what this rank has of the scales of a published tensor that stays in FP8, or None."""
    scale = state[scale_name(slot.parameter)]
    if slot.index is None:
        return _part(scale, None, (0, scale.shape[0]))
    expert, first, end = slot.index
    stacked, down = first // (end - first), -(-(end - first) // block_rows)
    return _part(scale, expert, (stacked * down, (stacked + 1) * down))


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
    for first, end in _bands(part.rows, row_bytes, block_size[0]):
        wanted = slice(max(first, part.rows[0]), min(end, part.rows[1]))
        rows = reader.rows(source, first, min(end, source.shape[0]))
        if scale is not None:
            blocks = scale[first // block_size[0] : -(-end // block_size[0])].to(target.device)
            rows = dequantize_blocks(rows.to(target.device), blocks, block_size, target.dtype)
        own = rows[wanted.start - first : wanted.stop - first]
        out = target[wanted.start - part.rows[0] : wanted.stop - part.rows[0]]
        out.copy_(own[:, columns] if own.ndim > 1 else own)


def _bands(rows: tuple[int, int], row_bytes: int, multiple: int) -> Iterator[tuple[int, int]]:
    """Cuts rows into ranges of about `_BAND_BYTES` that begin at multiples of `multiple`, the first at one before."""
    step = max(1, _BAND_BYTES // max(1, row_bytes) // multiple) * multiple
    first = rows[0] // multiple * multiple
    while first < rows[1]:
        end = min(first + step, -(-rows[1] // multiple) * multiple)
        yield first, end
        first = end


def compare_part(part: LocalPart, source: TensorInfo, reader: TensorReader) -> bool:
    """Returns True if this rank's part equals the stored tensor's, byte for byte after the cast."""
    columns = slice(None) if part.columns is None else slice(*part.columns)
    for first, end in _bands(part.rows, source.nbytes // source.shape[0], 1):
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
