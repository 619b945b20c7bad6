"""The embedding that the first and the last stage of a pipeline share: one parameter, whose gradients are summed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .collectives import sent_bytes

__all__ = ["sum_embedding"]

PURPOSE = "shared embedding"


@contextmanager
def sum_embedding(model: Any) -> Iterator[None]:
    """Adds up, after the backward passes of a step within, the gradients of both copies of the embedding (TRAPS S21).

    Each of the two ranks sends its own to the other. Where FSDP leaves the embedding whole, since both stages are on
    this rank, the mean over data-parallel ranks is taken here. What earlier steps have left is a sum already.
    """
    embedding = model.model.embed_tokens
    parameter = None if embedding is None else embedding._parameters["weight"]
    if parameter is None or not model.meshes.stages.shares_embedding or not parameter.requires_grad:
        yield
        return
    earlier, parameter.grad = parameter.grad, None
    yield
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    grad = _local(parameter.grad)
    _sum(grad, model.meshes)
    if earlier is not None:
        grad.add_(_local(earlier))


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _sum(grad: Tensor, meshes: Any) -> None:
    plan = meshes.stages
    if plan.last_rank != 0:
        _exchange(grad, plan.last_rank, meshes.pp)
    elif meshes.layout.dp * meshes.layout.cp > 1:
        dist.all_reduce(grad, group=meshes.data)
        grad.div_(dist.get_world_size(meshes.data))


def _exchange(grad: Tensor, last: int, group: Any) -> None:
    """Adds the other rank's tensor in place; both sums are equal bit for bit."""
    other = dist.get_global_rank(group, last if dist.get_rank(group) == 0 else 0)
    mine, theirs = grad.contiguous(), torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    sent_bytes[PURPOSE] += mine.numel() * mine.element_size()
    sends = [dist.P2POp(dist.isend, mine, other, group), dist.P2POp(dist.irecv, theirs, other, group)]
    for work in dist.batch_isend_irecv(sends):
        work.wait()
    grad.add_(theirs)
