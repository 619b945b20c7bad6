"""Cuts of FP8 weights over ranks, checked before any is read: a block of codes shares one scale and one rank.

transformers cuts codes and scales each by their own number of rows and columns. Where a cut of the codes lies inside a
block, ranks would multiply codes by another block's scales, in shapes that often fit all the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import transformers
from torch import nn
from transformers.quantizers.base import HfQuantizer

__all__ = ["StoredInFP8", "check_cuts", "check_version"]


class StoredInFP8(NamedTuple):
    """Parameters of a model that are FP8 in its files.

    Attributes:
        names: of the parameters.
        block_size: rows and columns that share a scale.
        kept: True if they stay FP8: then FSDP may cut anywhere, since it gathers codes and scales before they meet.
            Dequantized weights are cut before their codes meet their scales.
    """

    names: frozenset[str]
    block_size: tuple[int, int]
    kept: bool


def check_version(distributed_config: Any) -> None:
    """Checks that transformers can cut scales with their codes.

    Raises:
        ValueError: it is too old for that (5.17), and tensor or expert parallelism is asked for.
    """
    if getattr(distributed_config, "tp_size", 1) in (None, 1) or hasattr(HfQuantizer, "update_parallel_plan"):
        return
    raise ValueError(
        "expected a transformers whose quantizers take part in parallel plans (5.23 does) for an FP8 checkpoint under "
        f"tensor or expert parallelism, got {transformers.__version__}"
    )


def check_cuts(model: nn.Module, stored: StoredInFP8) -> None:
    """Checks that every rank's part of every FP8 weight is whole blocks.

    It looks at no rank's own part, so that all ranks raise alike.

    Args:
        model: with DTensors in place of the parameters that are cut, on the meta device.

    Raises:
        ValueError: names the weights, their sizes and the axes that cut them.
    """
    names, block_size, kept = stored
    problems = [
        f"{name} has {what}"
        for name, parameter in model.named_parameters()
        if name in names and hasattr(parameter, "placements")
        for what in _cut_blocks(name, parameter, block_size, kept)
    ]
    if problems:
        more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
        instead = "load it dequantized, or with other sizes" if kept else "keep it in FP8, or load it with other sizes"
        raise ValueError(
            f"expected FP8 weights that are cut between blocks of {block_size[0]} x {block_size[1]}, got cuts inside "
            f"blocks ({instead}): {', '.join(problems[:8])}{more}"
        )


def _cut_blocks(name: str, parameter: Any, block_size: tuple[int, int], kept: bool) -> Iterator[str]:
    axes = parameter.device_mesh.mesh_dim_names or [f"axis {i}" for i in range(parameter.device_mesh.ndim)]
    for dim, (what, block) in enumerate(zip(("rows", "columns"), block_size, strict=True), parameter.ndim - 2):
        cutting = {
            axis: parameter.device_mesh.size(i)
            for i, (axis, placement) in enumerate(zip(axes, parameter.placements, strict=True))
            if getattr(placement, "dim", None) in (dim, dim - parameter.ndim) and not (kept and "fsdp" in axis)
        }
        # Gate and up stand one above the other, and are cut each for itself.
        parts = 2 if what == "rows" and name.endswith("gate_up_proj") else 1
        size, ranks = parameter.shape[dim] // parts, math.prod(cutting.values())
        if ranks > 1 and size % (ranks * block) and not (len(cutting) == 1 and _whole_blocks(size, ranks, block)):
            cuts = " x ".join(f"{axis}={count}" for axis, count in cutting.items())
            yield f"{size} {what} over {cuts}"


def _whole_blocks(size: int, ranks: int, block: int) -> bool:
    """Returns True if equal parts of `size` hold as many blocks as equal parts of its scales."""
    return math.ceil(size / ranks) == block * math.ceil(math.ceil(size / block) / ranks)
