"""Attention by its definition, one query at a time in float64, and operands for its tests."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assert_attention", "attend", "gradients", "operands", "visible"]

Mask = Tensor | None


def visible(batch: int, queries: int, keys: int, mask: Mask) -> Tensor:
    """Returns the keys that each query attends to under spans or None (causal), bool [B, T, S]."""
    seen = torch.zeros(batch, queries, keys, dtype=torch.bool)
    for b in range(batch):
        for t in range(queries):
            first, last = (0, keys - queries + t + 1) if mask is None else mask[b, t].tolist()
            for s in range(max(first, 0), min(last, keys)):
                seen[b, t, s] = True
    return seen


def attend(
    q: Tensor, kv: Tensor, key: Tensor, scale: float, mask: Mask = None, seen: Mask = None, bias: Mask = None
) -> Tensor:
    """Returns attention [B, T, N, V] in float64. Keys that are not seen are never read, whatever their values.

    Args:
        seen: bool [B, T, S]; `visible` of `mask` if not given.
        bias: [B, T, S], added to the scores.
    """
    batch, queries, heads, width = q.shape
    nope = width - key.shape[2]
    seen = visible(batch, queries, kv.shape[1], mask) if seen is None else seen
    rows = []
    for b in range(batch):
        for t in range(queries):
            at = seen[b, t].nonzero()[:, 0]
            k = torch.cat((kv[b, at, :, :nope], key[b, at, None].expand(-1, heads, -1)), -1).double()  # [s, N, P + R]
            scores = torch.einsum("nd,snd->ns", q[b, t].double(), k) * scale
            if bias is not None:
                scores = scores + bias[b, t, at]
            rows.append(torch.einsum("ns,snv->nv", scores.softmax(-1), kv[b, at, :, nope:].double()))
    return torch.stack(rows).view(batch, queries, heads, -1) if rows else q.new_zeros(0).double()


def gradients(
    q: Tensor, kv: Tensor, key: Tensor, scale: float, grad: Tensor, mask: Mask = None, seen: Mask = None
) -> tuple[Tensor, ...]:
    """Returns the loop's result and its gradients of q, kv and key."""
    wide = [x.detach().cpu().double().requires_grad_() for x in (q, kv, key)]
    out = attend(*wide, scale, None if mask is None else mask.cpu(), None if seen is None else seen.cpu())
    return out.detach(), *torch.autograd.grad(out, wide, grad.cpu().double())


def bounds(
    q: Tensor, kv: Tensor, key: Tensor, scale: float, grad: Tensor, seen: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Returns the largest error of the result and the gradients of q, kv and key, element by element.

    Each is a sum of products whose factors have been rounded a few times to `dtype`, added in float32 (or `dtype`, if
    that is finer) in any order: the bound is relative to the sum of the absolute terms, before they cancel. The weights
    exp(scores) have the absolute error of the scores in addition.
    """
    nope = q.shape[3] - key.shape[2]
    q, kv, key, grad = (x.detach().cpu().double() for x in (q, kv, key, grad))
    k = torch.cat((kv[..., :nope], key[:, :, None].expand(-1, -1, kv.shape[2], -1)), -1)
    scores = torch.einsum("btnd,bsnd->bnts", q, k) * scale
    p = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1).nan_to_num(0)
    q, k, v, grad = q.abs(), k.abs(), kv[..., nope:].abs(), grad.abs()
    out = torch.einsum("bnts,bsnv->btnv", p, v)
    delta = (out * grad).sum(-1).transpose(1, 2)[..., None]
    ds = p * (torch.einsum("btnv,bsnv->bnts", grad, v) + delta) * scale
    dk, dv = torch.einsum("bnts,btnd->bsnd", ds, q), torch.einsum("bnts,btnv->bsnv", p, grad)
    terms = (
        out,
        torch.einsum("bnts,bsnd->btnd", ds, k),
        torch.cat((dk[..., :nope], dv), -1),
        dk[..., nope:].sum(2),
    )
    depth = max(q.shape[3], *kv.shape[1:3], q.shape[1])
    unit = 4 * torch.finfo(dtype).eps + depth * min(torch.finfo(torch.float32).eps, torch.finfo(dtype).eps)
    size = 1 + (torch.einsum("btnd,bsnd->bnts", q, k) * scale * seen[:, None]).amax()
    return tuple(unit * size * x + 1e-30 for x in terms)


def assert_attention(
    results: tuple[Tensor, ...],
    q: Tensor,
    kv: Tensor,
    key: Tensor,
    scale: float,
    grad: Tensor,
    mask: Tensor | None = None,
    seen: Tensor | None = None,
) -> None:
    """Asserts that the results, attention and the gradients of q, kv and key, are the loop's, within their `bounds`."""
    shown = None if mask is None else mask.cpu()
    seen = visible(q.shape[0], q.shape[1], kv.shape[1], shown) if seen is None else seen
    right = gradients(q, kv, key, scale, grad, seen=seen)
    for name, got, want, bound in zip(
        ("result", "gradient of q", "gradient of kv", "gradient of key"),
        results,
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
    """Returns normal q, kv and key for the sizes P, R and V; they require gradients."""
    nope, rope, value = sizes
    shapes = (batch, queries, heads, nope + rope), (batch, keys, heads, nope + value), (batch, keys, rope)
    return tuple(torch.randn(shape, dtype=dtype).to(device).requires_grad_() for shape in shapes)  # type: ignore[return-value]
