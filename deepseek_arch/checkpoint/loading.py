"""Published safetensors -> `DeepseekLM`: checked, streamed, exact; what is FP8 stays FP8 unless asked otherwise.

`load` compares the whole checkpoint with its config before it allocates anything, then reads each tensor once, in file
order, straight into its place in the model: beside the model itself it needs memory for a few dozen megabytes, or one
tensor.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..config.argument_types import check_types
from ..layout.parallel_layout import ParallelLayout
from ..layout.parameter_map import TensorSlot, scale_name
from ..layout.published_tensors import bands
from ..models.allocate import allocate
from ..models.causal_lm import DeepseekLM
from ..quant.fp8_blocks import dequantize_blocks
from .files.progress import progress
from .files.reader import DTYPES, ShardError, TensorInfo, TensorReader, memory_of
from .finite_values import NonFinite
from .load_plan import LoadPlan
from .load_setup import LoadReport, check_arguments, finished, planned, read_scales
from .problems import CheckpointError, Problem, ProblemKind
from .sharded_loading import load_part

__all__ = ["LoadReport", "load"]


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
    schedule: str | None = None,
    stage_layers: Sequence[int] | None = None,
    param_dtype: torch.dtype | None = None,
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
        schedule, stage_layers: with pp > 1, of the pipeline that will run the model, as for `pipeline`.
        param_dtype: with a layout, what parameters of `dtype` are cast to for computing, as for `parallelize`.

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
        part = layers, experts, mtp
        return load_part(path, device, dtype, fp8, part, layout, schedule, stage_layers, param_dtype)
    if schedule is not None or stage_layers is not None:
        raise ValueError("expected a layout with pp > 1 for schedule and stage_layers, got none")
    if param_dtype is not None:
        raise ValueError(f"expected a layout for param_dtype {param_dtype}, got none")
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
        for first, last in bands(0, slot.rows, target.nbytes // max(1, slot.rows)):
            not_finite.check(slot.name, target[first:last])
        report.loaded += 1
        bar.update(plan.nbytes(slot))
    report.warnings += not_finite.warnings


def _fill_as_stored(target: Tensor, slot: TensorSlot, source: TensorInfo, reader: TensorReader) -> None:
    """Reads the rows of a tensor into `target`, cast to its dtype."""
    if target.device.type == "cpu" and target.dtype == DTYPES[source.dtype] and target.is_contiguous():
        reader.read_into(source, memory_of(target))
        return
    for first, last in bands(0, slot.rows, source.nbytes // slot.shape[0]):
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
    for first, last in bands(0, slot.rows, source.nbytes // slot.shape[0], multiple=block_rows):
        codes = reader.rows(source, first, last).to(target.device)
        part = scale[first // block_rows : -(-last // block_rows)].to(target.device)
        dequantize_blocks(codes, part, block_size, out=target[first:last])


def _compare_repeats(model: DeepseekLM, plan: LoadPlan, reader: TensorReader, report: LoadReport, bar: tqdm) -> None:
    """Checks that second copies of the embedding and the head are what the main model has (TRAPS F6)."""
    state, different = model.state_dict(), []
    for slot in plan.repeats:
        source, target = plan.sources[slot.name], slot.of(state)
        for first, last in bands(0, slot.rows, source.nbytes // slot.rows):
            # Compared as bytes: equal copies are, whatever they hold.
            copy = reader.rows(source, first, last).to(target.device, target.dtype)
            if not torch.equal(copy.view(torch.uint8), target[first:last].view(torch.uint8)):
                different.append(Problem(ProblemKind.REPEATS_DIFFER, f"{slot.name} is not {slot.parameter}"))
                break
        report.aliases.append(slot.name)
        bar.update(plan.nbytes(slot))
    if different:
        raise CheckpointError(plan.folder, different)
