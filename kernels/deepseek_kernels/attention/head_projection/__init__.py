"""`queries_to_latents`, `latents_to_values`: the way of absorbed attention into the space of the latents and back, by
one matrix for each head.

B batch, T queries, N heads, P features of a head's own key, R rotated, V of a value, C latent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from ...common.fp8 import block_grid
from ...quant.fp8_quantize import dequantize_blocks
from . import cpu, reference

__all__ = ["latents_to_values", "queries_to_latents", "reads_codes"]

dispatch.register("head_projection", "cpu")


def reads_codes(x: Tensor, up: Tensor) -> bool:
    """Returns True if FP8 matrices are read as they are, not dequantized at each call: on a CPU, for few queries.

    Args:
        x: q or latents.
        up: [N, P + V, C] float8_e4m3fn.
    """
    return dispatch.pick("head_projection", x.device) == "cpu" and cpu.takes_codes(x, up)


def queries_to_latents(
    q: Tensor, up: Tensor, own: int, scale: Tensor | None = None, block_size: tuple[int, int] = (128, 128)
) -> Tensor:
    """Multiplies the first P features of each head by its matrix; the rotated ones stay as they are.

    Args:
        q: [B, T, N, P + R].
        up: [N, P + V, C], of q's dtype: `kv_b_proj` by heads, rows of keys before those of values. With `scale`
            float8_e4m3fn.
        own: P.
        scale: [ceil(N (P + V) / block_rows), ceil(C / block_columns)] float32, of the blocks of the matrix
            [N (P + V), C], which heads need not respect.

    Returns:
        [B, T, N, C + R], sums in float32 where q has 16 bits, rounded once. Differentiable in q, and in `up` if that is
        not FP8, through the reference, which rounds a dequantized matrix to q's dtype; the C++ operator does not.

    Raises:
        ValueError: the shapes or dtypes do not fit.
    """
    if q.ndim != 4 or up.ndim != 3 or not 0 <= own <= min(q.shape[3], up.shape[1]) or q.shape[2] != up.shape[0]:
        raise _misfit("q [B, T, N, P + R]", q, up, own)
    if scale is not None:
        _check_scale(up, scale, block_size)
        if reads_codes(q, up):
            return cpu.queries_to_latents(q, up, own, scale, *block_size)
        up = _dequantized(up, scale, block_size, q.dtype)
    if dispatch.pick("head_projection", q.device) == "cpu" and cpu.takes(q, up):
        return cpu.queries_to_latents(q, up, own)
    return torch.cat((reference.per_head(q[..., :own], up[:, :own]), q[..., own:]), dim=-1)


def latents_to_values(
    latents: Tensor, up: Tensor, own: int, scale: Tensor | None = None, block_size: tuple[int, int] = (128, 128)
) -> Tensor:
    """Multiplies the weighted latents of each head by its matrix.

    Args:
        latents: [B, T, N, C].
        up, own, scale, block_size: as for `queries_to_latents`.

    Returns:
        [B, T, N, V], rounded and differentiable as there.

    Raises:
        ValueError: the shapes or dtypes do not fit.
    """
    if up.ndim != 3 or not 0 <= own <= up.shape[1] or latents.shape[2:] != up.shape[::2] or latents.ndim != 4:
        raise _misfit("latents [B, T, N, C]", latents, up, own)
    if scale is not None:
        _check_scale(up, scale, block_size)
        if reads_codes(latents, up):
            return cpu.latents_to_values(latents, up, own, scale, *block_size)
        up = _dequantized(up, scale, block_size, latents.dtype)
    if dispatch.pick("head_projection", latents.device) == "cpu" and cpu.takes(latents, up):
        return cpu.latents_to_values(latents, up, own)
    return reference.per_head(latents, up[:, own:].transpose(1, 2))


def _dequantized(up: Tensor, scale: Tensor, block_size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return dequantize_blocks(up.flatten(0, 1), scale, block_size, dtype).view(up.shape)


def _check_scale(up: Tensor, scale: Tensor, block_size: tuple[int, int]) -> None:
    grid = block_grid((up.shape[0] * up.shape[1], up.shape[2]), block_size)
    if up.dtype != torch.float8_e4m3fn or scale.dtype != torch.float32 or scale.shape != grid:
        raise ValueError(
            f"expected a float8_e4m3fn up and float32 scales {list(grid)} for its blocks of {list(block_size)}, got "
            f"{up.dtype} and {scale.dtype} {list(scale.shape)}"
        )


def _misfit(what: str, x: Tensor, up: Tensor, own: int) -> ValueError:
    shapes = f"{list(x.shape)} and {list(up.shape)}"
    return ValueError(f"expected {what} and up [N, P + V, C] for {own} features of a key, got {shapes}")
