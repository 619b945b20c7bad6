"""Mixture of experts: the router with its three published routings, stacked experts, and the block around them.

Notation: T tokens (batch and sequence flattened), H hidden_size, E experts, K chosen per token, I expert width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepseek_kernels.moe.fused_moe import fused_moe
from deepseek_kernels.moe.topk_gate import group_scores, limit_to_groups, topk_gate, weigh

from ..config.argument_types import Size, check_types
from ..config.deepseek_config import DeepseekConfig
from ..layers.linear import MLP
from .routing import Routing

__all__ = ["Experts", "MoE", "Router"]

_BIAS_IN_ADAPTERS = "e_score_correction.bias"


@check_types
class Router(nn.Module):
    """Chooses K of E experts for each token and weighs them.

    Routings (`topk_method`):
        greedy: softmax scores, the K best (V2-Lite).
        group_limited_greedy: softmax scores, the K best of the `topk_group` groups with the best single expert (V2).
        noaux_tc: sigmoid scores; the choice adds `e_score_correction_bias` and is limited to the `topk_group` groups
            with the best sum of two; the weights do not see the bias (V3 report, equations 12 to 16).

    All of it in float32; the bias is a float32 buffer whatever dtype the module is cast to (TRAPS C1, C2).

    Attributes:
        bias_among_biases: True adds the bias to state dicts as `e_score_correction.bias` as well: adapters save what
            has such a name (`adapter_state`).
        load: int64 [E], tokens counted in training mode since `LoadBalancer` last read it, or None. No buffer:
            distributed wrappers would overwrite it with one rank's.
    """

    def __init__(
        self,
        hidden_size: Size,
        num_experts: Size,
        top_k: Size,
        *,
        topk_method: str = "noaux_tc",
        n_group: Size = 1,
        topk_group: Size = 1,
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 1.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if topk_method not in ("greedy", "group_limited_greedy", "noaux_tc"):
            raise ValueError(f"expected topk_method greedy, group_limited_greedy or noaux_tc, got {topk_method!r}")
        if topk_method == "greedy":
            n_group = topk_group = 1
        if num_experts % n_group or not 1 <= topk_group <= n_group:
            raise ValueError(f"expected groups that divide {num_experts} experts, got {topk_group} of {n_group} groups")
        if not 1 <= top_k <= topk_group * (num_experts // n_group):
            raise ValueError(
                f"expected 1 <= top_k <= {topk_group * (num_experts // n_group)} (the experts of the kept groups), "
                f"got {top_k}"
            )
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.topk_method, self.n_group, self.topk_group = topk_method, n_group, topk_group
        self.norm_topk_prob, self.routed_scaling_factor = norm_topk_prob, routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        if topk_method == "noaux_tc":
            bias = torch.zeros(num_experts, device=device, dtype=torch.float32)
            self.register_buffer("e_score_correction_bias", bias)
        else:
            self.e_score_correction_bias = None
        self.load: Tensor | None = None
        self.bias_among_biases = False
        self.reset_parameters()

    @classmethod
    @check_types
    def from_config(
        cls, config: DeepseekConfig, *, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None
    ) -> Router:
        assert config.n_routed_experts is not None and config.num_experts_per_tok is not None
        return cls(
            config.hidden_size,
            config.n_routed_experts,
            config.num_experts_per_tok,
            topk_method=config.topk_method,
            n_group=config.n_group or 1,
            topk_group=config.topk_group or 1,
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
            device=device,
            dtype=dtype,
        )

    def reset_parameters(self, std: float = 0.02) -> None:
        if self.weight.is_meta:
            return
        nn.init.normal_(self.weight, std=std)
        if self.e_score_correction_bias is not None:
            nn.init.zeros_(self.e_score_correction_bias)

    def _apply(self, fn, recurse: bool = True):
        # `.to(bfloat16)` and `.half()` cast floating-point buffers; this one keeps its values and its float32, and
        # only moves.
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if bias is not None and moved is not None and moved.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(moved.device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.bias_among_biases and self.e_score_correction_bias is not None:
            destination[prefix + _BIAS_IN_ADAPTERS] = self.e_score_correction_bias.detach()

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        saved = state_dict.pop(prefix + _BIAS_IN_ADAPTERS, None)
        if saved is not None:
            self.bias_among_biases = True  # an adapter brought it, and takes it along when it is saved again
            state_dict.setdefault(f"{prefix}e_score_correction_bias", saved)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.e_score_correction_bias is not None:  # `assign=True` takes the tensor as it comes
            self.e_score_correction_bias = self.e_score_correction_bias.float()

    def forward(
        self, x: Tensor, ids: Tensor | None = None, routing: Routing | None = None, layer: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Routes x [..., H] -> logits float32 [T, E], weights float32 [T, K], expert ids int64 [T, K].

        Experts come in order of falling preference; equal scores go to the smaller id.

        Args:
            ids: int64 [T, K], a choice to weigh instead of making one.
            routing: may fix the choice of decoder layer `layer`, and records it. The router itself talks to it, not the
                block around it: of a wrapped router (an adapter, a trained copy) it is the one that computes.
        """
        if routing is not None and ids is None:
            ids = routing.replayed(layer, self.top_k, self.num_experts)
        rows, kind = x.reshape(-1, self.hidden_size), x.device.type
        rows = rows if rows.dtype == torch.float32 else rows.float()
        weight: Tensor = self.weight
        weight = weight if weight.dtype == torch.float32 else weight.float()
        if kind != "meta" and torch.is_autocast_enabled(kind):  # it would take the product down to 16 bits
            with torch.autocast(kind, enabled=False):
                logits = F.linear(rows, weight)
        else:
            logits = F.linear(rows, weight)  # [T, E]
        weights, ids = self.route(logits, ids)
        if routing is not None:
            ids = routing.record_layer(layer, self, logits, weights, ids)
        return logits, weights, ids

    def scores(self, logits: Tensor) -> Tensor:
        """Returns affinities [T, E] of tokens and experts, which weigh the outputs: sigmoid, or softmax in V2."""
        return logits.sigmoid() if self.topk_method == "noaux_tc" else logits.softmax(-1)

    def route(self, logits: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Chooses and weighs experts by logits [T, E] -> weights [T, K], expert ids [T, K]; `ids` as in `forward`."""
        scores, biased = self.scores(logits), self.topk_method == "noaux_tc"
        normalize = self.norm_topk_prob and (biased or self.top_k > 1)
        # V2's code scales only what it did not normalize (TRAPS C8).
        factor = self.routed_scaling_factor if biased or not normalize else 1.0
        if ids is not None:
            return weigh(scores, ids, normalize, factor), ids
        return topk_gate(
            scores,
            self.e_score_correction_bias,
            self.top_k,
            n_group=self.n_group,
            topk_group=self.topk_group,
            group_best=self._group_best,
            normalize=normalize,
            factor=factor,
        )

    @property
    def _group_best(self) -> int:
        """Number of its best experts that decide whether a group is chosen."""
        return 2 if self.topk_method == "noaux_tc" else 1

    @torch.no_grad()
    def margins(self, logits: Tensor) -> Tensor:
        """Returns the gap to another choice for logits [T, E], float32 [T]; see `RoutingRecord`."""
        bias = self.e_score_correction_bias
        choice = self.scores(logits) if bias is None else self.scores(logits) + bias
        if self.n_group == 1:
            return _gap(choice, self.top_k)
        groups = group_scores(choice, self.n_group, self._group_best)
        margin = _gap(limit_to_groups(choice, groups, self.topk_group), self.top_k)
        return torch.minimum(margin, _gap(groups, self.topk_group))

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}, {self.topk_method}, "
            f"groups={self.topk_group}/{self.n_group}"
        )


def _gap(values: Tensor, count: int) -> Tensor:
    """Returns the `count`-th largest value of [T, N] minus the next one, [T]; infinite where there is no next one."""
    if count == values.shape[-1]:
        return values.new_full(values.shape[:-1], float("inf"))
    best = values.topk(count + 1, dim=-1).values
    return best[:, count - 1] - best[:, count]


@check_types
class Experts(nn.Module):
    """E gated experts in two stacked parameters; their activation is SiLU (SwiGLU) in every published model.

    Parameters:
        gate_up_proj: [E, 2 I, H], each expert's gate rows above its up rows.
        down_proj: [E, H, I].
    """

    def __init__(
        self,
        num_experts: Size,
        hidden_size: Size,
        intermediate_size: Size,
        activation: str = "silu",
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = num_experts, hidden_size, intermediate_size
        self.activation = activation
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size, **factory))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size, **factory))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        if self.gate_up_proj.is_meta:
            return
        nn.init.normal_(self.gate_up_proj, std=std)
        nn.init.normal_(self.down_proj, std=std)

    def forward(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Computes the weighted sum of each token's experts.

        Args:
            x: [T, H].
            expert_ids: [T, K] int64; the value `num_experts` marks a choice served elsewhere (expert parallelism).
            weights: [T, K].

        Returns:
            [T, H] in `x.dtype`. Only the chosen experts' weights are read, and none is copied.
        """
        return fused_moe(x, self.gate_up_proj, self.down_proj, expert_ids, weights, self.activation)

    def extra_repr(self) -> str:
        return f"{self.num_experts}, {self.hidden_dim}, {self.intermediate_dim}, {self.activation}"


class MoE(nn.Module):
    """Routed experts plus shared experts, the latter ungated and unscaled (V3 report, equation 12; TRAPS C11).

    Args:
        layer_idx: the decoder layer that this is part of, by which `Routing` knows it.
    """

    def __init__(self, router: Router, experts: Experts, shared_experts: MLP | None = None, layer_idx: int = 0) -> None:
        super().__init__()
        self.gate = router
        self.experts = experts
        self.shared_experts = shared_experts
        self.layer_idx = layer_idx

    @classmethod
    @check_types
    def from_config(
        cls,
        config: DeepseekConfig,
        layer_idx: int = 0,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> MoE:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        assert config.n_routed_experts is not None and config.moe_intermediate_size is not None
        shared = None
        if config.n_shared_experts:
            # One MLP of the summed width: the published tensors are stored that way.
            width = config.n_shared_experts * config.moe_intermediate_size
            shared = MLP(config.hidden_size, width, config.hidden_act, **factory)
        return cls(
            Router.from_config(config, **factory),
            Experts(
                config.n_routed_experts, config.hidden_size, config.moe_intermediate_size, config.hidden_act, **factory
            ),
            shared,
            layer_idx,
        )

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """Maps [..., H] to the same shape; `routing` may fix the router's decisions, and records them."""
        _, weights, expert_ids = self.gate(x) if routing is None else self.gate(x, None, routing, self.layer_idx)
        out = self.experts(x.reshape(-1, x.shape[-1]), expert_ids, weights).view(x.shape)
        shared = self.shared_experts
        return out if shared is None else out + shared(x)
