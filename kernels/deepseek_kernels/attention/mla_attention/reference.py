"""Attention on per-head keys and values, by PyTorch's own attention kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...common.masks import as_dense, causal_mask

__all__ = ["attend"]


def attend(q: Tensor, kv: Tensor, key: Tensor, scale: float, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """See `mla_attention`. Keys are joined and values padded, so it takes the memory that the kernels do without."""
    queries, keys = q.shape[1], kv.shape[1]
    heads = kv.transpose(1, 2)  # [B, N, S, P + V]
    own, values = heads.split([q.shape[3] - key.shape[2], heads.shape[3] - q.shape[3] + key.shape[2]], dim=-1)
    shared = key[:, None].expand(-1, heads.shape[1], -1, -1)  # [B, N, S, R], no copy yet
    # One width for keys and values: unequal ones take a path several times slower on CPU, and none on some GPUs.
    width = max(q.shape[3], values.shape[3])
    causal = False  # decided by branches: of dynamic lengths, a comparison is no bool, which is what PyTorch takes
    if mask is None:
        if queries == keys:
            causal = True
        elif queries > 1:
            mask = causal_mask(queries, keys, q.device)
    mask = as_dense(mask, keys)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    out = F.scaled_dot_product_attention(
        _pad(q.transpose(1, 2), width),
        _pad(torch.cat((own, shared), dim=-1), width),
        _pad(values, width),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scale,
    )
    return out[..., : values.shape[3]].transpose(1, 2)


def _pad(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
