"""Wiring of the multi-token-prediction modules (V3 report, section 2.2): their inputs, and what passes between them.

For a model of this package and for transformers' class around the same modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.key_selection import KeySelection
from ..cache.latent_cache import LatentCache
from ..config.deepseek_config import DeepseekConfig
from ..layers.rope import Rotation
from ..moe.routing import Routing
from .mtp_loss import mtp_losses
from .outputs import TrunkOutput
from .side_results import recomputed

__all__ = ["mtp_chain_losses", "mtp_input", "mtp_step"]


def mtp_input(main: TrunkOutput, config: DeepseekConfig) -> Tensor:
    """Returns the main model's hidden state that the first module reads, [B, T, H] (TRAPS F2)."""
    return main.hidden_states if config.mtp_input == "post_norm" else main.pre_norm


def mtp_step(
    module: nn.Module,
    config: DeepseekConfig,
    hidden: Tensor,
    embeddings: Tensor,
    rope: Rotation,
    mask: Tensor | None = None,
    cache: LatentCache | None = None,
    routing: Routing | None = None,
    *,
    depth: int = 0,
    detached: bool = False,
    recompute: bool = False,
    selection: KeySelection | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs one module.

    Args:
        module: an `MTPLayer`.
        hidden: [B, T, H], `mtp_input`, or the hidden state that the module before passed on.
        embeddings: [B, T, H], of the token `depth + 1` after each position.
        rope, mask, cache, routing: the main model's, for the same positions.
        depth: the module's number, from 0.
        detached: treats the embeddings as constants.
        recompute: runs the module again in the backward pass instead of keeping its activations.
        selection: of a model with sparse attention, gets what the module selects and the loss of its indexer.

    Returns:
        [B, T, H] for the next module (`config.mtp_chain`, TRAPS F3), and [B, T, H] for the head.
    """
    embeddings = embeddings.detach() if detached else embeddings
    if detached and getattr(module, "gradient_checkpointing", False) and torch.is_grad_enabled():
        hidden = hidden if hidden.requires_grad else hidden.detach().requires_grad_()  # for `use_reentrant=True`
    chosen: dict[str, Any] = {} if selection is None else {"selection": selection}
    if recompute:
        out = recomputed(module, hidden, embeddings, rope, mask, cache, routing=routing, selection=selection)
    else:
        out = module(hidden, embeddings, rope, mask=mask, cache=cache, routing=routing, **chosen)
    hidden, normed, *side = out
    if side:  # of a module under transformers' checkpointing
        side[0].join(routing, selection, config.num_hidden_layers + depth, side[1:])
    return normed if config.mtp_chain == "head_norm" else hidden, normed


def mtp_chain_losses(
    modules: Sequence[nn.Module] | nn.ModuleList,
    config: DeepseekConfig,
    embed: Callable[[Tensor], Tensor],
    head: nn.Module,
    main: TrunkOutput,
    input_ids: Tensor,
    labels: Tensor,
    *,
    padding: Tensor | None = None,
    routing: Routing | None = None,
    detached: bool = False,
    recompute: bool = False,
    selection: KeySelection | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the losses and accuracies of all modules, float32 [D] each; see `mtp_losses`.

    Args:
        embed: ids [B, T] -> embeddings [B, T, H], the main model's.
        head: the main model's.
        main: of the pass over the same tokens.
        input_ids, labels: int [B, T].
        padding: bool [B, T], True for padding, or None where nothing is.
        detached: trains the modules alone: the main model, its embedding and its head are constants (TRAPS F12).
        selection: as for `mtp_step`.
    """

    def run(hidden: Tensor, next_ids: Tensor, depth: int, part: Routing | None) -> tuple[Tensor, Tensor]:
        return mtp_step(
            modules[depth],
            config,
            hidden,
            embed(next_ids),
            main.rope,
            main.mask,
            routing=part,
            depth=depth,
            detached=detached,
            recompute=recompute,
            selection=selection,
        )

    return mtp_losses(
        run,
        len(modules),
        head,
        mtp_input(main, config),
        input_ids,
        labels,
        padding=padding,
        documents=main.documents,
        routing=routing,
        detached=detached,
        part=main.part,
    )
