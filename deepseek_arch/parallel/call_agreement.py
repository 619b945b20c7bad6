"""Agreement of ranks on a pass of the model, before its first collective: errors are raised on all (TRAPS S4).

Ranks of one replica compute a pass together. Where one refuses its arguments, or has other tokens than those that it
computes parts of, the others would wait for it, or join what does not belong together. One sum of a few integers over
the ranks tells all of them. What only computing shows, such as memory that runs out, remains the error of one rank.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..models.causal_lm import DeepseekLM
from ..models.main_model import check_mask, check_positions
from .agreement import raise_alike

__all__ = ["AgreesOnCalls", "agree_on_call", "fingerprint"]

_RANGE = 2**20  # of fingerprints: the sum of their squares over all ranks is below 2**63


def fingerprint(tensors: Sequence[Tensor | None], settings: Sequence[Any] = ()) -> Tensor:
    """Returns a number that tells different arguments apart but for one pair in a million; int64, without a wait.

    Args:
        tensors: of integers or bools, on one device; floating-point ones count by their shape.
        settings: of any type with a short text.
    """
    device = next((tensor.device for tensor in tensors if tensor is not None), torch.device("cpu"))
    total = torch.zeros((), dtype=torch.int64, device=device)
    for number, tensor in enumerate(tensors):
        if tensor is None:
            continue
        shape = hash((number, *tensor.shape)) % _RANGE
        total = total + shape
        if not tensor.is_floating_point():
            places = torch.arange(1, tensor.numel() + 1, device=tensor.device) * (2654435761 + 2 * number)
            total = total + ((tensor.flatten().long() + 101) * places % 1000003).sum()
    for number, setting in enumerate(settings):
        total = total + sum(byte * (number + 7) ** (place % 5) for place, byte in enumerate(str(setting).encode()))
    return total % _RANGE


def agree_on_call(meshes: Any, error: Exception | None, mark: Tensor, counts: Tensor, group: Any = None) -> Tensor:
    """Adds up the ranks' counts, once all of them have tokens that fit together.

    Args:
        meshes: of the model.
        error: what is wrong with this rank's arguments.
        mark: their `fingerprint`; anything with an error.
        counts: int64 [n], of this rank.
        group: of the ranks; None for all.

    Returns:
        int64 [n] on the CPU.

    Raises:
        ValueError: on all ranks, where one has an error (`raise_alike`), or where ranks that compute parts of the same
            sequences have different arguments.
    """
    layout, device = meshes.layout, counts.device
    shared = layout.pp * layout.cp * layout.tp
    marks = torch.zeros(layout.dp if shared > 1 else 0, 2, dtype=torch.int64, device=device)
    if shared > 1 and error is None:
        marks[dist.get_rank(meshes.data) // layout.cp] = torch.stack((mark, mark * mark)).to(device)
    failed = counts.new_tensor([int(error is not None)])
    summed = torch.cat((failed, counts, marks.flatten()))
    dist.all_reduce(summed, group=group)
    summed = summed.cpu()
    if int(summed[0]):
        raise_alike(error, group)
    # Equal numbers, and no others, have n times the sum of their squares equal to the square of their sum.
    pairs = summed[1 + len(counts) :].view(-1, 2).tolist()
    different = [row for row, (total, squares) in enumerate(pairs) if shared * squares != total * total]
    if different and dist.get_backend(group) != "fake":  # which adds nothing up
        raise ValueError(
            f"expected the same arguments on the {shared} ranks (pp x cp x tp) that compute parts of the same "
            f"sequences, got different ones for data-parallel parts {different[:10]}"
        )
    return summed[1 : 1 + len(counts)]


class AgreesOnCalls:
    """A language model whose passes all ranks begin, or none.

    Passes with a cache, and those of MTP modules alone, are steps of `generate`, which has its own agreement.
    """

    @functools.wraps(DeepseekLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        decodes = given.get("cache") is not None or given.get("mtp_step") is not None
        if not (decodes or torch.compiler.is_compiling()):
            self._agree(given)
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def _agree(self, given: dict[str, Any]) -> None:
        model: Any = self
        error, mark = None, torch.zeros((), dtype=torch.int64)
        try:
            mark = _check(model, given)
        except Exception as raised:  # whatever it is: the others must not wait for this rank
            error = raised
        group = None if model.training and torch.is_grad_enabled() else model.meshes.replica
        with_labels = int(given.get("labels") is not None)
        counts = torch.tensor([1, with_labels], device=model.meshes.dense.device_type)
        ranks, labelled = agree_on_call(model.meshes, error, mark, counts, group).tolist()
        if len(model.mtp) and 0 < labelled < ranks:
            raise ValueError(
                f"expected labels on all {ranks} ranks or on none, since MTP modules run with them, got {labelled}"
            )


_ARGUMENTS = DeepseekLM.forward.__code__.co_varnames[1 : DeepseekLM.forward.__code__.co_argcount]


def _check(model: Any, given: dict[str, Any]) -> Tensor:
    """Raises what `forward` would raise before it computes anything, and returns the arguments' fingerprint."""
    ids, embeds, labels, mask = (given.get(n) for n in ("input_ids", "inputs_embeds", "labels", "attention_mask"))
    positions = given.get("position_ids")
    flags = {"record_routing": given.get("record_routing", False), "return_logits": given.get("return_logits", True)}
    model.check_options(ids if embeds is None else embeds, given.get("logits_to_keep", 0), labels, **flags)
    tokens = model.model.check_tokens(ids, embeds)
    check_mask(mask, tokens, None)
    if positions is not None:
        check_positions(positions, tokens)
    routing = model.routing_of(tokens, mask, flags["record_routing"], given.get("replay_routing"))
    if routing is not None and routing.replay is not None:
        for layer in routing.replay.ids:
            routing.replayed(layer, model.config.num_experts_per_tok, model.config.n_routed_experts)
    if model.meshes.layout.cp > 1:
        model.model.part_of(tokens.shape[1])
    return fingerprint((tokens, labels, mask, positions), (flags["return_logits"], model.training))
