"""Tensors that a checkpoint folder holds against those that its config implies, from headers alone.

`load`, `slice_checkpoint`, `convert` and `inspect_checkpoint` start here: everything that can be wrong with names,
shapes and dtypes is known, all at once, before a tensor is read.

A layer's experts may be stored as published, one tensor each, or stacked as transformers 5 saves them with
`save_original_format=False` (`TensorSlot.stack`). Every expert's part of a stacked tensor is one run of bytes, the
bytes of the published tensor: the two layouts are two addresses of the same bytes. So a plan holds an address for each
published tensor, and its readers need not know the layout.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config.deepseek_config import DeepseekConfig, read_config
from ..config.errors import ConfigError
from ..config.json_format import MOST_JSON
from ..config.locations import explain_missing_config, explain_no_folder
from ..config.regular_file import PinnedFiles
from ..layout.parameter_map import TensorSlot, is_stray, layer_of, layout, scale_name
from ..layout.published_tensors import scale_shape
from ..layout.subset import Subset, select_subset
from .files.reader import TensorInfo
from .files.shards import Shards
from .problems import CheckpointError, Problem, ProblemKind
from .size_check import explain_far_too_few

__all__ = ["LoadPlan", "plan_load"]

_WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")
_CONFIG_NAME = "config.json"
_SCALE_DTYPES = ("F32", "F16", "BF16", "F8_E8M0", "U8")


@dataclass
class LoadPlan:
    """The tensors to read, in the order of the files, and everything else that was found.

    Attributes:
        pins: the files that were read, to find out if they are still the same; config_json: the content of one.
        slots: one for each tensor of the model.
        repeats: second copies of the embedding and head, to be compared.
        sources: published name -> where the bytes of `slots` and `repeats` are.
        scales: published name of an FP8 tensor -> where its scales are.
        stacked: number of stacked tensors that the files have in place of one tensor for each expert.
        skipped: tensors that belong to no part of any model, and MTP modules that are not loaded.
        tensors: every tensor of the opened shards, in the order of the files.
    """

    folder: Path
    subset: Subset
    pins: PinnedFiles
    config_json: dict[str, Any]
    slots: list[TensorSlot] = field(default_factory=list)
    repeats: list[TensorSlot] = field(default_factory=list)
    sources: dict[str, TensorInfo] = field(default_factory=dict)
    scales: dict[str, TensorInfo] = field(default_factory=dict)
    stacked: int = 0
    skipped: list[str] = field(default_factory=list)
    tensors: list[TensorInfo] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def nbytes(self, slot: TensorSlot) -> int:
        """Bytes of the rows of a tensor that are read, without its scales."""
        full = slot.shape[0]
        return self.sources[slot.name].nbytes * slot.rows // full if full else 0

    @property
    def fp8_parameters(self) -> set[str]:
        """The model's parameters that can stay in FP8: what the published layout has in FP8, and these files too."""
        return {slot.parameter for slot in self.slots if slot.fp8 and slot.name in self.scales}

    @property
    def mixed_experts(self) -> list[str]:
        """Layers whose experts cannot stay in FP8, because only some of their tensors are."""
        counts: dict[str, Counter[bool]] = defaultdict(Counter)
        for slot in self.slots:
            if slot.index is not None:
                layer = slot.name.partition(".experts.")[0]
                counts[f"{layer}.experts"][slot.name in self.scales] += 1
        return [f"{name}: {n[True]} of {n.total()} tensors" for name, n in counts.items() if len(n) == 2]

    def report(self, kind: ProblemKind, *details: str) -> None:
        """Adds to the problems."""
        self.problems += [Problem(kind, detail) for detail in details]

    def check_unchanged(self) -> None:
        """Raises a CheckpointError if a file is no longer the one that was read: what was read may be a mixture."""
        changed = self.pins.changed()
        if changed:
            raise CheckpointError(self.folder, [Problem(ProblemKind.CHANGED, name) for name in changed])

    def raise_problems(self) -> None:
        """Raises a CheckpointError if there are problems, or files changed, which explains any problem."""
        self.check_unchanged()
        if self.problems:
            raise CheckpointError(self.folder, self.problems)


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
        ValueError: `path` is no checkpoint folder, its config describes no supported model, or the subset is
            impossible (see `select_subset`).
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"expected a checkpoint folder, got {str(path)!r}{explain_no_folder(path)}")
    pins = PinnedFiles(folder)
    source, config_json = _read_config(pins)
    problems: list[Problem] = []
    method = (source.quantization_config or {}).get("quant_method", "fp8")
    if method != "fp8":
        detail = f"expected quantization_config with quant_method fp8 or none, got {method!r:.200}"
        problems.append(Problem(ProblemKind.CONFIG, detail))
    shards = Shards(pins, problems)
    if open_all or not shards.index:
        shards.open_all()
    stored_mtp, warnings = _stored_mtp(source, shards, mtp)
    if shards.shards and shards.others:
        warnings.append(f"not read, since {shards.chosen_by}: {', '.join(shards.others)}")
    subset = select_subset(source, layers, experts, stored_mtp)
    plan = LoadPlan(folder, subset, pins, config_json, problems=problems, warnings=warnings)
    far_too_few = explain_far_too_few(source, shards)
    if far_too_few is None:
        _Matching(plan, shards).run()
    else:
        plan.report(ProblemKind.FAR_TOO_FEW, far_too_few)
    return plan


