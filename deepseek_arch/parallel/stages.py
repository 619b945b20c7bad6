"""This rank's pipeline stages: what a model keeps of itself, and the modules that torch's schedules run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from ..models.causal_lm import DeepseekLM
from ..models.global_loss import LossShares, weighted_loss
from ..models.outputs import CausalLMOutput, Places, TrunkOutput
from ..models.tensor_checks import nonzero
from ..moe.routing import Routing
from .stage_plan import StagePlan

__all__ = ["HeldLayers", "Microbatch", "Stage", "StagedLM", "hold_stages"]


class HeldLayers(nn.ModuleList):
    """Some layers of a model, under the numbers that they have in it."""

    def __init__(self, layers: nn.ModuleList, held: list[int]) -> None:
        super().__init__()
        for number in held:
            self.add_module(str(number), layers[number])

    def __getitem__(self, number: Any) -> Any:
        """Returns the layer of a number.

        Raises:
            IndexError: it is on another rank.
        """
        if str(number) not in self._modules:
            raise IndexError(
                f"expected one of the layers {', '.join(self._modules)}, which this rank has, got {number}"
            )
        return self._modules[str(number)]


class StagedLM(DeepseekLM):
    """A `DeepseekLM` of which this rank has some stages; names of parameters are those of the whole."""

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations: the norms', unless FSDP casts them."""
        if self.meshes.param_dtype is not None:
            return self.meshes.param_dtype
        return next(p.dtype for name, p in self.named_parameters() if name.endswith("norm.weight"))

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError("expected a whole model, got the stages of a pipeline that this rank has; use Pipeline.step")


class Microbatch(NamedTuple):
    """Inputs of one microbatch, and its part in the loss of the step.

    Attributes:
        input_ids, labels: int [b, T].
        mask: the attention mask as given, or None.
        places: rotations, mask and documents of its tokens.
        shares: of its losses in the loss of the step.
        part: with context parallelism, this rank's tokens (`context_parallel.SequencePart`), which `places` is of.
    """

    input_ids: Tensor
    labels: Tensor
    mask: Tensor | None
    places: Places
    shares: LossShares
    part: Any | None = None


