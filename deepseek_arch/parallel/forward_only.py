"""Forward passes through a pipeline's stages, without torch's schedules, not all of which can do without backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from .stage_plan import StagePlan
from .stages import Stage

__all__ = ["run_forward"]


@torch.no_grad()
def run_forward(stages: Sequence[Stage], plan: StagePlan, like: Tensor, group: Any) -> None:
    """Runs every microbatch through the stages of all ranks, each stage one microbatch after another.

    Args:
        stages: this rank's, prepared by `Stage.begin`.
        like: hidden states of a microbatch, without values: what travels between stages.
        group: the ranks of the pipeline.
    """
    rank_of = {stage: rank for rank in range(plan.pp) for stage in plan.held(rank)}
    me, works = dist.get_rank(group), []
    kept: dict[tuple[int, int], Tensor] = {}
    for stage in stages:
        for number, part in enumerate(stage.parts):
            if stage.is_first:
                x = part.input_ids
            elif rank_of[stage.index - 1] == me:
                x = kept.pop((stage.index, number))
            else:
                x = torch.empty_like(like, device=part.input_ids.device)
                dist.recv(x, group=group, group_src=rank_of[stage.index - 1])
            x = stage(x, torch.tensor([number]))
            if stage.is_last:
                continue
            if rank_of[stage.index + 1] == me:
                kept[stage.index + 1, number] = x
            else:
                works.append((dist.isend(x, group=group, group_dst=rank_of[stage.index + 1]), x))
        for module in stage.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    for work, _ in works:
        assert work is not None
        work.wait()
