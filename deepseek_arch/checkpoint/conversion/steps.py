"""From the tensors of one checkpoint to those of another, one by one: what is done to each, and where it goes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...layout.parameter_map import TensorSlot, is_stray, layer_of, layout, scale_name
from ...layout.published_tensors import DTYPE_BYTES, TensorSpec, model_weights, mtp_weights
from ...quant.fp8_blocks import FP8_QUANTIZATION, block_grid
from ..files.reader import TensorInfo
from ..load_plan import LoadPlan
from ..problems import CheckpointError, Problem, ProblemKind

__all__ = ["ByteRange", "ConversionSteps", "TensorStep"]


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
        name: its published name; part: of the model, as `published_tensors` says.
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
        """Bytes of the source and its scales."""
        return self.source.nbytes + (0 if self.scale is None else self.scale.nbytes)

    @property
    def bytes_written(self) -> int:
        """Bytes of the result and its scales."""
        return self.to.nbytes + (0 if self.scale_to is None else self.scale_to.nbytes)


class ConversionSteps:
    """Steps that turn every tensor of a checkpoint into one of another format or layout.

    FP8 codes move together with their scales or not at all (TRAPS E11). What is no projection keeps its bytes (TRAPS
    E7, C2), and so does everything that has the format already. Rotary tables that nothing reads (TRAPS H2) come
    along: what was in the old files is in the new ones.

    Args:
        new_dtype: of what is dequantized, in safetensors' notation.

    Attributes:
        steps: in the order of the layers.
        groups: tensors of the new files that share a shard: a weight and its scales.

    Raises:
        CheckpointError: experts of different dtypes cannot be stacked, or a stray tensor has an unknown dtype.
    """

    def __init__(self, plan: LoadPlan, fp8: bool, stacked: bool, new_dtype: str) -> None:
        self.steps: list[TensorStep] = []
        self.groups: dict[str, list[TensorSpec]] = {}
        config = plan.subset.source
        rows, columns = config.weight_block_size or FP8_QUANTIZATION["weight_block_size"]
        self.block_size: tuple[int, int] = (rows, columns)
        self._plan, self._fp8, self._stacked, self._new_dtype = plan, fp8, stacked, new_dtype
        self._problems: list[Problem] = []
        self._parts = {weight.name: weight.part for weight in (*model_weights(config, mtp=True), *mtp_weights(config))}

        for slot in layout(plan.subset):
            if slot.name in plan.sources:
                self._add(slot)
        for info in sorted(plan.tensors, key=lambda info: info.name):
            if is_stray(info.name):
                self._add_stray(info)
        if self._problems:
            raise CheckpointError(plan.folder, self._problems)

    def _add(self, slot: TensorSlot) -> None:
        info, scale = self._plan.sources[slot.name], self._plan.scales.get(slot.name)
        part = self._part(slot)
        if scale is not None and self._fp8:
            codes_to = self._place(slot, info.dtype)
            scale_to = self._place(slot, scale.dtype, scales=True)
            self.steps.append(TensorStep(slot.name, part, "copy", info, codes_to))
            self.steps.append(TensorStep(scale_name(slot.name), "FP8 scales", "copy", scale, scale_to))
        elif scale is not None:
            to = self._place(slot, self._new_dtype)
            self.steps.append(TensorStep(slot.name, part, "dequantize", info, to, scale=scale))
        elif slot.fp8 and self._fp8:
            codes_to, scale_to = self._place(slot, "F8_E4M3"), self._place(slot, "F32", scales=True)
            self.steps.append(TensorStep(slot.name, part, "quantize", info, codes_to, scale_to=scale_to))
        else:
            self.steps.append(TensorStep(slot.name, part, "copy", info, self._place(slot, info.dtype)))

    def _add_stray(self, info: TensorInfo) -> None:
        if info.dtype not in DTYPE_BYTES:
            detail = f"{info.name}: expected one of {', '.join(DTYPE_BYTES)}, got {info.dtype}"
            self._problems.append(Problem(ProblemKind.DTYPE, detail))
            return
        spec = TensorSpec(info.name, info.dtype, info.shape)
        self.groups[info.name] = [spec]
        self.steps.append(TensorStep(info.name, "unused", "copy", info, ByteRange(spec, 0, info.nbytes)))

    def _part(self, slot: TensorSlot) -> str:
        if slot.index is not None:
            return "experts"
        name = slot.name if layer_of(slot.name) is None else slot.name.split(".", 3)[3]
        return self._parts.get(name, "duplicate")  # a head that is stored although it is tied

    def _place(self, slot: TensorSlot, dtype: str, scales: bool = False) -> ByteRange:
        """Returns where a weight goes, or its scales; adds the new tensor to its group."""
        name, position, shape = slot.name, 0, slot.shape
        if scales:
            shape = block_grid(slot.shape, self.block_size)
        nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
        if self._stacked and slot.stack is not None:
            experts = self._plan.subset.source.expert_sizes.routed
            name, position = slot.stack, slot.stack_position
            shape = slot.stack_shape(experts, self.block_size if scales else None)
        spec = TensorSpec(scale_name(name) if scales else name, dtype, shape)
        group = self.groups.setdefault(name, [])
        stored = next((other for other in group if other.name == spec.name), None)
        if stored is None:
            group.append(spec)
        elif stored != spec:
            detail = f"{slot.name}: expected {stored.dtype} as the first of {spec.name}, got {dtype}"
            self._problems.append(Problem(ProblemKind.MIXED_STACK, detail))
        return ByteRange(spec, position * nbytes, nbytes)
