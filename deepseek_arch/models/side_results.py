"""Results of layers beside their outputs, where layers run again in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..attention.key_selection import KeySelection
from ..moe.routing import Routing

__all__ = ["SideResults", "recomputed"]


class SideResults:
    """Routing and selected keys of one layer, apart from those of the pass until `join`.

    torch.compile accepts no change of an object from outside in a region that is recomputed. A layer therefore writes
    to objects that are made within the region, and returns them.

    Args:
        routing, selection: the pass's, or None.
    """

    def __init__(self, routing: Routing | None, selection: KeySelection | None) -> None:
        self.routing = None if routing is None else routing.separate()
        self.selection = None if selection is None else selection.separate()

    def differentiable(self, layer: int) -> tuple[Tensor, ...]:
        """Returns what was kept of a layer and is differentiated (`Routing.differentiable`), its indexer's loss too."""
        own = () if self.routing is None else self.routing.differentiable(layer)
        losses = {} if self.selection is None else self.selection.losses
        return (*own, losses[layer]) if layer in losses else own

    def join(
        self,
        routing: Routing | None,
        selection: KeySelection | None,
        layer: int = 0,
        differentiable: Sequence[Tensor] = (),
    ) -> None:
        """Adds these results to those of the pass.

        Args:
            differentiable: the tensors that the layer returned in the place of those that it kept, if it did.
        """
        if differentiable and self.selection is not None and layer in self.selection.losses:
            *differentiable, self.selection.losses[layer] = differentiable
        if self.routing is not None and routing is not None:
            if differentiable:
                self.routing.replace(layer, differentiable)
            routing.join(self.routing)
        if self.selection is not None and selection is not None:
            selection.join(self.selection)


def recomputed(module: nn.Module, *inputs: Any, routing: Routing | None, selection: KeySelection | None) -> Any:
    """Runs a decoder layer or MTP module that is run again in the backward pass, and keeps no activations of it.

    Args:
        inputs: its positional arguments up to its cache.
        routing, selection: the pass's, which get the results; no selection for a model with dense attention.
    """

    def run(*inputs: Any) -> tuple[Any, SideResults]:
        side = SideResults(routing, selection)
        chosen = () if side.selection is None else (side.selection,)
        return module(*inputs, side.routing, *chosen), side

    out, side = checkpoint(run, *inputs, use_reentrant=False)
    side.join(routing, selection)
    return out
