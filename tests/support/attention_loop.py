"""Attention as its definition says, one query at a time in float64, and operands for its tests."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assert_attention", "attend", "gradients", "operands", "visible"]


def visible(batch: int, queries: int, keys: int, mask: Tensor | None) -> Tensor:
    """What None or spans mean: bool [B, T, S]."""
    seen = torch.zeros(batch, queries, keys, dtype=torch.bool)
    for b in range(batch):
        for t in range(queries):
            first, last = (0, keys - queries + t + 1) if mask is None else mask[b, t].tolist()
            for s in range(max(first, 0), min(last, keys)):
                seen[b, t, s] = True
    return seen


def attend(
    q: Tensor,
    kv: Tensor,
    key: Tensor,
    scale: float,
    mask: Tensor | None = None,
    seen: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """[B, T, N, V] in float64. Keys that are not seen are never touched, whatever they hold.

    Args:
        seen: bool [B, T, S]; what `mask` means if not given.
        bias: [B, T, S], added to the scores.
    """
    batch, queries, heads, width = q.shape
    own = width - key.shape[2]
    seen = visible(batch, queries, kv.shape[1], mask) if seen is None else seen
    rows = []
    for b in range(batch):
        for t in range(queries):
            at = seen[b, t].nonzero()[:, 0]
            k = torch.cat((kv[b, at, :, :own], key[b, at, None].expand(-1, heads, -1)), -1).double()  # [s, N, P + R]
            scores = torch.einsum("nd,snd->ns", q[b, t].double(), k) * scale
            if bias is not None:
                scores = scores + bias[b, t, at]
            rows.append(torch.einsum("ns,snv->nv", scores.softmax(-1), kv[b, at, :, own:].double()))
    return torch.stack(rows).view(batch, queries, heads, -1) if rows else q.new_zeros(0).double()


def gradients(
    q: Tensor,
    kv: Tensor,
    key: Tensor,
    scale: float,
    grad: Tensor,
    mask: Tensor | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The loop's result and its gradients of q, kv and key."""
    wide = [x.detach().cpu().double().requires_grad_() for x in (q, kv, key)]
    out = attend(*wide, scale, None if mask is None else mask.cpu(), None if seen is None else seen.cpu())
    return out.detach(), *torch.autograd.grad(out, wide, grad.cpu().double())


def bounds(
    q: Tensor, kv: Tensor, key: Tensor, scale: float, grad: Tensor, seen: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """How much the result and the gradients of q, kv and key may be off, element by element.

    Each is a sum of products whose factors have been rounded a few times to `dtype`, summed in float32 (or `dtype`, if
    that is finer) in any order: what counts is the sum of the absolute terms, before they cancel. The weights
    exp(scores) have, on top of it, the absolute error of the scores.
    """
    own = q.shape[3] - key.shape[2]
    q, kv, key, grad = (x.detach().cpu().double() for x in (q, kv, key, grad))
    k = torch.cat((kv[..., :own], key[:, :, None].expand(-1, -1, kv.shape[2], -1)), -1)
    scores = torch.einsum("btnd,bsnd->bnts", q, k) * scale
    p = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1).nan_to_num(0)
    q, k, v, grad = q.abs(), k.abs(), kv[..., own:].abs(), grad.abs()
    out = torch.einsum("bnts,bsnv->btnv", p, v)
    delta = (out * grad).sum(-1).transpose(1, 2)[..., None]
    ds = p * (torch.einsum("btnv,bsnv->bnts", grad, v) + delta) * scale
    dk, dv = torch.einsum("bnts,btnd->bsnd", ds, q), torch.einsum("bnts,btnv->bsnv", p, grad)
    terms = (
        out,
        torch.einsum("bnts,bsnd->btnd", ds, k),
        torch.cat((dk[..., :own], dv), -1),
        dk[..., own:].sum(2),
    )
    depth = max(q.shape[3], *kv.shape[1:3], q.shape[1])
    unit = 4 * torch.finfo(dtype).eps + depth * min(torch.finfo(torch.float32).eps, torch.finfo(dtype).eps)
    size = 1 + (torch.einsum("btnd,bsnd->bnts", q, k) * scale * seen[:, None]).amax()
    return tuple(unit * size * x + 1e-30 for x in terms)


def assert_attention(
    found: tuple[Tensor, ...],
    q: Tensor,
    kv: Tensor,
    key: Tensor,
    scale: float,
    grad: Tensor,
    mask: Tensor | None = None,
    seen: Tensor | None = None,
) -> None:
    """Asserts that `found`, the result and the gradients of q, kv and key, are the loop's, within their `bounds`."""
    shown = None if mask is None else mask.cpu()
    seen = visible(q.shape[0], q.shape[1], kv.shape[1], shown) if seen is None else seen
    right = gradients(q, kv, key, scale, grad, seen=seen)
    for name, got, want, bound in zip(
        ("result", "gradient of q", "gradient of kv", "gradient of key"),
        found,
        right,
        bounds(q, kv, key, scale, grad, seen, q.dtype),
        strict=True,
    ):
        assert got.dtype == q.dtype and got.shape == want.shape, name
        excess = (got.detach().cpu().double() - want).abs() / bound
        assert (excess <= 1).all(), f"{name} is off by {excess.max():.3g} times its bound"  # also where it is NaN


def operands(
    batch: int, queries: int, keys: int, heads: int, sizes: tuple[int, int, int], dtype: torch.dtype, device=None
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, kv and key for P, R and V; they want gradients."""
    own, rotated, value = sizes
    shapes = (batch, queries, heads, own + rotated), (batch, keys, heads, own + value), (batch, keys, rotated)
    return tuple(torch.randn(shape, dtype=dtype).to(device).requires_grad_() for shape in shapes)  # type: ignore[return-value]
