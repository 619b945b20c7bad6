"""Pipeline parallelism on torch's schedules: a model's layers in stages over ranks, its batch in microbatches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..attention.lightning_indexer import LightningIndexer
from ..config.argument_types import check_types
from ..layout.parallel_layout import LayoutError, ParallelLayout
from ..models.causal_lm import DeepseekLM
from ..models.main_model import check_mask, check_positions
from ..models.outputs import CausalLMOutput
from ..models.tensor_checks import check_labels, check_token_ids
from ..quant.fp8_training.products import gradients_apart
from .apply import check_layout, cut, shard_stages
from .call_agreement import fingerprint
from .forward_only import run_forward
from .meshes import Meshes, mesh_device
from .microbatches import agreed_shares, cut_batch
from .shared_embedding import sum_embedding
from .stage_plan import StagePlan, check_microbatches, plan_stages
from .stages import Stage, StagedLM, hold_stages

__all__ = ["Pipeline", "parallelize_stages", "pipeline"]

_SINGLE = ("GPipe", "1F1B")  # schedules of one stage a rank, which torch gives the stage and not a list


@check_types
def pipeline(
    model: DeepseekLM,
    layout: ParallelLayout,
    schedule: str = "1F1B",
    microbatches: int = 8,
    stage_layers: Sequence[int] | None = None,
    param_dtype: torch.dtype | None = None,
) -> Pipeline:
    """Cuts a model into pipeline stages, in place, and by the layout's other axes as `parallelize` does.

    Every rank calls this with the same model, or with what `load(..., layout=, schedule=)` returned. The embedding is
    on the first stage, the final norm, the head and the MTP modules are on the last; where these read the embedding, or
    the head is tied to it, the last stage has a copy, and gradients are summed over both. The model keeps the names of
    its parameters, and optimizers, `LoadBalancer`, `clip_grad_norm`, `save` and `save_sharded` take it as it is.

    Args:
        layout: with pp > 1; open sizes are filled in from the number of ranks.
        schedule: "GPipe", "1F1B", "Interleaved1F1B", "ZBH1", "InterleavedZeroBubble", "ZBVZeroBubble" or "DualPipeV".
            The last four compute gradients of inputs and of weights apart, each once.
        microbatches: parts of each rank's batch.
        stage_layers: decoder layers of each stage; None cuts by cost. Interleaved schedules take a multiple of pp
            stages, by default two a rank, ZBVZeroBubble and DualPipeV two a rank, the others one.
        param_dtype: as for `parallelize`; hidden states travel in it.

    Raises:
        LayoutError: the layout, the schedule, the stages or the number of microbatches do not fit; nothing has been
            changed then, on any rank.
        ValueError: no process group runs, or the model is of another kind, or cut otherwise already.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("expected a running process group (torch.distributed.init_process_group), got none")
    layout = layout.for_devices(dist.get_world_size())
    plan = plan_stages(model.config, layout, schedule, stage_layers)
    check_microbatches(plan, microbatches)
    _check_split(model, plan)
    if model.meshes is None:
        _cut_into_stages(model, layout, plan, param_dtype)
    elif (model.meshes.layout, model.meshes.stages) != (layout, plan) or param_dtype not in (
        None,
        model.meshes.param_dtype,
    ):
        raise ValueError(
            f"expected a model that is not cut yet, or cut into {plan.schedule.name} stages of {layout}, got one that "
            "is cut otherwise"
        )
    return Pipeline(model, plan, microbatches)


def _check_split(model: DeepseekLM, plan: StagePlan) -> None:
    """Refuses what computes wrong or too much where a backward pass is split into two."""
    if not plan.schedule.splits:
        return
    name, problems = plan.schedule.name, []
    if model.model.gradient_checkpointing:
        problems.append(f"expected no gradient checkpointing with {name}, whose split passes would recompute twice")
    indexers = [module for module in model.modules() if isinstance(module, LightningIndexer)]
    if any(p.requires_grad for indexer in indexers for p in indexer.parameters()):
        problems.append(f"expected frozen indexers with {name}, which asks for gradients that no loss gives them")
    if problems:
        raise LayoutError("; ".join(problems))