class Stage(nn.Module):
    """One stage: maps ids, or the hidden states [b, T, H] of the stage before, to hidden states; the last, to a loss.

    With context parallelism hidden states are those of this rank's tokens, [b, T / cp, H], and ids those of all tokens.
    Balance losses of a stage's layers enter the backward pass with the gradient of its output.

    Args:
        model: holds the stage's modules, which are called through it.
        index: of the stage.

    Attributes:
        index: as given; is_first, is_last: the stage is at that end.
        lm: what this rank has of the model.
        parts: the microbatches of the running step.
        totals: float64 [2 + 3 D], sums over them of this stage's losses, each times its share: of the next token, the
            balance losses, then of each MTP module its loss, its balance loss and its accuracy.
    """

    lm: Any

    def __init__(self, model: StagedLM, plan: StagePlan, index: int) -> None:
        super().__init__()
        self.__dict__["lm"] = model  # no submodule: it holds other stages, too
        self.index, self.is_first, self.is_last = index, index == 0, index == len(plan.layers) - 1
        self._splits = plan.schedule.splits
        self.layers = nn.ModuleList(model.model.layers[number] for number in plan.layers[index])
        if self.is_first or (self.is_last and plan.shares_embedding):
            self.embed_tokens = model.model.embed_tokens
        if self.is_last:
            self.norm, self.lm_head, self.mtp = model.model.norm, model.lm_head, model.mtp
        self.parts: list[Microbatch] = []
        self.mtp_weight = 0.0
        self.totals = torch.zeros(0)

    def begin(self, parts: list[Microbatch], mtp_weight: float) -> None:
        """Prepares for a step."""
        depths = self.lm.config.num_nextn_predict_layers
        self.parts, self.mtp_weight = parts, mtp_weight
        self.totals = torch.zeros(2 + 3 * depths, dtype=torch.float64, device=parts[0].input_ids.device)

    def forward(self, x: Tensor, microbatch: Tensor) -> Tensor:
        """Runs the stage.

        Args:
            x: ids [b, T] for the first stage, else [b, T / cp, H].
            microbatch: int [1], its number.
        """
        part, trunk = self.parts[int(microbatch)], self.lm.model
        if self.is_first:
            x = trunk.embed(x if part.part is None else part.part.cut(x))
        routing = self.lm.routing_of(part.input_ids, part.mask)
        valid = None if part.mask is None else nonzero(part.mask)
        selection = trunk.new_selection(None, valid)
        x = trunk.run_layers(self.layers, x, part.places.rope, part.places.mask, None, routing, selection)
        if self.is_last:
            return self._loss(x, part, routing, selection)
        return self._passed_on(x, part, routing)

    def _passed_on(self, x: Tensor, part: Microbatch, routing: Routing | None) -> Tensor:
        if routing is not None:
            routing.commit()
            balance = routing.total_loss(range(self.lm.config.num_hidden_layers))
            if balance is not None:
                share = float(part.shares.sequences[0])
                self.totals[1] += share * balance.detach()
                if torch.is_grad_enabled():
                    x = _WithLoss.apply(x, balance, share)
        if torch.is_grad_enabled() and not x.requires_grad:  # everything up to here is frozen
            x = x.detach().requires_grad_()
        return x

    def _loss(self, x: Tensor, part: Microbatch, routing: Routing | None, selection: Any) -> Tensor:
        lm, places = self.lm, part.places
        main = TrunkOutput(lm.model.norm(x), x, *places, part=part.part)
        out = CausalLMOutput(logits=None, hidden_states=main.hidden_states)
        embed = self._embed_apart(x) if self._splits else None
        lm.add_losses(out, main, part.input_ids, part.labels, part.mask, routing, selection, embed)
        lm.add_routing(out, routing)
        assert out.loss is not None
        aux = out.loss.new_zeros(()) if out.aux_loss is None else out.aux_loss
        own = torch.stack((out.loss.detach() - aux.detach(), aux.detach())).double()
        self.totals[:2] += own * torch.stack((part.shares.targets[0], part.shares.sequences[0]))
        if out.mtp_losses is not None:
            zero = torch.zeros_like(out.mtp_losses)
            balance = zero if out.mtp_aux_losses is None else out.mtp_aux_losses
            accuracy = zero if out.mtp_accuracy is None else out.mtp_accuracy
            ahead = torch.stack((out.mtp_losses, balance, accuracy)).detach().double()
            targets, rows = part.shares.targets[1:], part.shares.sequences[1:]
            self.totals[2:] += (ahead * torch.stack((targets, rows, targets))).flatten()
        return weighted_loss(out, part.shares, self.mtp_weight)

    def _embed_apart(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Returns a lookup of embeddings whose gradient is computed with that of the stage's input, `x`.

        A pass for the weights' gradients begins at each use of a parameter, and would run the stage between two uses
        again: that of MTP module 0 lies behind that of module 1, and that of a tied head before both.
        """

        def embed(ids: Tensor) -> Tensor:
            rows = self.lm.model.embed(ids)
            if not (torch.is_grad_enabled() and rows.requires_grad):
                return rows
            return _Apart.apply(x, rows.detach(), [rows])

        return embed


class _Apart(torch.autograd.Function):
    """Returns `value`; as soon as its gradient is there, what the value was made from gets its own.

    Args:
        anchor: lies behind in the backward pass that is to do so.
        graph: the value with its graph, in a list: autograd must not see it.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, graph: list[Tensor]) -> Tensor:
        ctx.graph = graph
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        torch.autograd.backward(ctx.graph, grads)
        return None, None, None


class _WithLoss(torch.autograd.Function):
    """Passes hidden states on; their backward pass runs that of a loss as well, times `share`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, share: float) -> Tensor:
        ctx.share, ctx.like = share, loss
        return x.clone()  # schedules detach what a stage returns, which no view allows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], torch.full_like(ctx.like, ctx.share), None


def hold_stages(model: DeepseekLM, plan: StagePlan, pp_rank: int) -> frozenset[str]:
    """Takes out of a model, in place, everything but the stages of this rank.

    Returns:
        Names of parameters that the first stage has on another rank.
    """
    held, stages = plan.held(pp_rank), len(plan.layers)
    first, last = 0 in held, stages - 1 in held
    model.model.layers = HeldLayers(model.model.layers, [number for stage in held for number in plan.layers[stage]])
    if not (first or (last and plan.shares_embedding)):
        model.model.embed_tokens = None  # type: ignore[assignment]
    if not last:
        model.model.norm = model.lm_head = None  # type: ignore[assignment]
        model.mtp = nn.ModuleList()
    model.__class__ = StagedLM
    if first or not (last and plan.shares_embedding):
        return frozenset()
    return frozenset(
        {"model.embed_tokens.weight"} | ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    )
