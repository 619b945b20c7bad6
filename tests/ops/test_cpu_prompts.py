"""The C++ operators that attend with many queries, forward and gradients, against a plain loop in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from deepseek_kernels import mla_attention, mla_decode, sparse_mla, topk_select, use_backend
from deepseek_kernels.attention.mla_attention import cpu
from deepseek_kernels.attention.packed_latents import pack, unpack
from deepseek_kernels.testing.numeric import assert_bitwise
from support.attention_loop import assert_attention, operands
from support.cpu_operators import cpu_instructions, on_two_threads

TINY, PUBLISHED = (32, 16, 32), (128, 64, 128)  # P, R, V
LATENT, ROTATED = 64, 16
NAN = float("nan")


@pytest.fixture(params=["native", "portable"], autouse=True)
def instructions(request, cpu_backend) -> Iterator[str]:
    with cpu_instructions(request.param):
        yield request.param


def run(q, kv, key, grad, mask=None, scale=0.2) -> tuple[Tensor, ...]:
    """The result, and the gradients of q, kv and key."""
    out = mla_attention(q, kv, key, scale, mask)
    return out, *torch.autograd.grad(out, (q, kv, key), grad)


def case(batch, queries, keys, heads, sizes, dtype) -> tuple[Tensor, ...]:
    return *operands(batch, queries, keys, heads, sizes, dtype), torch.randn(batch, queries, heads, sizes[2]).to(dtype)


def check(q, kv, key, grad, mask=None, seen=None) -> None:
    assert cpu.takes(q, kv, key, 0.2, mask, 0.0)
    assert_attention(run(q, kv, key, grad, mask), q, kv, key, 0.2, grad, mask, seen)


def documents(batch: int, tokens: int, starts: list[int]) -> Tensor:
    """Spans of packed documents that begin there."""
    first = torch.tensor([max(start for start in starts if start <= t) for t in range(tokens)])
    return torch.stack((first, torch.arange(tokens) + 1), -1).int().expand(batch, -1, -1)


def scattered(batch: int, queries: int, keys: int) -> Tensor:
    """Random spans, some empty and some beyond the keys."""
    first = torch.randint(-3, keys + 2, (batch, queries))
    return torch.stack((first, first + torch.randint(-1, keys, (batch, queries))), -1).int()


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [TINY, (24, 10, 20), (3, 2, 1), (5, 1, 33)])
def test_sizes_and_dtypes(dtype, sizes):
    check(*case(2, 3, 5, 2, sizes, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [(1, 1), (1, 40), (64, 64), (65, 129), (20, 7), (300, 300)],  # 20 on 7: some see nothing; 300: two blocks
)
def test_causal_attention(dtype, queries, keys):
    check(*case(1, queries, keys, 1, TINY, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_published_sizes(dtype):
    check(*case(1, 70, 140, 2, PUBLISHED, dtype))
    check(*case(1, 40, 40, 2, PUBLISHED, dtype), documents(1, 40, [0, 7, 8, 30]))


SPANS = {
    "documents": (documents(2, 140, [0, 1, 17, 130]), 140),
    "scattered": (scattered(2, 70, 140), 140),
    "left padding": (torch.tensor([[(2, 6), (2, 7)], [(0, 6), (0, 7)]]).int(), 7),
    "rows of a cache": (torch.tensor([[(0, 3), (0, 4)], [(0, 6), (0, 7)]]).int(), 7),
    "nothing is seen": (torch.zeros(1, 3, 2).int(), 4),
    "one row sees nothing": (torch.tensor([[(0, 0), (0, 7)], [(1, 2), (6, 6)]]).int(), 7),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SPANS)
def test_spans(dtype, name):
    spans, keys = SPANS[name]
    check(*case(*spans.shape[:2], keys, 2, TINY, dtype), spans)


@pytest.mark.parametrize("shape", [(70, 140), (1, 1, 70, 140), (2, 1, 70, 140), (2, 1, 1, 140), (2, 1, 70, 1)])
def test_masks(shape):
    mask = torch.rand(shape) < 0.4
    seen = mask.expand(2, 1, 70, 140)[:, 0]
    check(*case(2, 70, 140, 2, TINY, torch.bfloat16), mask, seen)


def test_a_mask_may_hide_whole_tiles():
    mask = torch.zeros(1, 1, 130, 600, dtype=torch.bool)
    mask[..., :64, 400:] = True
    check(*case(1, 130, 600, 1, TINY, torch.float32), mask, mask[:, 0])


def test_small_integers_exactly(instructions):
    """All keys that a query sees, 1, 2, 4, 8 or 16, have one score: every number below is exact in bfloat16."""
    if instructions == "portable" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("its exponential is not exact")
    queries, keys, (own, rotated, value) = 40, 70, TINY
    count = 2 ** torch.randint(0, 5, (1, queries))
    first = (torch.rand(1, queries) * (keys - count)).long()
    spans = torch.stack((first, first + count), -1).int()
    q = torch.zeros(1, queries, 1, own + rotated)
    q[..., :8] = torch.randint(-2, 3, (1, queries, 1, 8)).float()
    k = torch.randint(-3, 4, (1, keys, own + rotated)).float()
    k[..., :8] = torch.randint(-2, 3, (8,)).float()
    v = 16.0 * torch.randint(-3, 4, (1, keys, value))
    inputs = (x.bfloat16() for x in (q, torch.cat((k[..., :own], v), -1)[:, :, None], k[..., own:].contiguous()))
    out = mla_attention(*inputs, 0.6931471805599453, spans)  # times log2(e) it is 1
    for t, (begin, end) in enumerate(spans[0].tolist()):
        assert torch.equal(out[0, t, 0].float(), v[0, begin:end].mean(0))


# Hostile operands.


def test_what_no_query_sees_may_be_anything():
    spans = torch.tensor([[[5, 8], [7, 40], [6, 30]] * 2]).int()
    q, kv, key, grad = case(1, 6, 50, 2, TINY, torch.bfloat16)
    want = run(q, kv, key, grad, spans)

    def spoiled(x: Tensor) -> Tensor:
        room = torch.full((x.shape[0], x.shape[1] + 9, *x.shape[2:]), NAN, dtype=x.dtype)
        room[:, 5:40] = x.detach()[:, 5:40]
        return room[:, : x.shape[1]].requires_grad_()

    for got, right in zip(run(q, spoiled(kv), spoiled(key), grad, spans), want, strict=True):
        assert_bitwise(got, right)
    assert not want[2][:, :5].any() and not want[2][:, 40:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_a_mask_hides_from_all_at_both_ends_may_be_anything(dtype):
    mask = torch.rand(2, 1, 70, 150) < 0.5
    mask[..., :5], mask[..., 140:], mask[1, 0, 7] = False, False, False
    q, kv, key, grad = case(2, 70, 150, 2, TINY, dtype)
    want = run(q, kv, key, grad, mask)
    latents = torch.randn(2, 150, LATENT + ROTATED).to(dtype)
    queries = torch.randn(2, 70, 3, LATENT + ROTATED).to(dtype)
    calls = [(queries, mask), (queries[:, :4], mask[:, :, :4])]  # many queries, and few
    decoded = [mla_decode(some, latents, LATENT, 0.2, seen) for some, seen in calls]
    with torch.no_grad():
        for x in (kv, key, latents):
            x[:, :5] = x[:, 140:] = NAN
    for got, right in zip(run(q, kv, key, grad, mask), want, strict=True):
        assert_bitwise(got, right)
    for (some, seen), right in zip(calls, decoded, strict=True):
        assert_bitwise(mla_decode(some, latents, LATENT, 0.2, seen), right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_queries_that_see_nothing_reach_no_gradient(dtype):
    spans = torch.tensor([[[0, 5], [2, 2], [0, 7], [9, 12]]]).int()
    q, kv, key, grad = case(1, 4, 7, 2, TINY, dtype)
    want = run(q, kv, key, grad, spans)
    with torch.no_grad():
        q[:, 1], grad[:, 1], grad[:, 3] = NAN, NAN, torch.inf
    for got, right in zip(run(q, kv, key, grad, spans), want, strict=True):
        assert_bitwise(got, right)
    assert not want[1][:, 1].any()


def test_a_score_that_is_not_a_number_makes_its_row_one():
    q, kv, key, _ = (x.detach() for x in case(1, 70, 70, 1, TINY, torch.bfloat16))
    q[0, 40, 0, 3] = NAN
    out = mla_attention(q, kv, key, 0.2)
    assert out[0, 40].isnan().all() and not out[0, :40].isnan().any() and not out[0, 41:].isnan().any()


LAYOUTS = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim == 4 else x,
    "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns of something wider": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "columns apart": lambda x: torch.stack((x, x), -1)[..., 0],
    "off by two bytes": lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view_as(x),
    "one row repeated": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name):
    change = LAYOUTS[name]
    q, kv, key, grad = case(2, 3, 5, 2, TINY, torch.bfloat16)
    q, kv, key = (change(x.detach()).requires_grad_() for x in (q, kv, key))
    check(q, kv, key, change(grad))


def test_gradient_of_a_sum():
    q, kv, key, grad = case(1, 3, 5, 2, TINY, torch.float32)
    out = mla_attention(q, kv, key, 0.2)
    found = torch.autograd.grad(out.sum(), (q, kv, key))
    assert_attention((out, *found), q, kv, key, 0.2, torch.ones_like(grad))


def test_one_gradient_alone():
    q, kv, key, grad = case(1, 9, 9, 2, TINY, torch.float32)
    every = run(q, kv, key, grad)[1:]
    for i, one in enumerate((q, kv, key)):
        others = [x if x is one else x.detach() for x in (q, kv, key)]
        (alone,) = torch.autograd.grad(mla_attention(*others, 0.2), one, grad)
        assert_bitwise(alone, every[i])


# Threads, other rows, and blocks change nothing.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_results_do_not_depend_on_threads(dtype):
    inputs = case(2, 300, 300, 3, TINY, dtype)
    for mask in (None, documents(2, 300, [0, 90, 250]), torch.rand(2, 1, 300, 300) < 0.5):
        for got, want in zip(on_two_threads(lambda m=mask: run(*inputs, m)), run(*inputs, mask), strict=True):
            assert_bitwise(got, want)


def test_rows_of_a_batch_do_not_depend_on_others():
    q, kv, key, grad = case(2, 130, 140, 2, TINY, torch.bfloat16)
    together = run(q, kv, key, grad)
    for b in range(2):
        alone = run(*(x.detach()[b : b + 1].requires_grad_() for x in (q, kv, key)), grad[b : b + 1])
        for got, want in zip(alone, together, strict=True):
            assert_bitwise(got[0], want[b])


# Latents that all heads share.


def states(batch: int, keys: int, dtype: torch.dtype, packed: bool) -> Tensor:
    plain = torch.randn(batch, keys, LATENT + ROTATED).to(dtype)
    with use_backend("reference"):
        return pack(plain, LATENT) if packed else plain


def expected(q: Tensor, keys: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Attention of q [B, T, N, C + R] on the latents that each query sees, bool [B, T, S]."""
    scores = torch.einsum("btnd,bsd->btns", q.double(), keys.double()) * scale
    weights = scores.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("btns,bsc->btnc", weights, keys[..., :LATENT].double())


