"""A model cut by a layout and trained on random tokens: the step that is measured, and the gradients to compare."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import deepseek_arch as da
from deepseek_arch.parallel.norms import clip_grad_norm

from .contestants import Contestant

__all__ = ["LayoutRun", "StepResult", "narrow_config", "worst_error"]

MTP_WEIGHT = 0.3  # of the MTP modules' loss, V3's for the first 10 T tokens


@dataclass(frozen=True)
class StepResult:
    """Loss of a step over all ranks' rows, and the norm of its gradients."""

    loss: float
    norm: float


class LayoutRun:
    """A model with random weights and an optimizer, cut by a contestant's layout; every rank makes it and calls it.

    Weights and batches depend on `seed` alone, whatever the layout.

    Args:
        batch, micro_batch, sequence: rows of a step, rows that run at a time, and tokens of a row.
        contestant: None for one process, which sees all rows.
    """

    def __init__(
        self,
        config: da.DeepseekConfig,
        contestant: Contestant | None,
        *,
        batch: int,
        micro_batch: int,
        sequence: int,
        dtype: torch.dtype,
        device: torch.device,
        recompute: bool = False,
        seed: int = 0,
    ) -> None:
        self.batch, self.micro_batch, self.sequence, self.seed = batch, micro_batch, sequence, seed
        self.pipeline: Any = None
        self.model = da.DeepseekLM(config, device="meta", dtype=dtype)
        self.model.gradient_checkpointing_enable(recompute)
        if contestant is None:
            self.parts = batch // micro_batch
        else:
            layout = contestant.layout
            self.parts = batch // (micro_batch * layout.dp)
            if contestant.schedule is None:
                da.parallelize(self.model, layout)
            else:
                self.pipeline = da.pipeline(self.model, layout, contestant.schedule, self.parts)
        da.init_weights(self.model, seed, device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    @property
    def mtp_weight(self) -> float:
        return MTP_WEIGHT if self.model.config.num_nextn_predict_layers else 0.0

    def rows(self, step: int) -> Tensor:
        """Returns this rank's rows [batch / dp, sequence] of a batch that all ranks draw alike."""
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        rows = torch.randint(self.model.config.vocab_size, (self.batch, self.sequence), generator=draw)
        if self.model.meshes is not None:
            group, layout = self.model.meshes.data, self.model.meshes.layout
            # Ranks of cp are given the same rows, and are neighbours in the group.
            rows = rows.chunk(layout.dp)[dist.get_rank(group) // layout.cp]
        return rows.to(self.model.device)

    def backward(self, rows: Tensor) -> float:
        """Runs forward and backward passes over all micro-batches, and returns the loss without the MTP modules'."""
        if self.pipeline is not None:
            return float(self.pipeline.step(rows, rows, mtp_weight=self.mtp_weight).loss)
        group = None if self.model.meshes is None else self.model.meshes.data
        total = torch.zeros((), device=rows.device)
        for part in rows.chunk(self.parts):
            out = self.model(part, labels=part, return_logits=False)
            loss = da.global_loss(out, self.mtp_weight, group) if group is not None else out.loss
            if group is None and self.mtp_weight:
                loss = loss + self.mtp_weight * out.mtp_loss
            (loss / self.parts).backward()
            total += out.loss.detach() / self.parts
        if group is not None:
            dist.all_reduce(total, group=group)
            total /= dist.get_world_size(group)
        return float(total)

    def step(self, number: int) -> StepResult:
        """Makes an optimizer step."""
        loss = self.backward(self.rows(number))
        norm = clip_grad_norm(self.model, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, float(norm))

    def gradients(self) -> dict[str, Tensor]:
        """Returns the whole gradient of each parameter that this rank has a part of; ranks of a stage call it alike."""
        named = ((name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None)
        return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in named}

    def first_gradients(self) -> tuple[StepResult, dict[str, Tensor]]:
        """Returns the loss, the norm and the gradients of the first batch, and changes no weight."""
        loss = self.backward(self.rows(0))
        norm = float(clip_grad_norm(self.model, math.inf))
        gradients = self.gradients()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, norm), gradients


def narrow_config(config: da.DeepseekConfig) -> da.DeepseekConfig:
    """Returns the config with small widths and the same layers, heads, experts and groups: one process can hold it."""
    widths = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "q_lora_rank": 64,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "vocab_size": 1024,
    }
    changes: dict[str, Any] = {"initializer_range": 0.05, "dtype": "float32", "quantization_config": None}
    for name, width in widths.items():
        size = getattr(config, name)
        if size is not None:
            changes[name] = min(size, width)
    for name in ("bos_token_id", "eos_token_id"):
        changes[name] = None
    return config.replace(**changes)


def worst_error(gradients: dict[str, Tensor], expected: dict[str, Tensor], present: set[str]) -> tuple[float, str]:
    """Returns the largest error of a gradient, relative to the norm of the expected one, and its parameter's name.

    Args:
        gradients: of this rank.
        present: names of those that some rank has. One that none has counts as zero.
    """
    errors = {name: 1.0 for name, grad in expected.items() if name not in present and bool(grad.any())}
    for name, grad in gradients.items():
        reference = expected[name].double()
        errors[name] = float((grad.double() - reference).norm() / reference.norm().clamp(min=1e-30))
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst
