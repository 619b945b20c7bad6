"""`save` on many ranks: each writes files of its own, and what is cut within a published tensor travels to its writer.

A rank's routed experts are whole published tensors and stay where they are. Of tensors whose rows or columns are cut,
one rank that holds a piece writes all, a band of rows at a time. Ranks go through what they share in the same order,
so that no two wait for each other. The stages of a pipeline are written side by side, into one index.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..layout.parameter_map import TensorSlot, layer_of
from ..layout.published_tensors import TensorSpec, bands
from ..parallel.agreement import raise_alike
from ..parallel.boxes import is_cut
from .checked_model import CheckedModel, StoredKinds, check_model
from .files.progress import progress
from .files.shards import INDEX_NAME
from .files.shared_staging import SharedStaging
from .files.staging import CONFIG_NAME, old_weights
from .files.writer import ShardFiles, plan_shards, shard_names, write_descriptions
from .finite_values import NonFinite
from .parts import Entry, Piece, RankBoxes, entry_of, local_rows, scale_entry
from .save_plan import SavePlan, SaveReport, plan_files

__all__ = ["save_parts"]


_Made = TypeVar("_Made")


class _Stage(NamedTuple):
    """Ranks that share parameters: all of them, or those that have the same stages of a pipeline.

    Attributes:
        ranks: in order.
        pipeline: the group of one rank of each stage; None without a pipeline.
    """

    ranks: list[int]
    pipeline: dist.ProcessGroup | None

    @classmethod
    def of(cls, model: nn.Module) -> _Stage:
        """Returns this rank's."""
        meshes: Any = getattr(model, "meshes", None)
        if meshes is None or meshes.stages is None:
            return cls(list(range(dist.get_world_size())), None)
        return cls(meshes.stage_ranks, meshes.pp)

    def of_all(self, own: _Made) -> list[_Made]:
        """Returns what each stage has, where all ranks of one have the same; every rank calls this."""
        if self.pipeline is None:
            return [own]
        gathered: list[Any] = [None] * dist.get_world_size(self.pipeline)
        dist.all_gather_object(gathered, own, group=self.pipeline)
        return gathered


def save_parts(model: nn.Module, path: str | Path, fp8: bool, max_bytes: int) -> SaveReport:
    """Writes a model whose parameters or layers are spread over ranks; every rank calls this, and all raise alike."""
    stage = _Stage.of(model)
    checked = _alike(lambda: _checked(model, stage))
    kinds = StoredKinds.of_all(stage.of_all(checked.kinds))
    plan = _alike(lambda: plan_files(checked, kinds, fp8))
    return _Saving(plan, max_bytes, stage).save(path)


def _alike(make: Callable[[], _Made]) -> _Made:
    """Returns what `make` returns on this rank, and raises on all ranks what it raises on one."""
    made: list[_Made] = []
    error: Exception | None = None
    try:
        made.append(make())
    except Exception as raised:  # whatever it is: the others must not wait for this rank (TRAPS S4)
        error = raised
    raise_alike(error)
    return made[0]


def _checked(model: nn.Module, stage: _Stage) -> CheckedModel:
    """Compares a model with its config, and meshes that are not of `parallelize` with the ranks.

    Raises:
        ValueError: one does not fit the other.
    """
    checked = check_model(model, cut=True)
    state: dict[str, Any] = dict(checked.state)
    foreign = getattr(model, "meshes", None) is None
    for mesh in {tensor.device_mesh for tensor in state.values() if foreign and is_cut(tensor)}:
        if sorted(mesh.mesh.flatten().tolist()) != stage.ranks:
            raise ValueError(
                f"expected parameters on meshes of all {len(stage.ranks)} ranks, got one of {mesh.mesh.tolist()}"
            )
    return checked


