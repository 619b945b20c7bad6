"""`mla_attention`: attention of many queries on per-head keys and values, with the rotated key that all heads share."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from ...common.masks import is_spans
from . import cpu
from .configs import obstacle
from .reference import attend

__all__ = ["mla_attention"]

dispatch.register("mla_attention", "triton", "cpu")


def mla_attention(
    q: Tensor, kv: Tensor, key: Tensor, scale: float, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Computes softmax(scale * q @ k.T) @ v in each head, k a head's own key beside the shared one (V3 report, equation
    10).

    Args:
        q: [B, T, N, P + R], the rotated part last.
        kv: [B, S, N, P + V], each head's own key and its value, as `kv_b_proj` gives them: never split nor copied.
        key: [B, S, R], rotated, of all heads (TRAPS A4): never copied for each head.
        scale: of the scores.
        mask: as `deepseek_kernels.common.masks` describes; None is causal, the last query aligned with the last key, so
            T may be less than S (TRAPS B8). A query that sees nothing gives zeros, and gradients of zero.
        dropout: probability that a weight is dropped; the others are scaled up. Runs on the reference only.

    Returns:
        [B, T, N, V] in `q.dtype`. Differentiable once in q, kv and key; in Triton and C++ the same in every run.
        There, too, keys that no query of a row sees, before the first and behind the last seen one, may hold anything.

    Raises:
        ValueError: the shapes or the dtypes do not fit, or `dropout` is no probability.
    """
    _check(q, kv, key, mask, dropout)
    q, kv, key = dispatch.autocast(q, kv, key)
    if not q.dtype == kv.dtype == key.dtype:
        raise ValueError(f"expected q, kv and key of one dtype, got {q.dtype}, {kv.dtype} and {key.dtype}")
    unsupported = obstacle(q, kv, key, scale, mask, dropout)
    chosen = dispatch.pick("mla_attention", q.device, unsupported)
    if chosen == "cpu" and cpu.takes(q, kv, key, scale, mask, dropout):
        return cpu.attend(q, kv, key, scale, mask)
    if chosen != "triton":
        return attend(q, kv, key, scale, mask, dropout)
    from . import launch

    return launch.attend(q, kv, key, mask, scale)[0]


def _check(q: Tensor, kv: Tensor, key: Tensor, mask: Tensor | None, dropout: float) -> None:
    fits = q.ndim == kv.ndim == 4 and key.ndim == 3
    fits = fits and q.shape[0] == kv.shape[0] == key.shape[0] and q.shape[2] == kv.shape[2]
    fits = fits and kv.shape[1] == key.shape[1] and kv.shape[3] >= q.shape[3] - key.shape[2] >= 0
    if not fits:
        raise ValueError(
            "expected q [B, T, N, P + R], kv [B, S, N, P + V] and key [B, S, R], got "
            f"{list(q.shape)}, {list(kv.shape)} and {list(key.shape)}"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"expected a dropout from 0 to less than 1, got {dropout}")
    if mask is None:
        return
    batch, queries, keys = q.shape[0], q.shape[1], kv.shape[1]
    if is_spans(mask):
        if mask.shape != (batch, queries, 2):
            raise ValueError(f"expected spans [{batch}, {queries}, 2], got {list(mask.shape)}")
    elif mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"expected a mask of int32 (spans), bool or floats, got {mask.dtype}")
    elif mask.ndim not in (2, 4) or (mask.ndim == 4 and mask.shape[1] != 1):
        raise ValueError(f"expected a mask for all heads, [T, S] or [B, 1, T, S], got {list(mask.shape)}")
    elif mask.shape[-2] not in (1, queries) or mask.shape[-1] not in (1, keys):
        raise ValueError(f"expected a mask of {queries} queries and {keys} keys, got {list(mask.shape)}")
