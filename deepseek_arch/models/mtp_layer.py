"""Multi-token-prediction module (V3 report, section 2.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..attention.key_selection import KeySelection
from ..config.argument_types import check_types
from ..config.deepseek_config import DeepseekConfig
from ..layers.linear import Linear
from ..layers.norm import RMSNorm
from ..layers.rope import Rotation
from ..moe.routing import Routing
from .main_model import DecoderLayer

__all__ = ["MTPLayer"]


class SharedHead(nn.Module):
    """The module's own final norm; the head behind it is the main model's (TRAPS F6)."""

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = RMSNorm(hidden_size, eps, device=device, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalizes [B, T, H]."""
        return self.norm(hidden)


@check_types
class MTPLayer(DecoderLayer):
    """MTP module `depth` (from 0): decoder layer `num_hidden_layers + depth` of the published files.

    The embedding and the head are the main model's and no parameters of this module.
    """

    def __init__(
        self,
        config: DeepseekConfig,
        depth: int = 0,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(config, config.num_hidden_layers + depth, **factory)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, bias=False, **factory)
        self.shared_head = SharedHead(config.hidden_size, config.rms_norm_eps, **factory)

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        next_embeddings: Tensor,
        rope: Rotation,
        mask: Tensor | None = None,
        cache: Any | None = None,
        routing: Routing | None = None,
        selection: KeySelection | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs one step of the causal chain.

        Args:
            hidden: [B, T, H], h_i of the main model or of the module before.
            next_embeddings: [B, T, H], the embedding of the token `depth + 1` after position i.
            rope, mask, cache, routing, selection: as for the decoder layers; positions are those of h_i (TRAPS F4).

        Returns:
            The block's output [B, T, H], and the same after `shared_head.norm`, from which the main model's head makes
            the logits of the token `depth + 2` after position i.
        """
        joined = torch.cat((self.enorm(next_embeddings), self.hnorm(hidden)), dim=-1)  # [B, T, 2 H]
        hidden = super().forward(self.eh_proj(joined), rope, mask, cache, routing, selection)
        return hidden, self.shared_head(hidden)
