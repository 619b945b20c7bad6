"""`mla_decode`: absorbed attention of few queries on the latent cache, in high precision or packed in FP8
(`packed_latents`).

All heads read the same keys [B, S, C + R], latents and rotated keys side by side, and the latents are the values too.
`mla_decode` reads a cache with one stretch of memory for each row of the batch, `mla_decode_paged` one in pages.

B batch, T queries, S keys, N heads, C kv_lora_rank, R qk_rope_head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from ...common.masks import is_spans
from ..packed_latents import aligned, packed_bytes
from . import cpu, reference
from .configs import MOST_LATENT, MOST_ROTATED

__all__ = ["mla_decode", "mla_decode_paged"]

dispatch.register("mla_decode", "triton", "cpu")
# The same kernels on FP8 tokens. 8.9: the first with conversions from e4m3.
dispatch.register("mla_decode_fp8", "triton", "cpu", capability=(8, 9))

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def mla_decode(q: Tensor, states: Tensor, kv_lora_rank: int, scale: float, mask: Tensor | None = None) -> Tensor:
    """Computes attention of all heads on one shared sequence of keys, which are their own values.

    Args:
        q: [B, T, N, C + R], queries in the space of the latents.
        states: [B, S, C + R] of q's dtype; or uint8 [B, S, bytes] from `packed_latents.pack`, dequantized a tile at a
            time: by the reference to float32, by the kernels to q's dtype (so that float16 queries ask for latents
            within its range).
        kv_lora_rank: C.
        scale: of the scores.
        mask: see `deepseek_kernels.common.masks`; None is causal. A query that attends to nothing gives zeros. Keys
            outside of what the queries of one row of the batch see, from the first to the last, are not read by the
            kernels, whatever they hold.

    Returns:
        [B, T, N, C] in q's dtype, the weighted latents. Differentiable, through the reference, in q and in states that
        are not packed.

    Raises:
        ValueError: the shapes or the dtypes do not fit.
    """
    _check(q, states, kv_lora_rank, "states [B, S, ")
    if q.shape[0] != states.shape[0]:
        raise ValueError(f"expected a batch of {q.shape[0]} in states, as in q, got states {list(states.shape)}")
    if mask is not None:
        _check_mask(mask, q, states.shape[1])
    q, states = _autocast(q, states)
    chosen = _pick(q, states, kv_lora_rank, mask)
    if chosen == "cpu" and cpu.takes(q, states, mask, scale):
        return cpu.decode(q, states, kv_lora_rank, scale, mask)
    if chosen != "triton":
        return reference.decode(q, states, kv_lora_rank, scale, mask)
    from . import launch

    return launch.decode(q, states, kv_lora_rank, scale, mask)


def mla_decode_paged(
    q: Tensor, pages: Tensor, block_table: Tensor, lengths: Tensor, kv_lora_rank: int, scale: float
) -> Tensor:
    """Computes `mla_decode` on a cache in pages, causal, each row of the batch with its own length.

    Args:
        q: [B, T, N, C + R], the last T tokens of each row: query t sees `lengths - T + t + 1` keys.
        pages: [num_pages, P, C + R] of q's dtype, or uint8 [num_pages, P, bytes]. The kernels take pages of 16, 32, 64
            and so on; 64 is the size they are made for.
        block_table: int32 [B, max_pages], the page that holds the keys from P i to P i + P - 1 of a row. Entries from
            the row's length on may hold anything.
        lengths: int32 [B], tokens of each row; those beyond `max_pages` pages do not count.
        kv_lora_rank, scale: as for `mla_decode`.

    Returns:
        [B, T, N, C] in q's dtype, differentiable as that of `mla_decode`.

    Raises:
        ValueError: the shapes or the dtypes do not fit.
    """
    _check(q, pages, kv_lora_rank, "pages [num_pages, P, ")
    for name, tensor, shape in (
        ("block_table", block_table, (q.shape[0], block_table.shape[-1])),
        ("lengths", lengths, (q.shape[0],)),
    ):
        if tensor.dtype != torch.int32 or tuple(tensor.shape) != shape:
            raise ValueError(f"expected {name} int32 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
    q, pages = _autocast(q, pages)
    chosen = _pick(q, pages, kv_lora_rank, None, pages.shape[1])
    if chosen == "cpu" and cpu.takes(q, pages, None, scale, paged=True):
        return cpu.decode_paged(q, pages, block_table, lengths, kv_lora_rank, scale)
    if chosen != "triton":
        return reference.decode_paged(q, pages, block_table, lengths, kv_lora_rank, scale)
    from . import launch

    return launch.decode_paged(q, pages, block_table, lengths, kv_lora_rank, scale)


def _check(q: Tensor, states: Tensor, kv_lora_rank: int, what: str) -> None:
    if q.ndim != 4 or not 0 < kv_lora_rank < q.shape[3]:
        raise ValueError(f"expected q [B, T, N, C + R] for a latent of {kv_lora_rank}, got {list(q.shape)}")
    rotated, packed = q.shape[3] - kv_lora_rank, states.dtype == torch.uint8
    width = packed_bytes(kv_lora_rank, rotated) if packed else kv_lora_rank + rotated
    if states.ndim != 3 or states.shape[2] != width or not (packed or states.dtype.is_floating_point):
        packed_width = packed_bytes(kv_lora_rank, rotated)
        raise ValueError(
            f"expected {what}{kv_lora_rank + rotated}] or uint8 {what}{packed_width}] for q {list(q.shape)} and a "
            f"latent of {kv_lora_rank}, got {states.dtype} {list(states.shape)}"
        )


def _check_mask(mask: Tensor, q: Tensor, keys: int) -> None:
    batch, queries = q.shape[:2]
    if is_spans(mask):
        if mask.shape != (batch, queries, 2):
            raise ValueError(f"expected spans [{batch}, {queries}, 2], got {list(mask.shape)}")
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"expected a mask of int32 (spans), bool or floats, got {mask.dtype}")
    full = (batch, 1, queries, keys)
    fits = mask.ndim in (2, 4) and all(
        size in (1, most) for size, most in zip(mask.shape, full[-mask.ndim :], strict=True)
    )
    if not fits:
        raise ValueError(
            f"expected a mask for all heads, [T, S] or [B, 1, T, S], got {list(mask.shape)} for {list(full)}"
        )


def _autocast(q: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    kind = q.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        if states.dtype == torch.uint8:
            return dispatch.autocast(q)[0], states
        q, states = dispatch.autocast(q, states)
    if states.dtype == torch.uint8:
        return q, states
    if q.dtype != states.dtype:
        raise ValueError(f"expected q and states of one dtype, got {q.dtype} and {states.dtype}")
    return q, states


def _pick(q: Tensor, states: Tensor, kv_lora_rank: int, mask: Tensor | None, page: int | None = None) -> str:
    packed = states.dtype == torch.uint8
    op = "mla_decode_fp8" if packed else "mla_decode"
    return dispatch.pick(op, q.device, _unsupported(q, states, kv_lora_rank, mask, page))


def _unsupported(q: Tensor, states: Tensor, kv_lora_rank: int, mask: Tensor | None, page: int | None) -> str | None:
    """Returns the reason why the kernels cannot take these operands, or None."""
    rotated = q.shape[3] - kv_lora_rank
    if q.dtype not in _DTYPES:
        return f"its queries are bfloat16, float16 or float32, got {q.dtype}"
    if torch.is_grad_enabled() and (q.requires_grad or states.requires_grad):
        return "it has no gradient"
    if mask is not None and mask.is_floating_point():
        return "it has no additive mask"
    if kv_lora_rank > MOST_LATENT or rotated > MOST_ROTATED:
        return (
            f"its latents have at most {MOST_LATENT} features and rotated keys {MOST_ROTATED}, "
            f"got {kv_lora_rank} and {rotated}"
        )
    if page is not None and (page < 16 or page & (page - 1)):
        return f"its pages hold a power of two of tokens, at least 16, got {page}"
    if states.dtype == torch.uint8 and not aligned(states, kv_lora_rank):
        return f"its packed tokens begin at multiples of 4 bytes and so do their parts, got strides {states.stride()}"
    return None