def parallelize_stages(
    model: DeepseekLM,
    layout: ParallelLayout,
    schedule: str | None,
    stage_layers: Sequence[int] | None,
    param_dtype: torch.dtype | None = None,
) -> DeepseekLM:
    """Cuts a model as `pipeline` will need it.

    Raises:
        LayoutError: as `pipeline`, or no schedule is given.
    """
    if schedule is None:
        raise LayoutError("expected the schedule of the pipeline with pp > 1, got none")
    layout = layout.for_devices(dist.get_world_size())
    _cut_into_stages(model, layout, plan_stages(model.config, layout, schedule, stage_layers), param_dtype)
    return model


def _cut_into_stages(
    model: DeepseekLM, layout: ParallelLayout, plan: StagePlan, param_dtype: torch.dtype | None
) -> None:
    """Takes everything but this rank's stages out of a model, in place, and cuts the rest by the layout's other axes.

    Raises:
        LayoutError: as `pipeline`.
    """
    check_layout(model, layout, param_dtype)
    meshes = Meshes(layout, mesh_device(model))
    rank = dist.get_rank(meshes.pp)
    meshes.param_dtype = param_dtype
    meshes.stages, meshes.copies = plan, hold_stages(model, plan, rank)
    cut(model, meshes)
    assert isinstance(model, StagedLM)
    stages = [Stage(model, plan, index) for index in plan.held(rank)]
    if meshes.shards_anything or param_dtype is not None:
        shard_stages(model, stages, meshes, param_dtype)
    model.meshes = meshes
    model.__dict__["stages"] = stages  # no submodules: their parameters have names already


