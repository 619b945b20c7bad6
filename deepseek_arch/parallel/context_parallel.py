"""Context parallelism: each rank of a group computes a part of every sequence's tokens.

Rank r of n has chunks r and 2 n - 1 - r of 2 n equal ones (`cut_sequence`), so that causal attention is the same work
on each. What
travels is the compressed latent and the rotated key, kv_lora_rank + qk_rope_head_dim values a token and layer (V3: 576,
where the heads' keys and values are 32,768): each rank gathers those of all tokens and expands them itself.

Gradients of parameters are means over the ranks of the group, as over data-parallel ranks, so that what is summed over
the group for a loss has its gradient multiplied by n.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..layers.rope import Rotation
from ..models.losses import IGNORE
from ..models.main_model import check_mask, check_positions
from ..models.outputs import Places, TrunkOutput
from ..moe.routing import Routing
from .collectives import cut_sequence, gather_sequence, sent_bytes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ContextParallelAttention", "ContextParallelLM", "ContextParallelModel", "SequencePart"]

PURPOSE = "context parallel"


class SequencePart:
    """This rank's part of sequences of T tokens.

    Args:
        tokens: T.
        group: the ranks that share the sequences.

    Attributes:
        tokens: T / n, of this rank.

    Raises:
        ValueError: T is no multiple of 2 n.
    """

    def __init__(self, tokens: int, group: ProcessGroup) -> None:
        self.group, self.ranks, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        if tokens % (2 * self.ranks):
            raise ValueError(f"expected tokens in multiples of 2 x cp = {2 * self.ranks} in each row, got {tokens}")
        self.tokens = tokens // self.ranks

    def cut(self, x: Tensor, dim: int = 1) -> Tensor:
        """Returns this rank's tokens of a tensor with those of whole sequences along `dim`."""
        return cut_sequence(x, self.ranks, self.rank, dim)

    def gather(self, x: Tensor) -> Tensor:
        """Joins the ranks' parts [B, T / n, C] to [B, T, C], which all ranks then use alike."""
        return _Copies.apply(gather_sequence(x.detach(), self.group, "logits"), x, self)

    def sum(self, x: Tensor) -> Tensor:
        """Returns the sum of the ranks' values, for a loss that all of them compute."""
        return _Sum.apply(x, self.group)

    def means(self, losses: Tensor, accuracies: Tensor, targets: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns means over the targets of whole sequences, [S] each, given those over this rank's targets."""
        counts = torch.stack([(target != IGNORE).sum() for target in targets]).to(losses.device).double()
        losses, accuracies, total = self.sum(torch.stack((losses * counts, accuracies * counts, counts)))
        return (losses / total.clamp(min=1)).float(), (accuracies / total.clamp(min=1)).float()

    def mask(self, mask: Tensor | None, batch: int, device: torch.device) -> Tensor:
        """Returns the mask of this rank's queries and all keys, given that of whole sequences."""
        if mask is None:
            ends = self.cut(torch.arange(1, self.tokens * self.ranks + 1, device=device), 0).expand(batch, -1)
            return torch.stack((torch.zeros_like(ends), ends), dim=-1).int()
        return self.cut(mask, 1 if mask.ndim == 3 else 2)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.ranks = dist.get_world_size(group)
        out = x.clone(memory_format=torch.contiguous_format)
        sent_bytes["context parallel losses"] += 2 * out.numel() * out.element_size() * (ctx.ranks - 1) // ctx.ranks
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.ranks, None


class _Copies(torch.autograd.Function):
    """Passes on what has been gathered; its gradient, the same on all ranks, goes to the owners without a sum."""

    @staticmethod
    def forward(ctx: Any, gathered: Tensor, own: Tensor, part: SequencePart) -> Tensor:
        ctx.part = part
        return gathered.view_as(gathered)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        return None, ctx.part.cut(grads[0]) * ctx.part.ranks, None


class ContextParallelAttention:
    """Latent attention of this rank's queries to the keys of all ranks."""

    cp_group: ProcessGroup

    def append_to_cache(self, x: Tensor, rope: Rotation, cache: Any | None) -> tuple[Tensor, Tensor]:
        states = super().append_to_cache(x, rope, None)  # type: ignore[misc]
        joined = gather_sequence(torch.cat(states, -1), self.cp_group, PURPOSE)
        latents, keys = joined.split([state.shape[-1] for state in states], -1)
        return latents, keys

    def prefers_absorbed(self, queries: int, keys: int) -> bool:
        return False


class ContextParallelModel:
    """The main model on this rank's tokens of the given sequences."""

    cp_group: ProcessGroup

    def part_of(self, tokens: int) -> SequencePart:
        return SequencePart(tokens, self.cp_group)

    def places(
        self, valid: Tensor | None, position_ids: Tensor | None, batch: int, tokens: int, device: torch.device
    ) -> Places:
        """As the base class, with rotations and mask of this rank's tokens; documents are those of whole sequences."""
        part = self.part_of(tokens)
        rope, mask, documents = super().places(valid, position_ids, batch, tokens, device)  # type: ignore[misc]
        return Places(Rotation(part.cut(rope.cos), part.cut(rope.sin)), part.mask(mask, batch, device), documents)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any | None = None,
        inputs_embeds: Tensor | None = None,
        routing: Routing | None = None,
        selection: Any | None = None,
    ) -> TrunkOutput:
        if cache is not None:
            raise ValueError("expected no cache where sequences are cut over ranks (cp > 1), got one")
        model: Any = self
        given = model.check_tokens(input_ids, inputs_embeds)
        batch, tokens = given.shape[:2]
        part = self.part_of(tokens)
        valid = check_mask(attention_mask, given, None)
        if position_ids is not None:
            position_ids = check_positions(position_ids, given)
        places = self.places(valid, position_ids, batch, tokens, given.device)
        own = (None, part.cut(given)) if input_ids is None else (part.cut(given), None)
        x = model.run_layers(model.layers, model.embed(*own), places.rope, places.mask, None, routing, None)
        return TrunkOutput(model.norm(x), x, *places, part=part)


class ContextParallelLM:
    """A language model whose sequences are cut over ranks: routers see this rank's tokens."""

    def routing_of(
        self, tokens: Tensor | None, mask: Tensor | None, record: bool = False, replay: Any | None = None
    ) -> Routing | None:
        model: Any = self
        if record or replay is not None:
            raise ValueError("expected no recorded routing where sequences are cut over ranks (cp > 1)")
        routing = super().routing_of(tokens, mask)  # type: ignore[misc]
        if routing is None:
            return None
        if routing.capacity is not None:
            raise ValueError("expected no token dropping where sequences are cut over ranks (cp > 1)")
        part = model.model.part_of(tokens.shape[1])  # type: ignore[union-attr]
        loss = None if routing.loss is None else functools.partial(routing.loss, over=part.sum)
        valid = None if routing.valid is None else part.cut(routing.valid)
        return Routing((routing.shape[0], part.tokens), valid, loss=loss)
