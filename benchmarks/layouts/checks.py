"""Loss and gradients of every layout, in float32 on a narrow model, against one process that sees all rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

import deepseek_arch as da

from .contestants import Contestant
from .measure import gathered
from .training_run import LayoutRun, narrow_config, worst_error

__all__ = ["GRADIENT_ERROR", "LOSS_ERROR", "Check", "check_layouts"]

# Relative. float32 products in another order differ by 1e-7 each, and by what many layers make of it.
LOSS_ERROR, GRADIENT_ERROR = 1e-5, 1e-4
_TOKENS = 64  # of a row, where the layout does not need more


@dataclass(frozen=True)
class Check:
    """Agreement of a layout with one process, the worst over ranks.

    Attributes:
        loss_error, norm_error: relative errors of the loss and of the norm of all gradients.
        gradient_error, parameter: largest relative error of a parameter's gradient, and its name.
    """

    passed: bool
    loss: float
    norm: float
    loss_error: float
    norm_error: float
    gradient_error: float
    parameter: str


def check_layouts(
    config: da.DeepseekConfig,
    contestants: Sequence[Contestant],
    batch: int,
    micro_batch: int,
    sequence: int,
    device: torch.device,
) -> dict[str, Check]:
    """Returns the check of each contestant by its name; every rank calls this."""
    cp = math.lcm(*(contestant.layout.cp for contestant in contestants))  # each cuts the sequence
    options: dict[str, Any] = {"batch": batch, "sequence": min(sequence, _TOKENS * cp), "dtype": torch.float32}
    options |= {"micro_batch": micro_batch, "device": device}
    narrow = narrow_config(config)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        expected, gradients = LayoutRun(narrow, None, **options).first_gradients()
        out = {}
        for contestant in contestants:
            got, own = LayoutRun(narrow, contestant, **options).first_gradients()
            present = {name for names in gathered(list(own)) for name in names}
            error, parameter = worst_error(own, gradients, present)
            loss_error = abs(got.loss - expected.loss) / abs(expected.loss)
            norm_error = abs(got.norm - expected.norm) / expected.norm
            mine = loss_error, norm_error, error, parameter
            ranks = gathered(mine)
            worst = max(ranks, key=lambda each: each[2])
            loss_error, norm_error = max(each[0] for each in ranks), max(each[1] for each in ranks)
            passed = loss_error < LOSS_ERROR and norm_error < GRADIENT_ERROR and worst[2] < GRADIENT_ERROR
            out[contestant.name] = Check(passed, got.loss, got.norm, loss_error, norm_error, worst[2], worst[3])
            dist.barrier()
        return out
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