class Pipeline:
    """A model's stages on this rank and a schedule that runs them, as `pipeline` returns.

    Attributes:
        model: what this rank has of the model.
        plan: stages of all ranks.
        microbatches: parts of each batch.
    """

    def __init__(self, model: DeepseekLM, plan: StagePlan, microbatches: int) -> None:
        self.model, self.plan, self.microbatches = model, plan, microbatches
        self._stages: list[Stage] = model.__dict__["stages"]
        self._made: tuple[Any, Any] = (None, None)  # what the schedule was made for, and the schedule

    def step(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        mtp_weight: float = 0.0,
    ) -> CausalLMOutput:
        """Runs forward and backward passes over a batch, and adds to the parameters' gradients.

        Every rank calls this; those of a pipeline, and of a tensor- or context-parallel group, with the same tokens.
        Gradients are, after FSDP's means, those of `loss + mtp_weight * mtp_loss` of one process over the batches of
        all data-parallel ranks, however many targets each microbatch and rank has. Router loads of all microbatches are
        counted, for one `LoadBalancer.step`.

        Args:
            input_ids, labels, attention_mask, position_ids: [B, T] as for `DeepseekLM.forward`; B is a multiple of the
                number of microbatches, each of which has consecutive rows.
            mtp_weight: of `mtp_loss`; see `mtp_loss.mtp_weight`.

        Returns:
            Losses over the batches of all ranks, the same on all of them and without a graph: `loss`, `aux_loss`,
            `mtp_loss`, `mtp_losses`, `mtp_accuracy` and `mtp_aux_losses`.

        Raises:
            ValueError: on all ranks where an argument of one is wrong, or ranks of one pipeline have different ones,
                before anything runs.
        """
        return self._run(input_ids, labels, attention_mask, position_ids, mtp_weight, True)

    @torch.no_grad()
    def evaluate(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> CausalLMOutput:
        """Computes the losses of `step`, forward passes alone; put the model into eval mode for those of evaluation."""
        return self._run(input_ids, labels, attention_mask, position_ids, 0.0, False)

    def _run(
        self,
        input_ids: Tensor,
        labels: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        mtp_weight: float,
        trains: bool,
    ) -> CausalLMOutput:
        model, problem, mark = self.model, None, torch.zeros((), dtype=torch.int64)
        try:
            input_ids, labels = self._checked(input_ids, labels, mask, position_ids, mtp_weight, trains)
            parts = cut_batch(model, input_ids, labels, mask, position_ids, self.microbatches)
            settings = (self.microbatches, mtp_weight, trains, model.training)
            mark = fingerprint((input_ids, labels, mask, position_ids), settings)
        except Exception as error:  # whatever it is: the others must not wait for this rank (TRAPS S4)
            problem, parts = error, []
        parts = agreed_shares(parts, self.microbatches, model, problem, mark)
        for stage in self._stages:
            stage.begin(parts, mtp_weight)
        shape = parts[0].input_ids.shape
        if trains:
            with sum_embedding(model):
                self._run_schedule(input_ids, self._schedule(*shape))
        else:
            like = torch.empty(self._passed_on(*shape), dtype=model.dtype, device="meta")
            run_forward(self._stages, self.plan, like, model.meshes.pp)
        return self._output()

    def _run_schedule(self, input_ids: Tensor, schedule: Any) -> None:
        numbers = torch.arange(self.microbatches)
        ids = (input_ids,) if self._stages[0].is_first else ()
        has_last = any(stage.is_last for stage in self._stages)
        options: dict[str, Any] = {"return_outputs": False, "losses": [] if has_last else None}
        with gradients_apart() if self.plan.schedule.splits else nullcontext():
            schedule.step(*ids, microbatch=numbers, target=numbers if has_last else None, **options)

    @check_types
    def _checked(
        self,
        input_ids: Tensor,
        labels: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        mtp_weight: float,
        trains: bool,
    ) -> tuple[Tensor, Tensor]:
        model = self.model
        input_ids = check_token_ids(input_ids, model.config.vocab_size, next(model.parameters()))
        batch = len(input_ids)
        labels = check_labels(labels, input_ids, model.config.vocab_size)
        check_mask(mask, input_ids, None)
        if position_ids is not None:
            check_positions(position_ids, input_ids)
        if batch % self.microbatches or not batch:
            raise ValueError(f"expected rows in multiples of {self.microbatches} microbatches, got {batch}")
        if mtp_weight and not model.config.num_nextn_predict_layers:
            raise ValueError(f"expected MTP modules for mtp_weight {mtp_weight}, got a model without them")
        if trains and not torch.is_grad_enabled():
            raise ValueError("expected gradients to be enabled in a step, got no_grad; evaluate needs none")
        if trains:
            _check_split(model, self.plan)
        return input_ids, labels

    def _schedule(self, rows: int, tokens: int) -> Any:
        """Returns the schedule for microbatches of a shape; its buffers are kept for the next step of that shape."""
        from torch.distributed.pipelining import schedules  # imports Triton where there is one

        dtype, device = self.model.dtype, self.model.device
        if self._made[0] != (rows, tokens, dtype, device):
            kind = getattr(schedules, f"Schedule{self.plan.schedule.name}")
            stages = [self._torch_stage(stage, rows, tokens, dtype, device) for stage in self._stages]
            given = stages[0] if self.plan.schedule.name in _SINGLE else stages
            made = kind(given, n_microbatches=self.microbatches, loss_fn=_loss_of, scale_grads=False)
            self._made = (rows, tokens, dtype, device), made
        return self._made[1]

    def _torch_stage(self, stage: Stage, rows: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Any:
        from torch.distributed.pipelining import PipelineStage

        def meta(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=kind, device="meta", requires_grad=kind.is_floating_point)

        passed_on = self._passed_on(rows, tokens)
        return PipelineStage(
            stage,
            stage.index,
            len(self.plan.layers),
            device,
            input_args=meta(rows, tokens, kind=torch.int64) if stage.is_first else meta(*passed_on),
            output_args=meta(kind=torch.float32) if stage.is_last else meta(*passed_on),
            group=self.model.meshes.pp,
        )

    def _passed_on(self, rows: int, tokens: int) -> tuple[int, int, int]:
        """Returns the shape of the hidden states that a stage sends to the next one."""
        return rows, tokens // self.model.meshes.layout.cp, self.model.config.hidden_size

    def _output(self) -> CausalLMOutput:
        meshes = self.model.meshes
        totals = torch.stack([stage.totals for stage in self._stages]).sum(0)
        dist.all_reduce(totals, group=meshes.pp)
        dist.all_reduce(totals, group=meshes.data)
        totals = totals.float() / dist.get_world_size(meshes.data)
        routed, depths = self.model.training and self.model.balance_loss.active, (len(totals) - 2) // 3
        out = CausalLMOutput(logits=None, loss=totals[0] + totals[1], aux_loss=totals[1] if routed else None)
        if depths:
            out.mtp_losses, out.mtp_aux_losses, out.mtp_accuracy = totals[2:].view(3, depths)
            out.mtp_loss = (out.mtp_losses + out.mtp_aux_losses).mean()
        return out


def _loss_of(loss: Tensor, number: Tensor) -> Tensor:
    """Returns what the last stage returned: the loss of a microbatch."""
    return loss
