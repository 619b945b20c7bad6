"""Cuts of attention over tensor-parallel ranks, checked before any weight is read: a head is whole on one rank."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..config.deepseek_config import DeepseekConfig

__all__ = ["check_heads"]


def check_heads(model: nn.Module, config: DeepseekConfig) -> None:
    """Checks that every rank has as many heads as the others.

    Args:
        model: with DTensors in place of the parameters that a plan cuts, on the meta device.

    Raises:
        ValueError: alike on every rank, if a plan cuts heads.
    """
    heads = config.num_attention_heads
    parameter: Any  # a DTensor where a plan cuts it
    for name, parameter in model.named_parameters():
        if not name.endswith("self_attn.kv_b_proj.weight") or not hasattr(parameter, "placements"):
            continue
        mesh = parameter.device_mesh
        axes = mesh.mesh_dim_names or ("tp",) * mesh.ndim
        cutting = (
            mesh.size(i)
            for i, (axis, placement) in enumerate(zip(axes, parameter.placements, strict=True))
            if getattr(placement, "dim", None) == 0 and "fsdp" not in axis  # FSDP gathers before anything computes
        )
        ranks = math.prod(cutting)
        if heads % ranks:
            raise ValueError(
                f"expected the {ranks} ranks of a plan that cuts attention to divide its {heads} heads, got a rest of "
                f"{heads % ranks}: use another tp_size, or a tp_plan that leaves self_attn's projections whole"
            )
