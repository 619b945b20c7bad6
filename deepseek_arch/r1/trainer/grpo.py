"""R1's reinforcement learning: TRL's GRPO trainer with what it lacks for mixtures of experts and for R1's recipe."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.callbacks import SyncRefModelCallback

from ...hf import LoadBalancingCallback, replaying
from ...hf.mtp_generation import core_of
from ..checks import check_tokenizer
from ..rollouts import Rollout, Sampling, aligned_routing, routing_record, sample_natively
from .config import R1Config, base_model, check_policy
from .losses import added_losses, watching_trunk
from .reference import ReferenceRefresh

__all__ = ["R1Trainer"]

REFERENCE_FILE = "reference.pt"


class R1Trainer(GRPOTrainer):
    """TRL's `GRPOTrainer`, with four additions and nothing else changed.

    Rollouts come from `deepseek_arch.generate`, training takes their routing decisions ("Keep Routing"), the
    prediction layers and the balance of experts can be trained beside the policy, and a reference model is refreshed
    with its buffers and saved with checkpoints.

    Args:
        model: a folder, or a model loaded from one: TRL loads the reference model from there once more.
        reward_funcs, args, kwargs: as TRL's; `args` is an `R1Config`.
        tags: texts that have to survive decoding, as the thinking tags.

    Raises:
        ValueError: before anything is trained, for a tokenizer without distinct pad and end tokens or with special
            tags, an FP8 model, routing to be kept of a dense model, prediction layers that are missing, or a reference
            without a folder.
    """

    args: R1Config
    model: Any

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: R1Config,
        *,
        processing_class: Any = None,
        tags: Sequence[str] = ("<think>", "</think>"),
        callbacks: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if processing_class is not None:
            check_tokenizer(processing_class, tags)
            # With a response template TRL takes thoughts out of the texts that rewards read.
            processing_class = copy.deepcopy(processing_class)
            processing_class.response_template = processing_class.response_schema = None
        if not isinstance(model, str):
            check_policy(model, args)
        callbacks = list(callbacks or [])
        if args.balance_rate:
            callbacks.append(LoadBalancingCallback(args.balance_rate))
        super().__init__(model, reward_funcs, args, processing_class=processing_class, callbacks=callbacks, **kwargs)
        check_tokenizer(self._tokenizer, tags)
        self._policy = self.accelerator.unwrap_model(self.model)
        check_policy(self._policy, args)
        if args.rollout_engine == "native" and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("expected rollout_engine 'hf' or 'vllm' with sharded weights, got 'native'")
        if args.sync_ref_model:
            assert self.ref_model is not None
            self.remove_callback(SyncRefModelCallback)
            self.add_callback(ReferenceRefresh(ref_model=self.ref_model, accelerator=self.accelerator))
        self._core: Any = None
        self._rollout: Rollout | None = None  # of the batch that is being scored
        self._replayed: Tensor | None = None  # decisions [N, T, L, K] for the batch that is being trained on
        self._layers: tuple[int, ...] = ()

    # ---------------------------------------------------------------- rollouts

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if self.args.rollout_engine != "native":
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if self._core is None:
            self._core = core_of(base_model(self._policy))
        assert self.max_completion_length is not None
        sampling = Sampling(
            self.max_completion_length,
            self.temperature,
            self.top_k or None,
            self.top_p if self.top_p < 1 else None,
            tuple(self.eos_token_ids),
            self._tokenizer.pad_token_id,
            mtp_depth=self.args.rollout_mtp_depth,
        )
        rollout = sample_natively(self._core, prompt_ids, sampling, record_routing=self.args.keep_routing)
        if self.args.keep_routing:
            self._rollout, self._layers = rollout, rollout.layers
        if sum(rollout.drafted):
            share = sum(rollout.accepted) / sum(rollout.drafted)
            self._metrics["train" if self.model.training else "eval"]["mtp_acceptance"].append(share)
        return rollout.completions, None

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        try:
            out = super()._generate_and_score_completions(inputs)
            if self._rollout is not None:
                widths = out["prompt_ids"].shape[1], out["completion_ids"].shape[1]
                out["routing"] = aligned_routing(self._rollout, *widths).to(out["prompt_ids"].device)
        finally:
            self._rollout = None
        return out

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)
        if bool(rewards.isnan().all()):
            raise ValueError("expected rewards for at least one completion of a batch, got None from all of them")
        return rewards

    # ---------------------------------------------------------------- the loss

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As TRL's, with the routing decisions of the rollout."""
        function = super()._get_per_token_logps_and_entropies
        routing = self._replayed
        if routing is None and self._rollout is not None:
            routing = aligned_routing(self._rollout, input_ids.shape[1] - logits_to_keep, logits_to_keep)
        if routing is None or (model is self.ref_model and not self.args.replay_reference):
            return function(model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size, **kwargs)
        parts = []
        for start in range(0, len(input_ids), batch_size or len(input_ids)):
            rows = slice(start, start + (batch_size or len(input_ids)))
            record = routing_record(routing[rows].to(input_ids.device), self._layers)
            with replaying(model, record):
                parts.append(function(model, input_ids[rows], attention_mask[rows], logits_to_keep, **kwargs))
        logps, entropies, losses = zip(*parts, strict=True)
        return (
            torch.cat(logps),
            None if entropies[0] is None else torch.cat(entropies),
            None if losses[0] is None else torch.stack(losses).mean(),
        )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._replayed = inputs.get("routing")
        try:
            with watching_trunk(self._policy, self.args) as seen:
                loss = super()._compute_loss(model, inputs)
        finally:
            self._replayed = None
        if not self.model.training or not seen:
            return loss
        more = added_losses(self._policy, self.args, seen, inputs)
        for name, (weight, value) in more.items():
            loss = loss + weight * value / self.current_gradient_accumulation_steps
            self._metrics["train"][name].append(self.accelerator.gather(value.detach()).mean().item())
        return loss

    # ---------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.sync_ref_model and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            torch.save(self.accelerator.unwrap_model(self.ref_model).state_dict(), folder / REFERENCE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.args.sync_ref_model:
            # TRL loads the reference that the run began with, not the one that it was last refreshed to.
            state = torch.load(Path(checkpoint) / REFERENCE_FILE, map_location="cpu", weights_only=True)
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(state)