def assert_close(got: Tensor, want: Tensor) -> None:
    """Outputs are convex combinations of values: rounding is relative to their size, with some for the exponentials."""
    assert (got.double() - want).abs().max() <= 16 * torch.finfo(got.dtype).eps * want.abs().max()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_queries_on_latents(dtype, packed):
    q, keys = torch.randn(2, 40, 5, LATENT + ROTATED).to(dtype), states(2, 150, dtype, packed)
    meant = torch.cat(unpack(keys, LATENT, torch.float32), -1) if packed else keys
    spans, mask, index = scattered(2, 40, 150), torch.rand(2, 1, 40, 150) < 0.5, torch.arange(150)
    causal = (index <= torch.arange(110, 150)[:, None]).expand(2, -1, -1)
    in_spans = (index >= spans[..., :1]) & (index < spans[..., 1:])
    for given, seen in ((None, causal), (spans, in_spans), (mask, mask[:, 0])):
        got = mla_decode(q, keys, LATENT, 0.2, given)
        assert_close(got, expected(q, meant, seen, 0.2))
        assert_bitwise(on_two_threads(lambda g=given: mla_decode(q, keys, LATENT, 0.2, g)), got)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "queries", "heads", "keys", "top_k"), [(2, 3, 3, 150, 90), (1, 13, 70, 13, 5), (2, 4, 2, 9, 9)]
)
def test_selected_keys(dtype, packed, batch, queries, heads, keys, top_k):
    q, cached = torch.randn(batch, queries, heads, LATENT + ROTATED).to(dtype), states(batch, keys, dtype, packed)
    ids = topk_select(torch.randn(batch, queries, keys), top_k)
    ids[:, 0] = -1  # sees nothing
    unread = torch.ones(batch, keys, dtype=torch.bool)
    for b in range(batch):
        unread[b, ids[b][ids[b] >= 0].long()] = False
    cached[unread] = 255 if packed else NAN
    meant = torch.cat(unpack(cached, LATENT, torch.float32), -1) if packed else cached
    seen = torch.zeros(batch, queries, keys + 1, dtype=torch.bool)
    seen = seen.scatter_(-1, torch.where(ids < 0, keys, ids).long(), True)[..., :keys]
    got = sparse_mla(q, cached, ids, LATENT, 0.2)
    assert not got[:, 0].any()
    assert_close(got, expected(q, meant.masked_fill(unread[..., None], 0), seen, 0.2))
    assert_bitwise(on_two_threads(lambda: sparse_mla(q, cached, ids, LATENT, 0.2)), got)


def test_compiled_code_takes_them_as_they_are():
    torch.library.opcheck(
        torch.ops.deepseek_kernels_cpu.mla_attention.default,
        (*operands(1, 5, 6, 2, TINY, torch.float32), None, 0.2),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
