"""The safetensors files of a folder: which there are by its index, and what the headers of the opened ones say."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...config.json_format import MOST_JSON
from ...config.regular_file import PinnedFiles
from ..problems import Problem, ProblemKind
from .reader import ShardError, TensorInfo, read_header

__all__ = ["GENERATION_CONFIG_NAME", "INDEX_NAME", "Shards"]

GENERATION_CONFIG_NAME = "generation_config.json"
INDEX_NAME = "model.safetensors.index.json"
_NO_MODEL = ("adapter", "consolidated", "optimizer")  # beginnings of file names
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".h5", ".msgpack")


def _model_files(files: Sequence[str]) -> list[str]:
    """Returns those of the *.safetensors files of a folder without an index that hold its model."""
    if "model.safetensors" in files:
        return ["model.safetensors"]
    return [file for file in files if not file.startswith(_NO_MODEL)]


def _is_file_name(name: object) -> bool:
    """Returns True for the name of a file of the folder itself that a file system can hold."""
    if not isinstance(name, str) or not name or name == ".." or "\0" in name or Path(name).name != name:
        return False
    try:
        return len(name.encode("utf-8")) < 256
    except UnicodeEncodeError:  # a lone surrogate
        return False


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class Shards:
    """The shards of a folder: those that its index names.

    Without an index they are model.safetensors alone, as for transformers; without that every *.safetensors but
    adapters, optimizer states and copies in another layout ("consolidated"). Numbers in file names carry no meaning:
    published ones are padded to different widths, or not at all. Neither does the index's `total_size`, which in some
    published files is not a number of bytes.

    Args:
        pins: to read the index and note the files with.
        problems: to append what is wrong with index and files to.

    Attributes:
        tensors: the tensors of the opened shards, by name.
        others: *.safetensors files of the folder that are not among the shards, and not read.
    """

    def __init__(self, pins: PinnedFiles, problems: list[Problem]) -> None:
        folder = pins.folder
        self.folder, self.problems = folder, problems
        self.tensors: dict[str, TensorInfo] = {}
        self._broken: set[str] = set()
        self._opened: set[str] = set()
        self._pins = pins
        weight_map = self._read_index()
        self.index = weight_map or {}
        files = sorted(file.name for file in folder.glob("*.safetensors") if not file.name.startswith("."))
        self.shards = _model_files(files) if weight_map is None else sorted(set(weight_map.values()))
        self.others = [file for file in files if file not in self.shards]
        if not self.shards and not any(problem.kind is ProblemKind.INDEX for problem in problems):
            problems.append(Problem(ProblemKind.SHARDS, self._explain_none()))

    def _read_index(self) -> dict[str, str] | None:
        """Returns the index's shard of each tensor; None without an index, or with a broken one, which is reported."""
        try:
            content = self._pins.read(INDEX_NAME, MOST_JSON)
            if content is None:
                return None
            weight_map = json.loads(content)["weight_map"]
            names = set(weight_map.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            detail = f"expected {INDEX_NAME} to hold a weight_map, got {error!r:.300}"
            self.problems.append(Problem(ProblemKind.INDEX, detail))
            return None
        wrong = [name for name in names if not _is_file_name(name)]
        if wrong:
            detail = f"expected the weight_map of {INDEX_NAME} to name files of the folder, got {wrong[0]!r:.200}"
            self.problems.append(Problem(ProblemKind.INDEX, detail))
            return None
        return weight_map

    @property
    def chosen_by(self) -> str:
        """Reason why `shards` are read and `others` are not, for a message."""
        if self.index:
            return f"{INDEX_NAME} does not name them"
        return "without an index the model is in " + _some(self.shards)

    def _explain_none(self) -> str:
        """Returns what is wrong with a folder without a shard, and what to do about it."""
        detail = "expected at least one *.safetensors file, found none"
        if self.others:
            return f"{detail} of a model but {_some(self.others)}"
        found = sorted(file.name for file in self.folder.iterdir() if file.suffix in _OTHER_FORMATS)
        if not found:
            return detail
        return (
            f"{detail} but {_some(found)}; only safetensors are read: with transformers, "
            "AutoModelForCausalLM.from_pretrained(FOLDER, dtype='auto').save_pretrained(NEW) writes them"
        )

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
        for info in header.values():
            self._pins.pin(shard, info.identity)
            break
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