class _Saving:
    """One call of `save`: who writes which tensor, and the files of this rank."""

    def __init__(self, plan: SavePlan, max_bytes: int, stage: _Stage) -> None:
        self.plan, self.rank, self._ranks = plan, dist.get_rank(), stage.ranks
        self._boxes: dict[Any, RankBoxes] = {}
        self.writers = self._choose_writers()
        each = zip(plan.slots, plan.groups, self.writers, strict=True)
        self._layers = [list(tensors) for _, tensors in groupby(each, key=lambda item: layer_of(item[0].name))]
        own: dict[int, list[list[TensorSpec]]] = {}
        for writer, group in zip(self.writers, plan.groups, strict=True):
            own.setdefault(writer, []).append(group)
        of_rank: dict[int, list[list[TensorSpec]]] = {}
        self._rounds = 0  # of errors that are looked for: all ranks together, after a layer of each stage
        for layers, groups in stage.of_all((len(self._layers), own)):
            self._rounds = max(self._rounds, layers)
            of_rank |= groups
        shards = [(rank, shard) for rank in sorted(of_rank) for shard in plan_shards(of_rank[rank], max_bytes)]
        self.names = shard_names(len(shards))
        named = list(zip(self.names, shards, strict=True))
        self.weight_map = {spec.name: name for name, (_, shard) in named for spec in shard}
        self._own = {name: shard for name, (rank, shard) in named if rank == self.rank}
        self._groups = [group for groups in of_rank.values() for group in groups]
        self.nbytes = sum(spec.nbytes for group in self._groups for spec in group)
        self.not_finite = NonFinite()

    def pieces(self, entry: Entry) -> list[list[Piece]]:
        """Returns the pieces of an entry, for each copy of it."""
        tensor: Any = self.plan.state[entry.parameter]
        cut = (tensor.device_mesh, tensor.placements) if is_cut(tensor) else ()
        key = (tensor.shape, *cut)  # the same in all layers of a kind
        if key not in self._boxes:
            self._boxes[key] = RankBoxes(tensor, self._ranks)
        return self._boxes[key].pieces(entry)

    def _choose_writers(self) -> list[int]:
        """Returns the rank that writes each slot: of those that hold some of it, the one with least to write so far."""
        filled = dict.fromkeys(self._ranks, 0)
        writers = []
        for slot, specs in zip(self.plan.slots, self.plan.groups, strict=True):
            holders = {piece.rank for copy in self.pieces(entry_of(slot)) for piece in copy}
            writer = min(holders, key=lambda rank: (filled[rank], rank))
            filled[writer] += sum(spec.nbytes for spec in specs)
            writers.append(writer)
        return writers

    def save(self, path: str | Path) -> SaveReport:
        """Writes the files, and puts them into their places."""
        plan = self.plan
        described = [INDEX_NAME, *plan.more]
        with SharedStaging(path, self.nbytes) as staging:
            files = ShardFiles(staging.path, list(self._own.values()), list(self._own))
            try:
                self._write_all(files, f"saving {staging.folder.name}")
            finally:
                files.abandon()

            def describe() -> list[str]:
                write_descriptions(staging.path, self.weight_map, self.nbytes, plan.config.to_dict(), plan.more)
                return [*self.names, *described, CONFIG_NAME]

            staging.commit(describe, old_weights)
        for message in self.not_finite.warnings:
            warnings.warn(f"{path}: {message}", stacklevel=5)  # past `save` and its decorator
        files_of_all = [Path(path) / name for name in (*self.names, *described, CONFIG_NAME)]
        return plan.report(path, files_of_all, self._groups)

    def _write_all(self, files: ShardFiles, title: str) -> None:
        """Writes this rank's tensors; an error ends all ranks after the layer in which it happened."""
        error: Exception | None = None
        try:
            files.start_shards()
        except Exception as raised:
            error = raised
        raise_alike(error)
        with progress(title, files.nbytes) as bar:
            for number in range(self._rounds):
                for slot, specs, writer in self._layers[number] if number < len(self._layers) else ():
                    error = self._write(slot, specs, writer, files, error) or error
                    bar.update(sum(spec.nbytes for spec in specs) if writer == self.rank else 0)
                raise_alike(error)
        try:
            files.complete()
        except Exception as raised:
            error = raised
        raise_alike(error)

    def _write(
        self, slot: TensorSlot, specs: list[TensorSpec], writer: int, files: ShardFiles, error: Exception | None
    ) -> Exception | None:
        """Sends this rank's pieces of one published tensor, or writes it, unless there was an error; returns a new one.

        After an error the pieces still travel: the other ranks wait for them.
        """
        plan, values, scales = self.plan, _Travelling(self, entry_of(slot), writer), None
        multiple = (plan.config.weight_block_size or (1, 1))[0] if len(specs) == 2 else 1
        if plan.has_codes(slot):
            multiple = plan.fp8_weights.block_size[0]
            entry = scale_entry(slot, multiple)
            scales = _Travelling(self, entry, writer).rows(0, entry.end - entry.first)
        for first, end in bands(0, slot.rows, values.row_bytes, multiple):
            rows = values.rows(first, end)
            if rows is None or error is not None:
                continue
            try:
                blocks = None if scales is None else scales[first // multiple : -(-end // multiple)]
                for spec, tensor in zip(specs, plan.written(slot, specs, rows, blocks), strict=True):
                    self.not_finite.check(spec.name, tensor)
                    start = first if spec is specs[0] else first // multiple
                    files.write(spec.name, tensor, start * (spec.nbytes // spec.shape[0]))
            except Exception as raised:
                error = raised
        return error


class _Travelling:
    """An entry of the state dict on its way to the rank that writes it."""

    def __init__(self, saving: _Saving, entry: Entry, writer: int) -> None:
        self.rank, self.writer = saving.rank, writer
        copies = saving.pieces(entry)
        # The copy that the writer has a piece of; scales of few rows may lie on other ranks than their codes.
        self.pieces = next((copy for copy in copies if any(piece.rank == writer for piece in copy)), copies[0])
        tensor = saving.plan.state[entry.parameter]
        matrix = tensor.ndim - (entry.expert is not None) > 1
        self.dtype, self.columns = tensor.dtype, (tensor.shape[-1],) if matrix else ()
        self.row_bytes = tensor.element_size() * (tensor.shape[-1] if matrix else 1)
        involved = any(piece.rank == self.rank for piece in self.pieces)
        self.mine = local_rows(entry, saving.plan.state) if involved else None

    def rows(self, first: int, end: int) -> Tensor | None:
        """Returns rows on the rank that writes them, and None on the others, which send what they have of them."""
        here = self.rank == self.writer
        if here and len(self.pieces) == 1 and self.mine is not None:
            return self.mine.target[first:end].detach()
        out = torch.empty(end - first, *self.columns, dtype=self.dtype, device=_device()) if here else None
        for piece in self.pieces:
            top, bottom = max(first, piece.rows[0]), min(end, piece.rows[1])
            if top >= bottom or self.rank not in (piece.rank, self.writer):
                continue
            part = self._part(top, bottom, piece)
            if out is None:
                dist.send(part.view(torch.uint8), self.writer)
                continue
            if piece.rank != self.rank:
                dist.recv(part.view(torch.uint8), piece.rank)
            target = out[top - first : bottom - first]
            (target if piece.columns is None else target[:, slice(*piece.columns)]).copy_(part)
        return out

    def _part(self, top: int, bottom: int, piece: Piece) -> Tensor:
        """Returns this rank's rows of a piece, or memory for those of another rank."""
        if piece.rank == self.rank:
            assert self.mine is not None
            start = self.mine.rows[0]
            return self.mine.target[top - start : bottom - start].detach().to(_device()).contiguous()
        columns = () if piece.columns is None else (piece.columns[1] - piece.columns[0],)
        return torch.empty(bottom - top, *columns, dtype=self.dtype, device=_device())


def _device() -> torch.device:
    """Returns the device whose memory the process group sends."""
    found = torch.accelerator.current_accelerator() if dist.get_backend() == "nccl" else None
    return torch.device("cpu") if found is None else found
