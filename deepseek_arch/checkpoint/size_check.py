"""Early refusal of a config that describes far more tensors than the files hold: before any of them is listed."""

from __future__ import annotations

from ..config.deepseek_config import DeepseekConfig
from .files.shards import Shards

__all__ = ["explain_far_too_few"]

_FEW = 20_000  # tensors are listed in no time, and then the missing ones are named
_MOST_RATIO = 4
_LEAST_IN_LAYER = 8


def explain_far_too_few(config: DeepseekConfig, shards: Shards) -> str | None:
    """Returns the problem if the config describes several times the tensors that the files hold, else None.

    The names in an index, or in the headers, are counted; a stack of experts is one, and its header says how many.
    """
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    experts = (config.n_routed_experts or 0) if any(map(config.is_moe_layer, range(layers))) else 0
    sparse = sum(map(config.is_moe_layer, range(layers))) if experts else 0
    stored = len(shards.names)
    stack = next((name for name in shards.names if name.endswith(".mlp.experts.gate_up_proj")), None)
    if stack is not None and experts:
        shards.open_for([stack])
        info = shards.tensors.get(stack)
        stacked = info.shape[0] if info is not None and info.shape else 1
        if 3 * sparse * experts > _FEW and experts > _MOST_RATIO * stacked:
            return f"expected stacks of n_routed_experts={experts:,} experts, got {stack} with {stacked:,}"
    described = _LEAST_IN_LAYER * layers + (2 if stack is not None else 3 * experts) * sparse
    if described <= max(_FEW, _MOST_RATIO * stored):
        return None
    sizes = f"num_hidden_layers={layers:,}" + (f" and n_routed_experts={experts:,}" if experts else "")
    if config.num_nextn_predict_layers:
        sizes = sizes.replace("layers=", "layers+num_nextn_predict_layers=")
    return f"expected about {described:,} tensors for {sizes}, the files name {stored:,}"
