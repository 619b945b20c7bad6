"""Problems of a checkpoint, collected while it is compared with its config, and the error that lists them."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["CheckpointError", "Problem", "ProblemKind", "by_kind"]

_SHOWN = 10  # details of each kind in an error message
_LONGEST = 500  # characters of a detail: a file may name a tensor as it likes


class ProblemKind(StrEnum):
    """Kinds of problems; the value is their heading in an error message."""

    CHANGED = "files that changed while they were read (another process writes to the folder: try again)"
    CONFIG = "config"
    INDEX = "index"
    SHARDS = "shards"
    IN_TWO_SHARDS = "tensors in two shards"
    GENERATION_CONFIG = "generation config"
    FAR_TOO_FEW = "far fewer tensors than the config describes"
    MISSING = "missing tensors"
    ONLY_IN_INDEX = "tensors that the index names and no shard holds"
    UNEXPECTED = "unexpected tensors"
    SHAPE = "wrong shapes"
    DTYPE = "wrong dtypes"
    NO_BLOCK_SIZE = "FP8 tensors, but no quantization_config in config.json to say the block size"
    NO_SCALE = "FP8 tensors without weight_scale_inv"
    SCALE_GRID = "wrong scale grids"
    SCALE_WITHOUT_FP8 = "scales of tensors that are not FP8"
    SCALE_VALUES = "scales"
    REPEATS_DIFFER = "repeated tensors that differ"
    FP8_IN_PART = "experts that are FP8 in part, which only fp8='dequantize' loads"
    MIXED_STACK = "experts of different dtypes to be stacked"
    WRITTEN_OTHERWISE = "tensors read back otherwise than written"


class Problem(NamedTuple):
    """One thing that is wrong: its kind, and the tensor or file with what was expected and found."""

    kind: ProblemKind
    detail: str


def by_kind(problems: Iterable[Problem]) -> dict[str, list[str]]:
    """Groups problems: the heading of each kind, and the details in the order in which they were found."""
    grouped: dict[str, list[str]] = {}
    for problem in problems:
        grouped.setdefault(problem.kind.value, []).append(problem.detail)
    return grouped


class CheckpointError(ValueError):
    """A checkpoint that does not hold what its config says.

    Attributes:
        folder: of the checkpoint.
        problems: everything found, by the heading of its kind; the message shows the first few of each.
    """

    def __init__(self, folder: Path | str, problems: Iterable[Problem]) -> None:
        self.problems = by_kind(problems)
        lines = [f"cannot use the checkpoint {str(folder)!r}:"]
        for kind, details in self.problems.items():
            more = f"; and {len(details) - _SHOWN:,} more" if len(details) > _SHOWN else ""
            shown = (detail if len(detail) <= _LONGEST else f"{detail[:_LONGEST]}..." for detail in details[:_SHOWN])
            lines.append(f"  {kind} ({len(details):,}): {'; '.join(shown)}{more}")
        super().__init__("\n".join(lines))
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        each = [Problem(ProblemKind(kind), detail) for kind, details in self.problems.items() for detail in details]
        return type(self), (self.folder, each)
