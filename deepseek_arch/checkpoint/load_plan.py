"""What a checkpoint folder holds against what its config says it must hold, from the headers alone.

`load`, `slice_checkpoint` and `inspect_checkpoint` all start here: everything that can be wrong with names, shapes and
dtypes is known, all at once, before a tensor is read.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..config.deepseek_config import DeepseekConfig
from ..layout.parameter_map import TensorSlot, is_stray, layer_of, layout, scale_name
from ..layout.subset import Selection, select
from ..quant.fp8_blocks import block_grid
from .files.reader import ShardError, TensorInfo, read_header

__all__ = [
    "INDEX_NAME",
    "WEIGHT_DTYPES",
    "CheckpointError",
    "LoadPlan",
    "Problems",
    "Read",
    "check_scale",
    "plan_load",
]

INDEX_NAME = "model.safetensors.index.json"
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")
_SCALE_DTYPES = ("F32", "F16", "BF16", "F8_E8M0", "U8")
_SHOWN = 10  # names of each kind of problem in an error message

Problems = dict[str, list[str]]


class CheckpointError(ValueError):
    """A checkpoint that does not hold what its config says.

    Attributes:
        problems: everything found, by kind; the message shows the first few of each.
    """

    def __init__(self, folder: Path | str, problems: Problems) -> None:
        self.problems = {kind: list(details) for kind, details in problems.items()}
        lines = [f"cannot use the checkpoint {str(folder)!r}:"]
        for kind, details in self.problems.items():
            more = f"; and {len(details) - _SHOWN:,} more" if len(details) > _SHOWN else ""
            lines.append(f"  {kind} ({len(details):,}): {'; '.join(details[:_SHOWN])}{more}")
        super().__init__("\n".join(lines))


class Stored(Protocol):
    """A tensor as a checkpoint has it."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Read:
    """A tensor to read, and its place."""

    slot: TensorSlot
    tensor: TensorInfo
    scale: TensorInfo | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that are read, without the scales."""
        full = self.slot.shape[0]
        return self.tensor.nbytes * self.slot.rows // full if full else 0


@dataclass
class LoadPlan:
    """What to read, in file order, and what else was found.

    Attributes:
        reads: one for each tensor of the model.
        repeats: second copies of the embedding and head, to be compared.
        skipped: tensors that belong to no part of any model, and multi-token-prediction layers that are not wanted.
        tensors: every tensor of the opened shards, in file order.
    """

    folder: Path
    selection: Selection
    reads: list[Read] = field(default_factory=list)
    repeats: list[Read] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    tensors: list[TensorInfo] = field(default_factory=list)
    problems: Problems = field(default_factory=lambda: defaultdict(list))
    warnings: list[str] = field(default_factory=list)

    @property
    def fp8_reads(self) -> list[Read]:
        return [read for read in self.reads if read.scale is not None]

    @property
    def kept_parameters(self) -> set[str]:
        """The model's parameters that can stay in FP8: what the published layout has in FP8, and these files too."""
        return {read.slot.parameter for read in self.fp8_reads if read.slot.fp8}

    @property
    def mixed_experts(self) -> list[str]:
        """Layers whose experts cannot stay in FP8, because only some of their tensors are."""
        counts: dict[str, Counter[bool]] = defaultdict(Counter)
        for read in self.reads:
            if read.slot.index is not None:
                layer = read.slot.name.partition(".experts.")[0]
                counts[f"{layer}.experts"][read.scale is not None] += 1
        return [f"{name}: {n[True]} of {n.total()} tensors" for name, n in counts.items() if len(n) == 2]

    def raise_problems(self) -> None:
        if self.problems:
            raise CheckpointError(self.folder, self.problems)


