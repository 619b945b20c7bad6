"""From the tensors of one checkpoint to those of another, one by one: what is done to each, and where it goes."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from ...layout.parameter_map import TensorSlot, is_stray, layer_of, layout, scale_name
from ...layout.published_tensors import model_weights, mtp_weights
from ...quant.fp8_blocks import FP8_QUANTIZATION, block_grid
from ..files.reader import DTYPES, TensorInfo
from ..files.writer import TensorSpec
from ..load_plan import CheckpointError, LoadPlan, Problems, Read
from ..stacking import Stack, stacks

__all__ = ["ByteRange", "Routes", "TensorStep"]


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A run of bytes of a new tensor: all of it, or one expert's part of a stacked one."""

    tensor: TensorSpec
    first: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorStep:
    """One tensor of the published layout on its way from the old files to the new ones.

    Attributes:
        name: its published name; part: of the model, as `inventory` says.
        action: "copy" its bytes, "dequantize" it, or "quantize" it.
        source, to: where its bytes are, and where they go. The source may be part of a stacked tensor.
        scale: its scales, to dequantize with; scale_to: where the scales go that quantizing makes.
    """

    name: str
    part: str
    action: str
    source: TensorInfo
    to: ByteRange
    scale: TensorInfo | None = None
    scale_to: ByteRange | None = None

    @property
    def bytes_read(self) -> int:
        return self.source.nbytes + (0 if self.scale is None else self.scale.nbytes)

    @property
    def bytes_written(self) -> int:
        return self.to.nbytes + (0 if self.scale_to is None else self.scale_to.nbytes)


class Routes:
    """The way of every tensor of a checkpoint into one of another format or layout.

    FP8 codes move together with their scales or not at all (TRAPS E11). What is no projection keeps its bytes (TRAPS
    E7, C2), and so does everything that has the wanted format already. Rotary tables that nothing reads (TRAPS H2) come
    along: what was in the old files is in the new ones.

    Args:
        new_dtype: of what is dequantized, in safetensors' notation.

    Attributes:
        pieces: in the order of the layers.
        groups: tensors of the new files that share a shard: a weight and its scales.

    Raises:
        CheckpointError: experts of different dtypes cannot be stacked, or a stray tensor has an unknown dtype.
    """

    def __init__(self, plan: LoadPlan, fp8: bool, stacked: bool, new_dtype: str) -> None:
        self.pieces: list[TensorStep] = []
        self.groups: dict[str, list[TensorSpec]] = {}
        config = plan.selection.source
        rows, columns = config.weight_block_size or FP8_QUANTIZATION["weight_block_size"]
        self.block_size: tuple[int, int] = (rows, columns)
        self._fp8, self._new_dtype = fp8, new_dtype
        self._problems: Problems = defaultdict(list)
        self._stack_of: dict[str, tuple[Stack, int]] = {}
        for stack in stacks(plan.selection) if stacked else ():
            self._stack_of |= {slot.name: (stack, place) for place, slot in enumerate(stack.members)}
        self._parts = {weight.name: weight.part for weight in (*model_weights(config, mtp=True), *mtp_weights(config))}

        reads = {read.slot.name: read for read in (*plan.reads, *plan.repeats)}
        for slot in layout(plan.selection):
            if slot.name in reads:
                self._route(reads[slot.name])
        for info in sorted(plan.tensors, key=lambda info: info.name):
            if is_stray(info.name):
                self._route_stray(info)
        if self._problems:
            raise CheckpointError(plan.folder, self._problems)

    def _route(self, read: Read) -> None:
        slot, info, scale = read.slot, read.tensor, read.scale
        part = self._part(slot)
        if scale is not None and self._fp8:
            codes_to = self._place(slot, info.dtype)
            scale_to = self._place(slot, scale.dtype, scales=True)
            self.pieces.append(TensorStep(slot.name, part, "copy", info, codes_to))
            self.pieces.append(TensorStep(scale_name(slot.name), "FP8 scales", "copy", scale, scale_to))
        elif scale is not None:
            to = self._place(slot, self._new_dtype)
            self.pieces.append(TensorStep(slot.name, part, "dequantize", info, to, scale=scale))
        elif slot.fp8 and self._fp8:
            codes_to, scale_to = self._place(slot, "F8_E4M3"), self._place(slot, "F32", scales=True)
            self.pieces.append(TensorStep(slot.name, part, "quantize", info, codes_to, scale_to=scale_to))
        else:
            self.pieces.append(TensorStep(slot.name, part, "copy", info, self._place(slot, info.dtype)))

    def _route_stray(self, info: TensorInfo) -> None:
        if info.dtype not in DTYPES:
            self._problems["wrong dtypes"].append(f"{info.name}: expected one of {', '.join(DTYPES)}, got {info.dtype}")
            return
        spec = TensorSpec(info.name, info.dtype, info.shape)
        self.groups[info.name] = [spec]
        self.pieces.append(TensorStep(info.name, "unused", "copy", info, ByteRange(spec, 0, info.nbytes)))

    def _part(self, slot: TensorSlot) -> str:
        if slot.index is not None:
            return "experts"
        name = slot.name if layer_of(slot.name) is None else slot.name.split(".", 3)[3]
        return self._parts.get(name, "duplicate")  # a head that is stored although it is tied

    def _place(self, slot: TensorSlot, dtype: str, scales: bool = False) -> ByteRange:
        """Where a weight goes, or its scales."""
        name, place = slot.name, 0
        shape = block_grid(slot.shape, self.block_size) if scales else slot.shape
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        if slot.name in self._stack_of:
            stack, place = self._stack_of[slot.name]
            name, shape = stack.name, stack.scale_shape(self.block_size) if scales else stack.shape
        spec = TensorSpec(scale_name(name) if scales else name, dtype, shape)
        group = self.groups.setdefault(name, [])
        stored = next((other for other in group if other.name == spec.name), None)
        if stored is None:
            group.append(spec)
        elif stored != spec:
            self._problems["experts of different dtypes to be stacked"].append(
                f"{slot.name}: expected {stored.dtype} as the first of {spec.name}, got {dtype}"
            )
        return ByteRange(spec, place * nbytes, nbytes)
