"""Decoding on several ranks that run the model's collectives together.

Parameters that are split over ranks (FSDP, tensor and expert parallelism) make each pass of the model a collective, so
every rank has to make as many passes, of as many MTP modules. What a rank would decide by its own clock or its own
texts is decided for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..parallel.agreement import raise_alike
from .finite_check import selecting_tensor_not_finite

__all__ = ["SharedSteps", "many_ranks"]


def many_ranks() -> bool:
    """Returns True where a process group of several ranks runs: they may share collectives, and so no clock counts."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return torch.distributed.get_world_size() > 1


class SharedSteps:
    """Number of passes, and of drafts in each, that ranks agree on.

    Ranks that hold whole models of their own, and single processes, decide for themselves.

    Args:
        model: parameters that are DTensors make its passes collectives.
    """

    def __init__(self, model: nn.Module) -> None:
        meshes = {p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")} if many_ranks() else set()
        self.shared = bool(meshes)
        only = next(iter(meshes)) if len(meshes) == 1 else None
        # Ranks of several meshes, or of one with several axes, are all those there are.
        self.group: Any = only.get_group() if only is not None and only.ndim == 1 else None
        self.data_rank = _data_rank(model) if self.shared else 0

    def generator(self, seed: int | None, device: torch.device) -> torch.Generator | None:
        """Returns the source of random numbers: without a seed the global one, or one of the ranks with the same rows.

        Ranks that compute parts of the same logits have to draw the same tokens; those with rows of their own draw
        others, as samples of one prompt on several ranks must.
        """
        if seed is None and self.shared:
            drawn: list[int] = [int(torch.randint(2**62, ()))]
            first = 0 if self.group is None else torch.distributed.get_global_rank(self.group, 0)
            torch.distributed.broadcast_object_list(drawn, src=first, group=self.group)
            seed = drawn[0] + self.data_rank
        return None if seed is None else torch.Generator(device=device).manual_seed(seed)

    def agree(self, drafts: int, done: bool, error: Exception | None = None) -> tuple[int, bool]:
        """Returns the most drafts that a rank wants in the next pass, and whether all ranks are done.

        Raises:
            Exception: on all ranks, what `raise_alike` makes of an `error` of one.
        """
        if not self.shared:
            return drafts, done
        device = torch.accelerator.current_accelerator() if torch.distributed.get_backend() == "nccl" else "cpu"
        state = torch.tensor([drafts, not done, error is not None], device=device)
        torch.distributed.all_reduce(state, torch.distributed.ReduceOp.MAX, group=self.group)
        most, running, failed = state.tolist()
        if failed:
            raise_alike(error, self.group)
        return most, not running

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Runs what this rank does by itself between two calls of `agree`: its error is raised on all ranks."""
        try:
            yield
        except Exception as error:
            if self.shared:
                self.agree(0, True, error)  # which raises
            raise

    def all_done(self, done: bool) -> bool:
        """Returns True if all ranks are done."""
        return self.agree(0, done)[1]

    def check_selection(self, model: nn.Module) -> None:
        """Raises ValueError, on every rank, where what selects experts or keys is not finite on one of them."""
        name = selecting_tensor_not_finite(model)
        found, _ = self.agree(int(name is not None), done=True)
        if found:
            raise ValueError(f"expected finite values, got NaN or infinity in {name or 'a part of another rank'}")

    def start(self, error: Exception | None, seed: int | None, alike: dict[str, Any]) -> None:
        """Checks, before anything is computed, that ranks are asked for what they can do together.

        Args:
            error: what is wrong with this rank's arguments.
            alike: arguments that have to be the same on all ranks, by name.

        Raises:
            ValueError: on every rank, where one has an error, or arguments differ, or some ranks alone have a seed, or
                those that compute parts of the same logits have different ones.
        """
        if not self.shared:
            if error is not None:
                raise error
            return
        raise_alike(error, self.group)
        gathered: list[Any] = [None] * torch.distributed.get_world_size(self.group)
        torch.distributed.all_gather_object(gathered, (self.data_rank, seed, alike), group=self.group)
        for name in alike:
            values = [other[name] for _, _, other in gathered]
            if any(value != values[0] for value in values):
                raise ValueError(f"expected the same {name} on all ranks, got {values}")
        seeds = [each for _, each, _ in gathered]
        if len({each is None for each in seeds}) > 1:
            raise ValueError(f"expected a seed on all ranks or on none, got {seeds}")
        if len({(rank, each) for rank, each, _ in gathered}) > len({rank for rank, _, _ in gathered}):
            raise ValueError(f"expected the same seed on ranks that compute parts of the same logits, got {seeds}")

    def check_prompts(self, depth: int, passes: list[int]) -> None:
        """Checks that ranks draft as many tokens, and run their prompts in as many passes, each of as many modules.

        Raises:
            ValueError: on every rank, where they would not.
        """
        if not self.shared:
            return
        gathered: list[Any] = [None] * torch.distributed.get_world_size(self.group)
        torch.distributed.all_gather_object(gathered, (depth, passes), group=self.group)
        if any(other != gathered[0] for other in gathered):
            raise ValueError(
                "expected the same mtp_depth on all ranks, and prompts that take as many passes of the model, got "
                f"{gathered} (drafts, and MTP modules after each pass): pad the prompts, or choose prefill_chunk"
            )


def _data_rank(model: nn.Module) -> int:
    """Returns the number of this rank among those with rows of their own."""
    meshes = getattr(model, "meshes", None)
    if meshes is not None:
        return torch.distributed.get_rank(meshes.data)
    from torch.distributed.fsdp import FSDPModule

    return torch.distributed.get_rank() if any(isinstance(m, FSDPModule) for m in model.modules()) else 0