class _Files:
    """The shards of a folder. The index says which there are; without one, every *.safetensors is one.

    File names carry no meaning: published ones pad their numbers to different widths, or not at all. Neither does
    the index's `total_size`, which in some published files is not a number of bytes.
    """

    def __init__(self, folder: Path, problems: Problems) -> None:
        self.folder, self.problems = folder, problems
        self.tensors: dict[str, TensorInfo] = {}
        self.broken: set[str] = set()
        self._opened: set[str] = set()
        self.weight_map = self._read_index()
        if self.weight_map is None:
            self.shards = sorted(file.name for file in folder.glob("*.safetensors"))
        else:
            self.shards = sorted(set(self.weight_map.values()))
        if not self.shards and "index" not in problems:
            problems["shards"].append("expected at least one *.safetensors file, found none")

    def _read_index(self) -> dict[str, str] | None:
        file = self.folder / INDEX_NAME
        if not file.is_file():
            return None
        try:
            weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
            plain = all(isinstance(s, str) and Path(s).name == s for s in weight_map.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.problems["index"].append(f"expected {INDEX_NAME} to hold a weight_map, got {error!r}")
            return None
        if not plain:
            self.problems["index"].append(f"expected the weight_map of {INDEX_NAME} to name files of the folder")
            return None
        return weight_map

    @property
    def names(self) -> Iterable[str]:
        """Every tensor name the index or an opened header mentions."""
        return dict.fromkeys([*(self.weight_map or ()), *self.tensors])

    def open(self, shards: Iterable[str]) -> None:
        """Reads the headers of shards; adds to the problems those that cannot be read."""
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
        self.broken.add(shard)
        held = sum(other == shard for other in (self.weight_map or {}).values())
        self.problems["shards"].append(f"{shard} {why}" + (f" (holds {held:,} tensors)" if held else ""))

    def _add(self, shard: str, header: dict[str, TensorInfo]) -> None:
        for name, info in header.items():
            other = self.tensors.get(name)
            named = (self.weight_map or {}).get(name)
            if other is None or named == shard:
                self.tensors[name] = info
            elif named != other.file.name:
                self.problems["tensors in two shards"].append(f"{name} in {other.file.name} and {shard}")

    def open_for(self, names: Iterable[str]) -> None:
        """Opens the shards that hold these tensors: all of them, if the index does not know every name."""
        if self.weight_map is None or any(name not in self.weight_map for name in names):
            self.open(self.shards)
        else:
            self.open(sorted({self.weight_map[name] for name in names}))

    def in_broken_shard(self, name: str) -> bool:
        return (self.weight_map or {}).get(name) in self.broken

    def report_absent(self, name: str) -> None:
        """Files a needed tensor under the problem that explains its absence."""
        if self.in_broken_shard(name):
            return  # the shard is reported
        if self.weight_map and name in self.weight_map:
            self.problems["tensors that the index names and no shard holds"].append(
                f"{name} (not in {self.weight_map[name]})"
            )
        else:
            self.problems["missing tensors"].append(name)


def plan_load(
    path: str | Path,
    layers: Iterable[int] | None = None,
    experts: int | None = None,
    mtp: bool = True,
    open_all: bool = False,
) -> LoadPlan:
    """Reads the config and the shards' headers and compares them; problems are collected, not raised.

    With an index only the shards that hold something needed are opened, unless `open_all`.

    Raises:
        ValueError: `path` is no checkpoint folder, its config describes no supported model, or the selection is
            impossible (see `select`).
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"expected a checkpoint folder, got {str(path)!r}")
    source = DeepseekConfig.from_pretrained(folder)
    problems: Problems = defaultdict(list)
    method = (source.quantization_config or {}).get("quant_method", "fp8")
    if method != "fp8":
        problems["config"].append(f"expected quantization_config with quant_method fp8 or none, got {method!r}")
    files = _Files(folder, problems)
    if files.weight_map is None or open_all:
        files.open(files.shards)

    warnings = []
    first, depths = source.num_hidden_layers, source.num_nextn_predict_layers
    stored_mtp = mtp and depths > 0
    if stored_mtp and not any(layer_of(name) in range(first, first + depths) for name in files.names):
        # transformers leaves these layers out of what it saves, and keeps the number in the config.
        stored_mtp = False
        warnings.append(
            f"config.json has num_nextn_predict_layers={depths}, but the files hold no tensor of layer {first}: "
            "continuing without multi-token prediction"
        )
    selection = select(source, layers, experts, stored_mtp)
    plan = LoadPlan(folder, selection, problems=problems, warnings=warnings)
    slots = {slot.name: slot for slot in layout(selection)}
    indexed = files.weight_map or {}
    optional = {slot.name for slot in slots.values() if slot.repeats and slot.name not in indexed}
    scales = [scale for name in slots if (scale := scale_name(name)) in indexed]
    files.open_for([*(name for name in slots if name not in optional), *scales])
    for slot in slots.values():
        _resolve(slot, files, plan)
    _classify_others(slots, files, plan)
    plan.reads.sort(key=lambda read: _position(read.tensor))
    plan.repeats.sort(key=lambda read: _position(read.tensor))
    plan.tensors = sorted(files.tensors.values(), key=_position)
    return plan


def _position(info: TensorInfo) -> tuple[str, int]:
    return info.file.name, info.offset


def _resolve(slot: TensorSlot, files: _Files, plan: LoadPlan) -> None:
    """Checks one tensor of the model and adds it to what is read, or to the problems."""
    problems = plan.problems
    info = files.tensors.get(slot.name)
    if info is None:
        if not slot.repeats:
            files.report_absent(slot.name)
        return
    if info.shape != slot.shape:
        problems["wrong shapes"].append(f"{slot.name}: expected {list(slot.shape)}, got {list(info.shape)}")
        return
    scale = None
    if info.dtype == "F8_E4M3" and len(slot.shape) == 2 and not slot.repeats:
        scale = _resolve_scale(slot, files, plan)
        if scale is None:
            return
    elif info.dtype not in WEIGHT_DTYPES:
        problems["wrong dtypes"].append(f"{slot.name}: expected one of {', '.join(WEIGHT_DTYPES)}, got {info.dtype}")
        return
    elif scale_name(slot.name) in files.tensors:
        problems["scales of tensors that are not FP8"].append(f"{scale_name(slot.name)} beside {info.dtype}")
    (plan.repeats if slot.repeats else plan.reads).append(Read(slot, info, scale))


def _resolve_scale(slot: TensorSlot, files: _Files, plan: LoadPlan) -> TensorInfo | None:
    info = files.tensors.get(scale_name(slot.name))
    if info is not None:
        return check_scale(slot, info, lambda block_size: block_grid(slot.shape, block_size), plan)
    if not files.in_broken_shard(scale_name(slot.name)):
        plan.problems["FP8 tensors without weight_scale_inv"].append(slot.name)
    return None


def check_scale(
    tensor: Stored, info: TensorInfo, grid_of: Callable[[tuple[int, int]], tuple[int, ...]], plan: LoadPlan
) -> TensorInfo | None:
    """The stored scales of an FP8 tensor if they fit it; else None, and the problem is in the plan.

    Args:
        tensor: what they scale, by its name and shape in the checkpoint.
        grid_of: block size -> the shape that they must have.
    """
    problems, block_size = plan.problems, plan.selection.source.weight_block_size
    if block_size is None:
        problems["FP8 tensors, but no quantization_config in config.json to say the block size"].append(tensor.name)
    elif info.shape != (grid := grid_of(block_size)):
        problems["wrong scale grids"].append(
            f"{info.name}: expected {list(grid)} for {list(tensor.shape)} in blocks of {list(block_size)}, "
            f"got {list(info.shape)}"
        )
    elif info.dtype not in _SCALE_DTYPES:
        problems["wrong dtypes"].append(f"{info.name}: expected one of {', '.join(_SCALE_DTYPES)}, got {info.dtype}")
    else:
        return info
    return None


def _classify_others(slots: dict[str, TensorSlot], files: _Files, plan: LoadPlan) -> None:
    """Sorts the tensors that the selection does not ask for into skipped, deselected and unexpected."""
    source = plan.selection.source
    known = {slot.name for slot in layout(source)}
    # A config that says 0 beside files that have such layers: a deliberate choice of whoever wrote it.
    undeclared = set()
    first_unwanted = source.num_hidden_layers + plan.selection.config.num_nextn_predict_layers
    if source.num_nextn_predict_layers == 0:
        undeclared = {layer_of(n) for n in files.names if n.split(".")[3:] == ["eh_proj", "weight"]} - {None}
    for name in files.names:
        weight = name.removesuffix("_scale_inv")
        if name in slots or (weight != name and weight in slots):
            continue
        layer = layer_of(name)
        unwanted = layer is not None and layer >= first_unwanted
        if is_stray(name) or (unwanted and (weight in known or layer in undeclared)):
            plan.skipped.append(name)
        elif weight not in known:
            plan.problems["unexpected tensors"].append(name)