def _read_config(pins: PinnedFiles) -> tuple[DeepseekConfig, dict[str, Any]]:
    file = pins.folder / _CONFIG_NAME
    try:
        data = pins.read(_CONFIG_NAME, MOST_JSON) if file.is_file() else None
        text = None if data is None else data.decode("utf-8")
    except (UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{file}: expected JSON in UTF-8, got {error}") from None
    if text is None:
        raise ConfigError(explain_missing_config(pins.folder))
    return read_config(text, str(file))


def _stored_mtp(source: DeepseekConfig, shards: Shards, mtp: bool) -> tuple[bool, list[str]]:
    """Returns True to load MTP modules, and a warning if the config has some and no file has."""
    first, depths = source.num_hidden_layers, source.num_nextn_predict_layers
    if not mtp or not depths:
        return False, []
    if any(layer_of(name) in range(first, first + depths) for name in shards.names):
        return True, []
    # transformers leaves these layers out of what it saves, and keeps the number in the config.
    return False, [
        f"config.json has num_nextn_predict_layers={depths}, but the files hold no tensor of layer {first}: "
        "continuing without multi-token prediction"
    ]


class _Matching:
    """Finds the source of every tensor of the subset in the shards, and sorts all other tensors; fills `plan`."""

    def __init__(self, plan: LoadPlan, shards: Shards) -> None:
        self._plan, self._shards = plan, shards
        self._config = plan.subset.source
        self._published = list(layout(self._config))
        self._slots = {slot.name: slot for slot in layout(plan.subset)}
        self._stacks: dict[str, tuple[TensorInfo, TensorInfo | None] | None] = {}  # checked ones, by their names

    def run(self) -> None:
        plan, shards = self._plan, self._shards
        shards.open_for(self._names_to_open())
        stored = self._stored_stacks()
        plan.stacked = len(stored)
        for slot in self._slots.values():
            found = self._stacked(slot, slot.stack) if slot.stack in stored else self._single(slot)
            if found is not None:
                (plan.repeats if slot.repeats else plan.slots).append(slot)
                plan.sources[slot.name], scale = found
                if scale is not None:
                    plan.scales[slot.name] = scale
        self._sort_others(stored)
        plan.slots.sort(key=lambda slot: _position(plan.sources[slot.name]))
        plan.repeats.sort(key=lambda slot: _position(plan.sources[slot.name]))
        plan.tensors = sorted(shards.tensors.values(), key=_position)

    def _names_to_open(self) -> Iterable[str]:
        """Yields the names that the shards must be opened for; second copies only where the index has them."""
        index = self._shards.index
        for slot in self._slots.values():
            name = slot.name if slot.name in index or slot.stack not in index else slot.stack
            if slot.repeats and name not in index:
                continue
            yield name
            if scale_name(name) in index:
                yield scale_name(name)

    def _stored_stacks(self) -> set[str]:
        """Returns the names of stacked tensors that the files have, of layers that have no expert by itself."""
        names = self._shards.names
        stacked, single = set(), set()
        for slot in self._published:
            if slot.stack is not None:
                if slot.name in names:
                    single.add(slot.stack)
                elif slot.stack in names or scale_name(slot.stack) in names:
                    stacked.add(slot.stack)
        return stacked - single

    def _single(self, slot: TensorSlot) -> tuple[TensorInfo, TensorInfo | None] | None:
        """Returns a tensor that is stored by itself, and its scales; None where it is absent or does not fit."""
        if slot.repeats and slot.name not in self._shards.tensors:
            return None
        may_be_fp8 = len(slot.shape) == 2 and not slot.repeats
        has_blocks = may_be_fp8 and self._config.weight_block_size is not None
        grid = scale_shape(self._config, slot.shape) if has_blocks else None
        return self._check(slot.name, slot.shape, may_be_fp8, grid)

    def _stacked(self, slot: TensorSlot, name: str) -> tuple[TensorInfo, TensorInfo | None] | None:
        """Returns one expert's part of a stacked tensor and of its scales, as if they were stored by themselves."""
        experts, blocks = self._config.expert_sizes.routed, self._config.weight_block_size
        if name not in self._stacks:
            grid = None if blocks is None else slot.stack_shape(experts, blocks)
            self._stacks[name] = self._check(name, slot.stack_shape(experts), True, grid)
        whole = self._stacks[name]
        if whole is None:
            return None
        info, scale = whole
        return _part(info, slot, slot.name), None if scale is None else _part(scale, slot, scale_name(slot.name))

    def _check(
        self, name: str, shape: tuple[int, ...], may_be_fp8: bool, grid: tuple[int, ...] | None
    ) -> tuple[TensorInfo, TensorInfo | None] | None:
        """Returns a stored tensor and its scales if they are as they must be; else None, with the problem reported.

        Args:
            grid: the shape of the scales; None where the config has no block size.
        """
        info, report = self._shards.tensors.get(name), self._plan.report
        if info is None:
            self._shards.report_absent(name)
            return None
        if info.shape != shape:
            report(ProblemKind.SHAPE, f"{name}: expected {list(shape)}, got {list(info.shape)}")
            return None
        if info.dtype == "F8_E4M3" and may_be_fp8:
            scale = self._check_scale(info, grid)
            return None if scale is None else (info, scale)
        if info.dtype not in _WEIGHT_DTYPES:
            report(ProblemKind.DTYPE, f"{name}: expected one of {', '.join(_WEIGHT_DTYPES)}, got {info.dtype}")
            return None
        if scale_name(name) in self._shards.tensors:
            report(ProblemKind.SCALE_WITHOUT_FP8, f"{scale_name(name)} beside {info.dtype}")
        return info, None

    def _check_scale(self, tensor: TensorInfo, grid: tuple[int, ...] | None) -> TensorInfo | None:
        """Returns the scales of an FP8 tensor if they fit it; else None, with the problem reported."""
        name, report = scale_name(tensor.name), self._plan.report
        info = self._shards.tensors.get(name)
        if info is None:
            if not self._shards.in_broken_shard(name):
                report(ProblemKind.NO_SCALE, tensor.name)
        elif grid is None:
            report(ProblemKind.NO_BLOCK_SIZE, tensor.name)
        elif info.shape != grid:
            blocks = list(self._config.weight_block_size or ())
            wrong = f"expected {list(grid)} for {list(tensor.shape)} in blocks of {blocks}, got {list(info.shape)}"
            report(ProblemKind.SCALE_GRID, f"{name}: {wrong}")
        elif info.dtype not in _SCALE_DTYPES:
            report(ProblemKind.DTYPE, f"{name}: expected one of {', '.join(_SCALE_DTYPES)}, got {info.dtype}")
        else:
            return info
        return None

    def _sort_others(self, stored: set[str]) -> None:
        """Sorts the tensors that the subset does not ask for into skipped, deselected and unexpected."""
        names = self._shards.names
        known = {slot.name for slot in self._published} | stored
        needed = self._slots.keys() | {slot.stack for slot in self._slots.values()} & stored
        # A config that says 0 beside files that have such layers was written so on purpose.
        undeclared: set[int | None] = set()
        if self._config.num_nextn_predict_layers == 0:
            undeclared = {layer_of(name) for name in names if name.split(".")[3:] == ["eh_proj", "weight"]} - {None}
        first_unwanted = self._config.num_hidden_layers + self._plan.subset.config.num_nextn_predict_layers
        for name in names:
            weight = name.removesuffix(scale_name(""))
            if name in needed or (weight != name and weight in needed):
                continue
            layer = layer_of(name)
            unwanted = layer is not None and layer >= first_unwanted
            if is_stray(name) or (unwanted and (weight in known or layer in undeclared)):
                self._plan.skipped.append(name)
            elif weight not in known:
                self._plan.report(ProblemKind.UNEXPECTED, name)


def _position(info: TensorInfo) -> tuple[str, int]:
    return info.file.name, info.offset


def _part(info: TensorInfo, slot: TensorSlot, name: str) -> TensorInfo:
    """Returns the part of a stacked tensor that is the published tensor of `slot`."""
    experts, rows, columns = info.shape
    nbytes = info.nbytes // (experts * slot.parts_per_expert)
    shape = (rows // slot.parts_per_expert, columns)
    return replace(info, name=name, shape=shape, offset=info.offset + slot.stack_position * nbytes, nbytes=nbytes)
