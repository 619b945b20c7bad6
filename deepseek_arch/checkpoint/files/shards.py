"""The safetensors files of a folder: which there are by its index, and what the headers of the opened ones say."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ..problems import Problem, ProblemKind
from .reader import ShardError, TensorInfo, read_header

__all__ = ["INDEX_NAME", "Shards"]

INDEX_NAME = "model.safetensors.index.json"


class Shards:
    """The shards of a folder: those that its index names, or without one every *.safetensors.

    File names carry no meaning: published ones pad their numbers to different widths, or not at all. Neither does
    the index's `total_size`, which in some published files is not a number of bytes.

    Args:
        problems: to append what is wrong with index and files to.

    Attributes:
        tensors: the tensors of the opened shards, by name.
    """

    def __init__(self, folder: Path, problems: list[Problem]) -> None:
        self.folder, self.problems = folder, problems
        self.tensors: dict[str, TensorInfo] = {}
        self._broken: set[str] = set()
        self._opened: set[str] = set()
        weight_map = self._read_index()
        self.index = weight_map or {}
        if weight_map is None:
            self.shards = sorted(file.name for file in folder.glob("*.safetensors"))
        else:
            self.shards = sorted(set(weight_map.values()))
        if not self.shards and not any(problem.kind is ProblemKind.INDEX for problem in problems):
            problems.append(Problem(ProblemKind.SHARDS, "expected at least one *.safetensors file, found none"))

    def _read_index(self) -> dict[str, str] | None:
        """Returns the index's shard of each tensor; None without an index, or with a broken one, which is reported."""
        file = self.folder / INDEX_NAME
        if not file.is_file():
            return None
        try:
            weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
            valid = all(isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            detail = f"expected {INDEX_NAME} to hold a weight_map, got {error!r}"
            self.problems.append(Problem(ProblemKind.INDEX, detail))
            return None
        if not valid:
            detail = f"expected the weight_map of {INDEX_NAME} to name files of the folder"
            self.problems.append(Problem(ProblemKind.INDEX, detail))
            return None
        return weight_map

    @property
    def names(self) -> dict[str, None]:
        """Every tensor name that the index or an opened header mentions, in their order."""
        return dict.fromkeys([*self.index, *self.tensors])

    def open_for(self, names: Iterable[str]) -> None:
        """Reads the headers of the shards that hold these tensors: of all, if the index does not know every name."""
        names = list(names)
        if all(name in self.index for name in names):
            self._open(sorted({self.index[name] for name in names}))
        else:
            self.open_all()

    def open_all(self) -> None:
        """Reads the headers of all shards."""
        self._open(self.shards)

    def _open(self, shards: Iterable[str]) -> None:
        """Reads headers; those that cannot be read are added to the problems."""
        for shard in shards:
            if shard in self._opened:
                continue
            self._opened.add(shard)
            try:
                header = read_header(self.folder / shard)
            except ShardError as error:
                self._break(shard, str(error))
            except FileNotFoundError:
                self._break(shard, "missing")
            except OSError as error:
                self._break(shard, f"cannot be read: {error.strerror}")
            else:
                self._add(shard, header)

    def _break(self, shard: str, why: str) -> None:
        self._broken.add(shard)
        count = sum(other == shard for other in self.index.values())
        holds = f" (holds {count:,} tensors)" if count else ""
        self.problems.append(Problem(ProblemKind.SHARDS, f"{shard} {why}{holds}"))

    def _add(self, shard: str, header: dict[str, TensorInfo]) -> None:
        for name, info in header.items():
            other = self.tensors.get(name)
            named = self.index.get(name)
            if other is None or named == shard:
                self.tensors[name] = info
            elif named != other.file.name:
                detail = f"{name} in {other.file.name} and {shard}"
                self.problems.append(Problem(ProblemKind.IN_TWO_SHARDS, detail))

    def in_broken_shard(self, name: str) -> bool:
        """Returns True if the index says that `name` lies in a shard that could not be read."""
        return self.index.get(name) in self._broken

    def report_absent(self, name: str) -> None:
        """Adds a needed tensor to the problems, under the kind that explains its absence."""
        if self.in_broken_shard(name):
            return  # the shard is reported
        if name in self.index:
            detail = f"{name} (not in {self.index[name]})"
            self.problems.append(Problem(ProblemKind.ONLY_IN_INDEX, detail))
        else:
            self.problems.append(Problem(ProblemKind.MISSING, name))
