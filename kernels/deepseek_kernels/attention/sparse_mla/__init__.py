"""`sparse_mla`: absorbed attention of every query on keys of its own, gathered from the latent cache.

All heads of a query read the same selected tokens, latents and rotated keys side by side, and the latents are the
values too, as in `mla_decode`. For prompts and for decoding: the cost of a query does not depend on S.

B batch, T queries, S keys, K keys of a query, N heads, C kv_lora_rank, R qk_rope_head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from ..mla_decode.configs import MOST_LATENT, MOST_ROTATED
from ..packed_latents import aligned, packed_bytes
from . import cpu, reference

__all__ = ["sparse_mla"]

dispatch.register("sparse_mla", "triton", "cpu")
# The same kernel on FP8 tokens. 8.9: the first with conversions from e4m3.
dispatch.register("sparse_mla_fp8", "triton", "cpu", capability=(8, 9))

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def sparse_mla(q: Tensor, states: Tensor, ids: Tensor, kv_lora_rank: int, scale: float) -> Tensor:
    """Computes softmax(scale * q @ k.T) @ latents over the selected keys of each query.

    Args:
        q: [B, T, N, C + R], queries in the space of the latents.
        states: [B, S, C + R] of q's dtype; or uint8 [B, S, bytes] from `packed_latents.pack`, dequantized as for
            `mla_decode`. Tokens that no query selects are not read, whatever they hold.
        ids: int32 [B, T, K], indices from 0 to S - 1, no index twice; -1 behind the last one of a query, as
            `topk_select` returns them. A query without any gives zeros. That indices are in range is not checked.
        kv_lora_rank: C.
        scale: of the scores.

    Returns:
        [B, T, N, C] in q's dtype, differentiable, through the reference, in q and in states that are not packed. The
        reference gathers the keys of a block of queries at a time; where a gradient is needed it gathers them again in
        the backward pass.

    Raises:
        ValueError: the shapes or the dtypes do not fit.
    """
    _check(q, states, ids, kv_lora_rank)
    packed = states.dtype == torch.uint8
    if packed:
        (q,) = dispatch.autocast(q)
    else:
        q, states = dispatch.autocast(q, states)
        if q.dtype != states.dtype:
            raise ValueError(f"expected q and states of one dtype, got {q.dtype} and {states.dtype}")
    op = "sparse_mla_fp8" if packed else "sparse_mla"
    chosen = dispatch.pick(op, q.device, _unsupported(q, states, kv_lora_rank))
    if chosen == "cpu" and cpu.takes(q, states, ids):
        return cpu.attend(q, states, ids, kv_lora_rank, scale)
    if chosen != "triton":
        return reference.attend(q, states, ids, kv_lora_rank, scale)
    from . import launch

    return launch.attend(q, states, ids, kv_lora_rank, scale)


def _check(q: Tensor, states: Tensor, ids: Tensor, kv_lora_rank: int) -> None:
    if q.ndim != 4 or not 0 < kv_lora_rank < q.shape[3]:
        raise ValueError(f"expected q [B, T, N, C + R] for a latent of {kv_lora_rank}, got {list(q.shape)}")
    rotated, packed = q.shape[3] - kv_lora_rank, states.dtype == torch.uint8
    width = packed_bytes(kv_lora_rank, rotated) if packed else kv_lora_rank + rotated
    fits = states.ndim == 3 and states.shape[0] == q.shape[0] and states.shape[2] == width
    if not fits or not (packed or states.dtype.is_floating_point):
        raise ValueError(
            f"expected states [{q.shape[0]}, S, {kv_lora_rank + rotated}] or uint8 [{q.shape[0]}, S, "
            f"{packed_bytes(kv_lora_rank, rotated)}], got {states.dtype} {list(states.shape)}"
        )
    if ids.dtype != torch.int32 or ids.ndim != 3 or ids.shape[:2] != q.shape[:2]:
        raise ValueError(f"expected ids int32 [{q.shape[0]}, {q.shape[1]}, K], got {ids.dtype} {list(ids.shape)}")


def _unsupported(q: Tensor, states: Tensor, kv_lora_rank: int) -> str | None:
    """Returns the reason why the kernel cannot take these operands, or None."""
    rotated = q.shape[3] - kv_lora_rank
    if q.dtype not in _DTYPES:
        return f"its queries are bfloat16, float16 or float32, got {q.dtype}"
    if torch.is_grad_enabled() and (q.requires_grad or states.requires_grad):
        return "it has no gradient"
    if kv_lora_rank > MOST_LATENT or rotated > MOST_ROTATED:
        return (
            f"its latents have at most {MOST_LATENT} features and rotated keys {MOST_ROTATED}, "
            f"got {kv_lora_rank} and {rotated}"
        )
    if states.dtype == torch.uint8 and not aligned(states, kv_lora_rank):
        return f"its packed tokens begin at multiples of 4 bytes and so do their parts, got strides {states.stride()}"
    return None
