"""`queries_to_latents`, `latents_to_values`: the way of absorbed attention into the space of the latents and back, by
one matrix for each head.

B batch, T queries, N heads, P features of a head's own key, R rotated, V of a value, C latent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from . import cpu, reference

__all__ = ["latents_to_values", "queries_to_latents"]

dispatch.register("head_projection", "cpu")


def queries_to_latents(q: Tensor, up: Tensor, own: int) -> Tensor:
    """Multiplies the first P features of each head by its matrix; the rotated ones stay as they are.

    Args:
        q: [B, T, N, P + R].
        up: [N, P + V, C], of q's dtype: `kv_b_proj` by heads, rows of keys before those of values.
        own: P.

    Returns:
        [B, T, N, C + R], sums in float32 where q has 16 bits, rounded once. Differentiable, through the reference.

    Raises:
        ValueError: the shapes do not fit.
    """
    if q.ndim != 4 or up.ndim != 3 or not 0 <= own <= min(q.shape[3], up.shape[1]) or q.shape[2] != up.shape[0]:
        raise _misfit("q [B, T, N, P + R]", q, up, own)
    if dispatch.pick("head_projection", q.device) == "cpu" and cpu.takes(q, up):
        return cpu.queries_to_latents(q, up, own)
    return torch.cat((reference.per_head(q[..., :own], up[:, :own]), q[..., own:]), dim=-1)


def latents_to_values(latents: Tensor, up: Tensor, own: int) -> Tensor:
    """Multiplies the weighted latents of each head by its matrix.

    Args:
        latents: [B, T, N, C].
        up, own: as for `queries_to_latents`.

    Returns:
        [B, T, N, V], rounded and differentiable as there.

    Raises:
        ValueError: the shapes do not fit.
    """
    if up.ndim != 3 or not 0 <= own <= up.shape[1] or latents.shape[2:] != up.shape[::2] or latents.ndim != 4:
        raise _misfit("latents [B, T, N, C]", latents, up, own)
    if dispatch.pick("head_projection", latents.device) == "cpu" and cpu.takes(latents, up):
        return cpu.latents_to_values(latents, up, own)
    return reference.per_head(latents, up[:, own:].transpose(1, 2))


def _misfit(what: str, x: Tensor, up: Tensor, own: int) -> ValueError:
    shapes = f"{list(x.shape)} and {list(up.shape)}"
    return ValueError(f"expected {what} and up [N, P + V, C] for {own} features of a key, got {shapes}")
