"""The published hyperparameters of R1's reinforcement learning, in TRL's field names.

From arXiv 2501.12948 v2 (sections 2 and 3, supplement B.4) and arXiv 2402.03300. TRL's defaults are those of other
papers: beta 0, token-level loss, eight completions a prompt. What a paper does not give is not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PRESETS", "PublishedGRPO"]

# One update a minibatch, advantages over the group's standard deviation, a mean over each output's tokens, and the
# estimator k3 of the KL divergence as it is printed, without V3.2's ratio.
_FORMULA = {
    "loss_type": "grpo",
    "scale_rewards": "group",
    "importance_sampling_level": "token",
    "num_iterations": 1,
    "use_bias_correction_kl": False,
    "top_p": 1.0,
    "top_k": 0,
    "lr_scheduler_type": "constant",
}


@dataclass(frozen=True)
class PublishedGRPO:
    """One stage's numbers.

    Attributes:
        fields: TRL's fields that do not depend on the hardware.
        batch: outputs of one optimizer step.
        rollout: outputs that are sampled at once.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 512
    rollout: int = 8192

    def arguments(self, per_device: int, processes: int = 1) -> dict[str, Any]:
        """Returns arguments of `R1Config` for `processes` devices with `per_device` outputs in a forward pass each.

        Raises:
            ValueError: the batch is no multiple of what all devices take at once.
        """
        at_once = per_device * processes
        if per_device < 1 or processes < 1 or self.batch % at_once or self.rollout % self.batch:
            raise ValueError(
                f"expected per_device x processes that divides a batch of {self.batch} outputs, got {per_device} x "
                f"{processes}"
            )
        accumulated = self.batch // at_once
        return {
            **_FORMULA,
            **self.fields,
            "per_device_train_batch_size": per_device,
            "gradient_accumulation_steps": accumulated,
            # TRL counts forward passes, not optimizer steps.
            "steps_per_generation": accumulated * (self.rollout // self.batch),
        }


_REFRESHED = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 400}
_ZERO = {
    "learning_rate": 3e-6,
    "beta": 0.001,
    "temperature": 1.0,
    "num_generations": 16,
    "max_completion_length": 32_768,
    "max_steps": 10_400,
    **_REFRESHED,
}
_REASON = {name: value for name, value in _ZERO.items() if name != "max_steps"} | {"epsilon": 10.0}

PRESETS: dict[str, PublishedGRPO] = {
    # The length limit rises to 65,536 after step 8,200: two stages of the recipe deepseek-v3.
    "r1-zero": PublishedGRPO(_ZERO),
    # A clip range of 10 is no misprint: a smaller one cuts off the gradients of many tokens (supplement B.4).
    "r1-reason": PublishedGRPO(_REASON),
    # Preference rewards and general prompts come in the last 400 steps only.
    "r1-align": PublishedGRPO(_REASON | {"temperature": 0.7, "max_steps": 1_700}),
    "r1-zero-qwen-32b": PublishedGRPO(
        {name: value for name, value in _ZERO.items() if name != "max_steps"} | {"learning_rate": 2e-6}
    ),
    # DeepSeekMath-RL 7B: one update a rollout, 64 outputs a question.
    "deepseekmath-7b": PublishedGRPO(
        {"learning_rate": 1e-6, "beta": 0.04, "num_generations": 64, "max_completion_length": 1_024},
        batch=1024,
        rollout=1024,
    ),
}
"""By name, for `PRESETS[name].arguments(per_device, processes)`."""
