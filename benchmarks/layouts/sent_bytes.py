"""Bytes that a rank sends, by kind of collective: counted as PyTorch dispatches them, whoever calls them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CountedCollectives"]

# Operators of c10d: kind, place of the tensors whose bytes count, and the ring's factor for n ranks.
_ALL = {
    "allreduce_": ("all_reduce", 0, lambda n: 2 * (n - 1) / n),
    "allreduce_coalesced_": ("all_reduce", 0, lambda n: 2 * (n - 1) / n),
    "_allgather_base_": ("all_gather", 1, lambda n: n - 1),
    "allgather_": ("all_gather", 1, lambda n: n - 1),
    "allgather_into_tensor_coalesced_": ("all_gather", 1, lambda n: n - 1),
    "_reduce_scatter_base_": ("reduce_scatter", 0, lambda n: n - 1),
    "reduce_scatter_": ("reduce_scatter", 0, lambda n: n - 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 0, lambda n: n - 1),
    "alltoall_base_": ("all_to_all", 1, None),
    "alltoall_": ("all_to_all", 1, lambda n: (n - 1) / n),
    "broadcast_": ("broadcast", 0, lambda n: (n - 1) / n),
    "send": ("send", 0, lambda n: 1),
}
_FUNCTIONAL = {
    "all_reduce": ("all_reduce", lambda n: 2 * (n - 1) / n),
    "all_gather_into_tensor": ("all_gather", lambda n: n - 1),
    "reduce_scatter_tensor": ("reduce_scatter", lambda n: (n - 1) / n),
    "all_to_all_single": ("all_to_all", lambda n: (n - 1) / n),
}


class CountedCollectives(TorchDispatchMode):
    """Counts, while it is entered, the bytes this rank sends to others and the calls, by kind; rings as a ring's share.

    An all-reduce of b bytes over n ranks sends 2 b (n - 1) / n, whatever algorithm the back end takes; all-to-all and
    sends are exact.

    Attributes:
        nbytes, calls: by kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nbytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func.namespace, func._opname, args)
        return func(*args, **(kwargs or {}))

    def _count(self, namespace: str, name: str, args: Any) -> None:
        if namespace == "c10d" and name in _ALL:
            kind, place, factor = _ALL[name]
            group: Any = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
            group = dist.ProcessGroup.unbox(group)
            nbytes = _bytes_of(args[place])
            sent = _uneven(args, group) if factor is None else nbytes * factor(group.size())
        elif namespace == "_c10d_functional" and name in _FUNCTIONAL:
            kind, factor = _FUNCTIONAL[name]
            group = args[-1]  # its name, or itself
            group = dist.distributed_c10d._resolve_process_group(group) if isinstance(group, str) else group
            group = dist.ProcessGroup.unbox(group) if isinstance(group, torch.ScriptObject) else group
            sent = _bytes_of(args[0]) * factor(group.size())
        else:
            return
        self.nbytes[kind] += round(sent)
        self.calls[kind] += 1


def _bytes_of(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes_of, tensors))


def _uneven(args: Any, group: Any) -> float:
    """Bytes of an all-to-all's input for other ranks; without splits, all get the same."""
    source, splits, ranks = args[1], list(args[4]), group.size()
    if not splits:
        return _bytes_of(source) * (ranks - 1) / ranks
    row = source.element_size() * source.shape[1:].numel()
    return row * (sum(splits) - splits[group.rank()])
