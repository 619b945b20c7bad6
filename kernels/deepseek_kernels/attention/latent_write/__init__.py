"""`latent_write`: the norm of the latent, the rotation of the shared key, and both into the cache, in one reading.

These are all steps between `kv_a_proj_with_mqa` and attention when no gradient is needed: otherwise four passes over
the tokens, and two more for a cache in FP8 (`packed_latents`). Both are rounded to the dtype of the projection first
and then stored as `LatentCache` stores them: the unfused steps give the same result. The kernels sum a row in the order
of `rms_norm`'s, which makes it the same to the bit.

A token with a negative slot, or with one beyond the capacity, is not stored: whether there are any cannot be known
without waiting for the device. Of two tokens with one slot, either may stay.

B batch, T tokens, C kv_lora_rank, R qk_rope_head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from ..packed_latents import aligned, packed_bytes
from . import cpu, reference

__all__ = ["latent_write", "latent_write_paged"]

dispatch.register("latent_write", "triton", "cpu")
# The same kernel, storing FP8. 8.9: the first with conversions from float32 to e4m3.
dispatch.register("latent_write_fp8", "triton", "cpu", capability=(8, 9))

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST_LATENT, _MOST_ROTATED = 4096, 1024  # a token is held in the registers of a few warps


def latent_write(
    kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, buffer: Tensor, slots: Tensor
) -> None:
    """Stores new tokens in a cache that has one stretch of memory for each row of the batch.

    Args:
        kv: [B, T, C + R], the output of `kv_a_proj_with_mqa`: latents, then keys that are shared by all heads.
        weight: [C], of the latent's norm.
        eps: of the latent's norm.
        cos, sin: float32 [B or 1, T, R / 2]; the key's pairs are interleaved (TRAPS A1).
        buffer: [B, capacity, C + R] in a floating dtype, or uint8 [B, capacity, bytes] from `packed_latents.pack`.
        slots: int64 [B or 1, T], the place of each token in its row; tokens outside of the row are not stored.

    Raises:
        ValueError: the shapes or dtypes do not fit, or kv or weight require a gradient.
    """
    _check(kv, weight, cos, sin, buffer, slots)
    if buffer.shape[0] != kv.shape[0]:
        raise ValueError(f"expected a buffer for {kv.shape[0]} rows, as kv has, got {list(buffer.shape)}")
    _implementation(kv, weight, buffer).write(kv, weight, eps, cos, sin, buffer, slots, False)


def latent_write_paged(
    kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, pages: Tensor, slots: Tensor
) -> None:
    """Stores new tokens in a cache of pages, which belong to any row of the batch, as `latent_write`.

    Args:
        kv, weight, eps, cos, sin: as for `latent_write`.
        pages: [num_pages, P, C + R] in a floating dtype, or uint8 [num_pages, P, bytes].
        slots: int64 [B or 1, T], `page * P + offset` for each token; those outside of all pages are not stored.

    Raises:
        ValueError: the shapes or dtypes do not fit, or kv or weight require a gradient.
    """
    _check(kv, weight, cos, sin, pages, slots)
    _implementation(kv, weight, pages).write(kv, weight, eps, cos, sin, pages, slots, True)


def _check(kv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, buffer: Tensor, slots: Tensor) -> None:
    fits = kv.ndim == 3 and weight.ndim == 1 and 0 < weight.shape[0] <= kv.shape[2]
    if not fits or (kv.shape[2] - weight.shape[0]) % 2:
        raise ValueError(
            f"expected kv [B, T, C + R] and weight [C], R even, got {list(kv.shape)}, {list(weight.shape)}"
        )
    for name, tensor in (("kv", kv), ("weight", weight)):
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"expected {name} in a floating dtype, got {tensor.dtype}")
    (batch, tokens, width), latent = kv.shape, weight.shape[0]
    for name, tensor, dtype, last in (
        ("cos", cos, torch.float32, ((width - latent) // 2,)),
        ("sin", sin, torch.float32, ((width - latent) // 2,)),
        ("slots", slots, torch.int64, ()),
    ):
        if tensor.dtype != dtype or tensor.shape not in ((batch, tokens, *last), (1, tokens, *last)):
            expected = ", ".join(map(str, (f"{batch} or 1", tokens, *last)))
            raise ValueError(f"expected {name} {dtype} [{expected}], got {tensor.dtype} {list(tensor.shape)}")
    stored = packed_bytes(latent, width - latent) if buffer.dtype == torch.uint8 else width
    if (
        buffer.ndim != 3
        or buffer.shape[2] != stored
        or not (buffer.dtype == torch.uint8 or buffer.dtype.is_floating_point)
    ):
        packed = packed_bytes(latent, width - latent)
        raise ValueError(
            f"expected a cache [.., .., {width}] in a floating dtype or uint8 [.., .., {packed}], "
            f"got {buffer.dtype} {list(buffer.shape)}"
        )
    if torch.is_grad_enabled() and (kv.requires_grad or weight.requires_grad):
        raise ValueError(
            "expected no gradient through a cache that is written in place, got kv or weight that require one: "
            "use torch.no_grad()"
        )


def _implementation(kv: Tensor, weight: Tensor, buffer: Tensor):
    op = "latent_write_fp8" if buffer.dtype == torch.uint8 else "latent_write"
    chosen = dispatch.pick(op, kv.device, _obstacle(kv, weight, buffer))
    if chosen == "cpu" and cpu.takes(kv, weight, buffer):
        return cpu
    if chosen != "triton":
        return reference
    from . import launch

    return launch


def _obstacle(kv: Tensor, weight: Tensor, buffer: Tensor) -> str | None:
    for name, tensor in (("kv", kv), ("weight", weight), ("cache", buffer)):
        if tensor.dtype not in _DTYPES and not (tensor is buffer and tensor.dtype == torch.uint8):
            return f"its {name} is bfloat16, float16 or float32, got {tensor.dtype}"
    latent, rotated = weight.shape[0], kv.shape[2] - weight.shape[0]
    if latent > _MOST_LATENT or rotated > _MOST_ROTATED:
        return f"its latents have {_MOST_LATENT} features at most and its keys {_MOST_ROTATED}, got {latent}, {rotated}"
    if buffer.stride(2) != 1:
        return f"it writes tokens that are in one piece, got a cache with strides {buffer.stride()}"
    if buffer.dtype == torch.uint8 and not aligned(buffer, latent):
        return f"scales need tokens and latents of a multiple of 4 bytes, got {latent} in strides {buffer.stride()}"
    return None
