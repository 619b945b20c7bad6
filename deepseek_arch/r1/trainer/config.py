"""The arguments of R1's trainer, and the policies that they can be applied to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from ...hf import DeepseekForCausalLM
from ...moe.moe import MoE
from ...quant.fp8_experts import FP8Experts
from ...quant.fp8_linear import FP8Linear

__all__ = ["R1Config", "base_model", "check_extras", "check_policy", "wait_for_drafts"]

ENGINES = ("native", "hf", "vllm")


@dataclass
class R1Config(GRPOConfig):
    """TRL's `GRPOConfig`, every field of it, and what the trainer below adds.

    `presets.PRESETS` has the papers' values of TRL's fields.
    """

    rollout_engine: str = field(
        default="native",
        metadata={"help": "What samples completions: 'native' (deepseek_arch.generate), 'hf' or 'vllm' (TRL's)."},
    )
    rollout_mtp_depth: int = field(
        default=0,
        metadata={
            "help": "Tokens that prediction layers draft in a step of the native engine's rollouts. Sampled tokens are "
            "distributed as without; train the layers too (mtp_loss_weight), or ever fewer drafts are accepted."
        },
    )
    keep_routing: bool = field(
        default=True,
        metadata={
            "help": "Whether training takes the routing decisions of the rollout (arXiv 2512.02556, 'Keep Routing'). "
            "Needs the native engine and a model with experts."
        },
    )
    replay_reference: bool = field(
        default=True,
        metadata={"help": "Whether the reference model takes them too, so that equal weights have a divergence of 0."},
    )
    balance_rate: float = field(
        default=0.0,
        metadata={"help": "Step of the routers' biases against the load (V3 report, 2.1.2); 0 freezes them."},
    )
    balance_loss: float = field(
        default=0.0,
        metadata={"help": "Factor of V3's sequence-wise balance loss (TRL's router_aux_loss_coef is Mixtral's)."},
    )
    mtp_loss_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the prediction layers' loss on the completions. It trains them alone, neither the trunk "
            "nor the embedding and the head, so that drafts follow the policy and the policy knows nothing of them."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rollout_engine not in ENGINES:
            raise ValueError(f"expected rollout_engine among {', '.join(ENGINES)}, got {self.rollout_engine!r}")
        if self.use_vllm != (self.rollout_engine == "vllm"):
            raise ValueError(
                "expected use_vllm=True with rollout_engine='vllm' and only then, got "
                f"use_vllm={self.use_vllm} with {self.rollout_engine!r}"
            )
        if self.keep_routing and self.rollout_engine != "native":
            raise ValueError(
                "expected rollout_engine='native' with keep_routing=True, since TRL's engines record no routing, got "
                f"{self.rollout_engine!r}"
            )
        if self.router_aux_loss_coef:
            raise ValueError(
                "expected balance_loss or balance_rate, got router_aux_loss_coef, with which TRL computes Mixtral's "
                "loss on softmax scores that these routers do not have (TRAPS T1)"
            )
        for name in ("balance_rate", "balance_loss", "mtp_loss_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"expected {name} >= 0, got {getattr(self, name)}")
        wait_for_drafts(self)
        if self.rollout_mtp_depth < 0 or (self.rollout_mtp_depth and self.rollout_engine != "native"):
            raise ValueError(
                "expected rollout_mtp_depth >= 0, and 0 without rollout_engine='native', got "
                f"{self.rollout_mtp_depth} with {self.rollout_engine!r}"
            )
        if self.rollout_engine == "native" and (self.min_p or self.repetition_penalty != 1.0):
            raise ValueError("expected neither min_p nor repetition_penalty with rollout_engine='native', got one")


def wait_for_drafts(args: Any) -> None:
    """Has DistributedDataParallel wait for the gradients of prediction layers that are trained.

    They run behind its own forward pass. Searching that pass for parameters without a gradient, which transformers asks
    for, takes them for unused, and reduces their gradients of the step before.

    Raises:
        ValueError: the search is asked for.
    """
    if not args.mtp_loss_weight:
        return
    if args.ddp_find_unused_parameters:
        raise ValueError("expected ddp_find_unused_parameters=False with mtp_loss_weight, got True")
    args.ddp_find_unused_parameters = False


def base_model(model: Any) -> Any:
    """Returns the language model under adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_extras(model: Any, args: Any) -> None:
    """Raises ValueError for a model without the experts or the prediction layers that `args` speaks of."""
    base = base_model(model)
    ours = isinstance(base, DeepseekForCausalLM)
    routed = any(isinstance(module, MoE) for module in model.modules())
    for name in ("keep_routing", "balance_rate", "balance_loss"):
        if getattr(args, name, 0) and not routed:
            raise ValueError(f"expected a model with experts for {name}, got {type(base).__name__} without any")
    for name in ("mtp_loss_weight", "rollout_mtp_depth"):
        if getattr(args, name, 0) and not (ours and len(base.mtp)):
            raise ValueError(
                f"expected a model with prediction layers for {name} {getattr(args, name)}, got {type(base).__name__} "
                "without any"
            )


def check_policy(model: Any, args: R1Config) -> None:
    """Raises ValueError for a model that `args` cannot be applied to."""
    base = base_model(model)
    ours = isinstance(base, DeepseekForCausalLM)
    if any(isinstance(module, (FP8Linear, FP8Experts)) for module in model.modules()):
        raise ValueError(
            "expected a policy with trainable weights, got FP8 weights: load the checkpoint with "
            "quantization_config=DeepseekFP8Config(dequantize=True)"
        )
    if args.rollout_engine == "native" and not ours:
        raise ValueError(
            f"expected a DeepseekForCausalLM with rollout_engine='native', got {type(base).__name__}: use 'hf'"
        )
    check_extras(model, args)
    if args.beta and base is model and not getattr(model.config, "_name_or_path", ""):
        raise ValueError(
            "expected a model that was loaded from a folder with beta > 0, since the reference model is loaded from "
            "it too (TRAPS T10), got one made in memory"
        )
