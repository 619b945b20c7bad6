"""Models that are cut over ranks, beside the whole ones: their sizes, their rows, and what is gathered to compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import deepseek_arch as da

from . import small_models

__all__ = ["FP8_SIZES", "SIZES", "crowded_model", "gradients", "rows_of_rank", "weighed_loss", "whole"]

SIZES: dict[str, Any] = {"num_attention_heads": 4, "vocab_size": 64, "num_nextn_predict_layers": 1}
# Whole FP8 blocks of 16 for two ranks: heads of 16 + 16 and 16, widths that are multiples of 32.
FP8_SIZES: dict[str, Any] = SIZES | {
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
}


def whole(tensor: Any) -> Any:
    """A DTensor gathered; anything else as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gathered gradients of the parameters that have one."""
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def crowded_model(
    config: da.DeepseekConfig, dtype: torch.dtype = torch.float32, experts: list[int] | None = None
) -> da.DeepseekLM:
    """A model in training mode of which all tokens choose `experts`, if there are any."""
    model = small_models.model(config).to(dtype).train()
    for router in da.LoadBalancer(model).routers.values() if experts is not None else ():
        router.e_score_correction_bias[experts] = 100.0
    return model


def rows_of_rank(config: da.DeepseekConfig, rank: int, rows: list[int]) -> Tensor:
    """Those of all rows of tokens that data-parallel rank `rank` has, `rows[rank]` of them."""
    return small_models.tokens(config, sum(rows), 9)[sum(rows[:rank]) :][: rows[rank]]


def weighed_loss(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(ids, labels=ids, return_logits=False)
    return out.loss + 0.3 * out.mtp_loss
