"""Experts stacked into one tensor for each layer and projection: transformers 5's layout, as files hold it.

`save_pretrained(..., save_original_format=False)` writes a layer's experts as `mlp.experts.gate_up_proj` [E, 2I, H],
each expert's gate rows above its up rows, and `mlp.experts.down_proj` [E, H, I]. In FP8 their scales are
`gate_up_proj_scale_inv` [E, 2 * ceil(I / block rows), ceil(H / block columns)] and `down_proj_scale_inv`; gate and up
have a block grid each, so that no block reaches from one into the other where I is no multiple of the block.

Every expert's part of a stacked tensor is one run of bytes, the bytes of the tensor that the published layout has for
it: the two layouts are two addresses of the same bytes. So this file computes addresses, and no values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..config.deepseek_config import DeepseekConfig
from ..layout.parameter_map import TensorSlot, layout, scale_name
from ..layout.subset import Selection
from ..quant.fp8_blocks import block_grid
from .files.reader import TensorInfo
from .load_plan import WEIGHT_DTYPES, LoadPlan, Read, check_scale, plan_load

__all__ = ["Stack", "adopt_stacked", "plan_of", "stacks"]


@dataclass(frozen=True, slots=True)
class Stack:
    """A stacked tensor.

    Attributes:
        name: its name in a checkpoint.
        members: the published tensors in it, in the order of their bytes.
        parts: how many of them one expert has: 2 for gate above up.
    """

    name: str
    members: tuple[TensorSlot, ...]
    parts: int

    @property
    def scale_name(self) -> str:
        return scale_name(self.name)

    @property
    def shape(self) -> tuple[int, int, int]:
        rows, columns = self.members[0].shape
        return len(self.members) // self.parts, self.parts * rows, columns

    def scale_shape(self, block_size: tuple[int, int]) -> tuple[int, int, int]:
        down, across = block_grid(self.members[0].shape, block_size)
        return len(self.members) // self.parts, self.parts * down, across


def stacks(chosen: Selection | DeepseekConfig) -> Iterator[Stack]:
    """Every stacked tensor of a model, or of part of one, in the order of the layers."""
    found: dict[str, dict[tuple[int, int], TensorSlot]] = {}
    for slot in layout(chosen):
        if slot.index is not None:
            expert, first, _ = slot.index
            # The layer's number is the checkpoint's: a model calls its prediction layers otherwise.
            name = f"{slot.name.partition('.experts.')[0]}.experts.{slot.parameter.rpartition('.')[2]}"
            found.setdefault(name, {})[expert, first] = slot
    for name, slots in found.items():
        members = tuple(slots[key] for key in sorted(slots))
        yield Stack(name, members, parts=sum(expert == 0 for expert, _ in slots))


def plan_of(
    path: str | Path,
    layers: Iterable[int] | None = None,
    experts: int | None = None,
    mtp: bool = True,
    open_all: bool = False,
) -> LoadPlan:
    """`plan_load`, of a checkpoint whose experts may be stacked."""
    layers = None if layers is None else list(layers)
    plan = plan_load(path, layers, experts, mtp, open_all=open_all)
    if plan.problems:
        whole = plan if open_all else plan_load(path, layers, experts, mtp, open_all=True)
        if adopt_stacked(whole):
            return whole
    return plan


def adopt_stacked(plan: LoadPlan) -> int:
    """Lets a plan take experts from stacked tensors, where the files have these instead of one tensor each.

    `plan_load` knows the published names only: for it stacked tensors are unexpected, and their experts missing. Both
    problems go, and what is wrong with the stacked tensors themselves comes. A layer that has experts in both ways
    stays a problem.

    Args:
        plan: made with `open_all=True`; its reads and problems are changed.

    Returns:
        How many stacked tensors the files have, for a layer's experts each.
    """
    stored = {info.name: info for info in plan.tensors}
    unexpected = set(plan.problems.get("unexpected tensors", ()))
    wanted = {slot.name: slot for slot in layout(plan.selection)}  # with their places in the model
    explained: set[str] = set()
    found = 0
    for stack in stacks(plan.selection.source):
        names = {stack.name, stack.scale_name} & unexpected
        if not names or any(slot.name in stored for slot in stack.members):
            continue
        found += 1
        explained |= names | {slot.name for slot in stack.members}
        if any(slot.name in wanted for slot in stack.members):
            _resolve(stack, wanted, stored, unexpected, plan)
        else:
            plan.skipped += sorted(names)
    for kind in ("unexpected tensors", "missing tensors"):
        plan.problems[kind] = [name for name in plan.problems[kind] if name not in explained]
    for kind in [kind for kind, details in plan.problems.items() if not details]:
        del plan.problems[kind]
    plan.reads.sort(key=lambda read: (read.tensor.file.name, read.tensor.offset))
    return found


def _resolve(
    stack: Stack, wanted: dict[str, TensorSlot], stored: dict[str, TensorInfo], named: set[str], plan: LoadPlan
) -> None:
    """Checks a stacked tensor as `plan_load` checks a single one, and adds its experts to what is read."""
    problems, info, scale = plan.problems, stored.get(stack.name), None
    if info is None:
        if stack.name not in named:
            problems["missing tensors"].append(stack.name)
        elif "shards" not in problems:  # otherwise it may lie in a shard that is reported
            problems["tensors that the index names and no shard holds"].append(stack.name)
        return
    if info.shape != stack.shape:
        problems["wrong shapes"].append(f"{stack.name}: expected {list(stack.shape)}, got {list(info.shape)}")
        return
    if info.dtype == "F8_E4M3":
        scale = _resolve_scale(stack, stored, plan)
        if scale is None:
            return
    elif info.dtype not in WEIGHT_DTYPES:
        expected = ", ".join(("F8_E4M3", *WEIGHT_DTYPES))
        problems["wrong dtypes"].append(f"{stack.name}: expected one of {expected}, got {info.dtype}")
        return
    elif stack.scale_name in stored:
        problems["scales of tensors that are not FP8"].append(f"{stack.scale_name} beside {info.dtype}")
    for place, slot in enumerate(stack.members):
        if slot.name in wanted:
            part = None if scale is None else _part(scale, scale_name(slot.name), place, stack)
            plan.reads.append(Read(wanted[slot.name], _part(info, slot.name, place, stack), part))


def _resolve_scale(stack: Stack, stored: dict[str, TensorInfo], plan: LoadPlan) -> TensorInfo | None:
    info = stored.get(stack.scale_name)
    if info is not None:
        return check_scale(stack, info, stack.scale_shape, plan)
    plan.problems["FP8 tensors without weight_scale_inv"].append(f"{stack.name} (without {stack.scale_name})")
    return None


def _part(info: TensorInfo, name: str, place: int, stack: Stack) -> TensorInfo:
    """One published tensor inside a stacked one, as if it were stored by itself."""
    _, rows, columns = info.shape
    nbytes = info.nbytes // len(stack.members)
    return TensorInfo(name, info.dtype, (rows // stack.parts, columns), info.file, info.offset + place * nbytes, nbytes)
