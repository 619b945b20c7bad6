"""Collectives with gradients, on plain tensors, which know no model. Bytes are counted as `planning` counts them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "all_to_all",
    "copy_in",
    "cut_sequence",
    "gather_last",
    "gather_sequence",
    "reduce_over",
    "sent_bytes",
    "sum_out",
]

sent_bytes: Counter[str] = Counter()
"""Bytes that this rank has sent to other ranks since it was last cleared, by purpose; an all-reduce as a ring."""

# gloo has no collectives of these (TRAPS S18): they travel as bytes.
_AS_BYTES = (torch.float8_e4m3fn, torch.int16)


def reduce_over(x: Tensor, group: Any, purpose: str, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduces `x` over the ranks of `group`, in place, and returns it."""
    ranks = dist.get_world_size(group)
    sent_bytes[purpose] += 2 * x.numel() * x.element_size() * (ranks - 1) // ranks
    dist.all_reduce(x, op, group=group)
    return x


def exchange(x: Tensor, received: list[int], sent: list[int], group: Any, purpose: str) -> Tensor:
    """Sends `sent[r]` rows of x to each rank r, in order, and returns those that came, `received[r]` from each."""
    out = x.new_empty(sum(received), *x.shape[1:])
    row = x.element_size() * x.shape[1:].numel()
    sent_bytes[purpose] += row * (sum(sent) - sent[dist.get_rank(group)])
    x = x.contiguous() if x.numel() else torch.empty_like(out[:0])  # without rows, any strides pass for contiguous
    if x.dtype in _AS_BYTES:
        dist.all_to_all_single(out.view(torch.uint8), x.view(torch.uint8), received, sent, group=group)
    else:
        dist.all_to_all_single(out, x, received, sent, group=group)
    return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, received: list[int], sent: list[int], group: Any, purpose: str) -> Tensor:
        ctx.way_back = sent, received, group, f"{purpose} backward"
        return exchange(x, received, sent, group, purpose)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return exchange(grads[0], *ctx.way_back), None, None, None, None


def all_to_all(x: Tensor, received: list[int], sent: list[int], group: Any, purpose: str) -> Tensor:
    """Exchanges rows as `exchange`; gradients take the same ways back."""
    return _AllToAll.apply(x, received, sent, group, purpose)


class _CopyIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, purpose: str) -> Tensor:
        ctx.group, ctx.purpose = group, f"{purpose} backward"
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return reduce_over(grads[0].clone(memory_format=torch.contiguous_format), ctx.group, ctx.purpose), None, None


def copy_in(x: Tensor, group: Any, purpose: str) -> Tensor:
    """Returns x, the same on all ranks, for computing a part of what is made of it: its gradients are summed."""
    return _CopyIn.apply(x, group, purpose) if torch.is_grad_enabled() and x.requires_grad else x


class _SumOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, purpose: str) -> Tensor:
        return reduce_over(x.clone(memory_format=torch.contiguous_format), group, purpose)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None


def sum_out(x: Tensor, group: Any, purpose: str) -> Tensor:
    """Returns the sum of the ranks' parts; what is made of it is the same on all ranks, and so is its gradient."""
    return _SumOut.apply(x, group, purpose)


class _GatherLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, purpose: str) -> Tensor:
        ctx.group, ranks = group, dist.get_world_size(group)
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(ranks)]
        sent_bytes[purpose] += (ranks - 1) * x.numel() * x.element_size()
        dist.all_gather(parts, x, group=group)
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        part = grads[0].chunk(dist.get_world_size(ctx.group), -1)[dist.get_rank(ctx.group)]
        return part.contiguous(), None, None


def gather_last(x: Tensor, group: Any, purpose: str) -> Tensor:
    """Joins the ranks' parts of the last dimension; the result, and its gradient, are the same on all ranks."""
    return _GatherLast.apply(x, group, purpose)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, purpose: str) -> Tensor:
        ctx.group, ctx.purpose, ranks = group, f"{purpose} backward", dist.get_world_size(group)
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(ranks)]
        sent_bytes[purpose] += (ranks - 1) * x.numel() * x.element_size()
        dist.all_gather(parts, x, group=group)
        first, second = zip(*(part.chunk(2, 1) for part in parts), strict=True)
        return torch.cat((*first, *reversed(second)), 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ranks = dist.get_world_size(ctx.group)
        parts = [cut_sequence(grads[0], ranks, rank) for rank in range(ranks)]
        mine = torch.empty_like(parts[0])
        sent_bytes[ctx.purpose] += (ranks - 1) * mine.numel() * mine.element_size()
        dist.reduce_scatter(mine, parts, group=ctx.group)
        return mine, None, None


def cut_sequence(x: Tensor, ranks: int, rank: int, dim: int = 1) -> Tensor:
    """Returns the tokens of one rank of n: chunks `rank` and `2 n - 1 - rank` of 2 n equal ones along `dim`."""
    chunks = x.chunk(2 * ranks, dim)
    return torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]), dim)


def gather_sequence(x: Tensor, group: Any, purpose: str) -> Tensor:
    """Joins the ranks' tokens [B, T / n, C], cut as by `cut_sequence`, to whole sequences [B, T, C].

    Gradients are summed at the owners.
    """
    return _GatherSequence.apply(x, group, purpose)
