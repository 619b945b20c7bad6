"""Published safetensors -> a part of them: `slice_checkpoint`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..config.argument_types import check_types
from ..layout.parameter_map import TensorSlot, layout, scale_name
from ..layout.published_tensors import TensorSpec
from .files.companions import companions
from .files.progress import progress
from .files.reader import TensorInfo, TensorReader
from .files.writer import CheckpointWriter, parse_size, plan_shards
from .finite_values import NonFinite
from .load_plan import LoadPlan, plan_load
from .save_plan import SaveReport

__all__ = ["slice_checkpoint"]

_BAND_BYTES = 64 * 2**20


@check_types
def slice_checkpoint(
    path: str | Path,
    out: str | Path,
    layers: Iterable[int] | None = None,
    experts: int | None = None,
    mtp: bool = True,
    max_shard_size: int | str = "5GB",
) -> SaveReport:
    """Writes part of a checkpoint as a checkpoint: fewer layers, fewer experts, no MTP modules.

    Tensors are copied as they are, FP8 codes and scales included, a piece at a time; the config says what is left.
    Tokenizer and other small text files come along, unless `out` has its own.

    Args:
        layers, experts, mtp: see `layout.subset.select_subset`.

    Raises:
        CheckpointError: the checkpoint is not what its config says; nothing is written.
        ValueError: an argument is wrong, or `out` is the checkpoint itself.
        OSError: the disk is full, or the folder cannot be written.
    """
    max_bytes = parse_size(max_shard_size)
    plan = plan_load(path, layers, experts, mtp)
    plan.raise_problems()
    config = plan.subset.config
    if not plan.scales:
        config = config.replace(quantization_config=None)  # left over from FP8 files (TRAPS E12)
    if Path(out).exists() and Path(out).samefile(path):
        raise ValueError(f"expected another folder to write to than the checkpoint's own, got {str(out)!r}")
    # In the order of the layers, whatever the order of the source.
    ordered = [slot for slot in layout(plan.subset) if slot.name in plan.sources]
    copies = [list(_copies(slot, plan)) for slot in ordered]
    groups = [[TensorSpec(name, info.dtype, (rows, *info.shape[1:])) for name, info, rows in group] for group in copies]
    not_finite = NonFinite()
    with (
        CheckpointWriter(out, plan_shards(groups, max_bytes)) as writer,
        TensorReader() as reader,
        progress(f"slicing {plan.folder.name}", writer.nbytes) as bar,
    ):
        for name, info, rows in (copy for group in copies for copy in group):
            row_bytes = info.nbytes // info.shape[0] if info.shape[0] else 0
            step = max(1, _BAND_BYTES // max(1, row_bytes))
            for first in range(0, rows, step):
                last = min(first + step, rows)
                values = reader.rows(info, first, last)
                not_finite.check(name, values)
                writer.write(name, values, first * row_bytes)
                bar.update((last - first) * row_bytes)
        plan.check_unchanged()
        files = writer.commit(config.to_dict(), companions(plan.folder))
    for message in plan.warnings + not_finite.warnings:
        warnings.warn(f"{plan.folder}: {message}", stacklevel=3)  # past the decorator
    quantized = sum(len(group) == 2 for group in groups)
    tensors = sum(len(group) for group in groups)
    return SaveReport(Path(out), config, tuple(files), tensors, writer.nbytes, quantized)


def _copies(slot: TensorSlot, plan: LoadPlan) -> Iterator[tuple[str, TensorInfo, int]]:
    """Yields the new name, the source and the number of leading rows of a tensor, and of its scales."""
    yield slot.new_name, plan.sources[slot.name], slot.rows
    if slot.name in plan.scales:
        block_size = plan.subset.source.weight_block_size
        assert block_size is not None
        yield scale_name(slot.new_name), plan.scales[slot.name], -(-slot.rows // block_size[0])
