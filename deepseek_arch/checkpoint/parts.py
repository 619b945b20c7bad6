"""Parts of published tensors that ranks hold: of this rank for reading, of all ranks for writing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from ..layout.parameter_map import TensorSlot, scale_name
from ..parallel.boxes import Box, copies, half_rows, local_box, local_tensor

__all__ = [
    "Entry",
    "LocalPart",
    "Piece",
    "RankBoxes",
    "entry_of",
    "local_part",
    "local_rows",
    "scale_entry",
    "scale_part",
]


class LocalPart(NamedTuple):
    """Part of a published tensor that this rank has.

    Attributes:
        target: this rank's memory of it, [rows] or [rows, columns].
        rows, columns: (first, end) in the published tensor; columns are None where it has none.
    """

    target: Tensor
    rows: tuple[int, int]
    columns: tuple[int, int] | None


class Piece(NamedTuple):
    """Part of a published tensor that some rank has; rows and columns as in `LocalPart`."""

    rank: int
    rows: tuple[int, int]
    columns: tuple[int, int] | None


class Entry(NamedTuple):
    """Place of a published tensor, or of its scales, in a state dict: rows of a parameter, or of one expert's."""

    parameter: str
    expert: int | None
    first: int
    end: int


def entry_of(slot: TensorSlot) -> Entry:
    """Returns the place of a published tensor."""
    return Entry(slot.parameter, *(slot.index or (None, 0, slot.rows)))


def scale_entry(slot: TensorSlot, block_rows: int) -> Entry:
    """Returns the place of the scales of a published tensor that stays in FP8."""
    if slot.index is None:
        return Entry(scale_name(slot.parameter), None, 0, -(-slot.rows // block_rows))
    expert, first, end = slot.index
    stacked, down = first // (end - first), -(-(end - first) // block_rows)
    return Entry(scale_name(slot.parameter), expert, stacked * down, (stacked + 1) * down)


def local_part(slot: TensorSlot, state: dict[str, Tensor]) -> LocalPart | None:
    """Returns what this rank has of a published tensor, or None."""
    return local_rows(entry_of(slot), state)


def scale_part(slot: TensorSlot, state: dict[str, Tensor], block_rows: int) -> LocalPart | None:
    """Returns what this rank has of the scales of a published tensor that stays in FP8, or None."""
    return local_rows(scale_entry(slot, block_rows), state)


def local_rows(entry: Entry, state: dict[str, Tensor]) -> LocalPart | None:
    """Returns what this rank has of an entry, or None."""
    if entry.parameter not in state:  # of another stage of a pipeline
        return None
    tensor = state[entry.parameter]
    local, box, half = local_tensor(tensor), local_box(tensor), half_rows(tensor)
    found = _rows_within(box, entry, half)
    if found is None or not local.numel():
        return None
    rows, columns = found
    if entry.expert is not None:
        local, box = local[entry.expert - box[0][0]], box[1:]
    if half:
        local, box = local.chunk(2)[entry.first // half], _of_half(box, entry, half)
    first = rows[0] + entry.first - box[0][0]
    return LocalPart(local[first : first + rows[1] - rows[0]], rows, columns)


def _of_half(box: Box, entry: Entry, half: int) -> Box:
    """Returns the rows that a rank has of gate or of up, the half of a stacked matrix that an entry is of."""
    offset = entry.first // half * half
    return (offset + box[0][0] // 2, offset + box[0][1] // 2), *box[1:]


def _rows_within(box: Box, entry: Entry, half: int) -> tuple[tuple[int, int], tuple[int, int] | None] | None:
    """Returns the rows and columns of an entry's tensor that lie in a box of its parameter, or None.

    Args:
        half: `half_rows` of the parameter.
    """
    if entry.expert is not None:
        first, end = box[0]
        if not first <= entry.expert < end:
            return None
        box = box[1:]
    if half:
        box = _of_half(box, entry, half)
    first, end = max(entry.first, box[0][0]), min(entry.end, box[0][1])
    columns = box[1] if len(box) > 1 else None
    if first >= end or (columns is not None and columns[0] >= columns[1]):
        return None
    return (first - entry.first, end - entry.first), columns


class RankBoxes:
    """Parts of one parameter on all ranks that share it, by the copies of it that there are.

    Args:
        ranks: that share it, as the copies of a plain tensor or the parts of a DTensor.
    """

    def __init__(self, tensor: Tensor, ranks: Sequence[int]) -> None:
        self._copies, self._half = list(copies(tensor, ranks)), half_rows(tensor)
        self._by_expert: list[dict[int, list[tuple[int, Box]]]] | None = None

    def pieces(self, entry: Entry) -> list[list[Piece]]:
        """Returns the pieces of an entry of this parameter, in the order of its rows, for each copy of it."""
        out = []
        for boxes in self._of_expert(entry.expert):
            found = [(rank, _rows_within(box, entry, self._half)) for rank, box in boxes]
            out.append(sorted((Piece(rank, *within) for rank, within in found if within), key=lambda p: p[1:]))
        return out

    def _of_expert(self, expert: int | None) -> Iterable[list[tuple[int, Box]]]:
        if expert is None:
            return self._copies
        if self._by_expert is None:
            self._by_expert = []
            for copy in self._copies:
                of: dict[int, list[tuple[int, Box]]] = {}
                for rank, box in copy:
                    for held in range(*box[0]):
                        of.setdefault(held, []).append((rank, box))
                self._by_expert.append(of)
        return [of.get(expert, []) for of in self._by_expert]
