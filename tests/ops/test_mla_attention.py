"""Attention on per-head keys and values: its meaning, on the reference, against a plain loop in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepseek_kernels import BackendError, dispatch, use_backend
from deepseek_kernels.attention.mla_attention import configs, mla_attention
from support.attention_loop import assert_attention, attend, operands

SIZES = (6, 4, 5)  # P, R, V: nothing is a power of two or as wide as anything else


def check(q: Tensor, kv: Tensor, key: Tensor, mask: Tensor | None = None, seen: Tensor | None = None) -> None:
    """Result and gradients against the loop; `seen` [B, T, S] is what `mask` means."""
    grad = torch.randn(*q.shape[:3], kv.shape[3] - q.shape[3] + key.shape[2], dtype=q.dtype)
    out = mla_attention(q, kv, key, 0.3, mask)
    found = out, *torch.autograd.grad(out, (q, kv, key), grad)
    assert_attention(found, q, kv, key, 0.3, grad, mask, seen)


@pytest.fixture(autouse=True)
def reference():
    with use_backend("reference"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("batch", "queries", "keys"),
    [
        (1, 1, 1),  # the first token
        (2, 7, 7),
        (1, 1, 9),  # one query behind a cache
        (2, 3, 9),  # a chunk behind a cache (TRAPS B8)
        (1, 5, 3),  # more queries than keys: the first two see nothing
    ],
)
def test_causal_attention(dtype, batch, queries, keys):
    check(*operands(batch, queries, keys, 3, SIZES, dtype))


@pytest.mark.parametrize(("own", "rotated", "value"), [(6, 4, 12), (6, 4, 10), (1, 2, 1), (5, 2, 0)])
def test_values_may_be_wider_or_narrower_than_keys(own, rotated, value):
    q, kv, key = operands(1, 4, 4, 2, (own, rotated, value), torch.float32)
    if value:
        check(q, kv, key)
    else:
        assert mla_attention(q, kv, key, 0.3).shape == (1, 4, 2, 0)


SPANS = {
    "rows of a cache": [[(0, 3), (0, 4)], [(0, 6), (0, 7)]],
    "left padding": [[(2, 6), (2, 7)], [(0, 6), (0, 7)]],
    "documents": [[(0, 1), (0, 2)], [(1, 2), (2, 3)]],
    "nothing is seen": [[(0, 0), (5, 2)], [(3, 3), (7, 7)]],
    "beyond the keys": [[(-3, 2), (4, 99)], [(8, 20), (-5, -1)]],
    "one row sees nothing": [[(0, 0), (0, 7)], [(1, 2), (6, 6)]],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_spans(dtype, spans):
    """A query that sees nothing gives zeros, and gives no gradient."""
    q, kv, key = operands(2, 2, 7, 3, SIZES, dtype)
    check(q, kv, key, torch.tensor(spans, dtype=torch.int32))


@pytest.mark.parametrize("kind", ["math", "flash"])
def test_queries_that_see_nothing_give_zeros_on_every_path(kind):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}[kind]
    q, kv, key = operands(1, 3, 4, 2, SIZES, torch.float32)
    spans = torch.tensor([[[0, 0], [1, 3], [2, 2]]], dtype=torch.int32)
    with sdpa_kernel(backend):
        out = mla_attention(q, kv, key, 0.3, spans)
        (grad,) = torch.autograd.grad(out.sum(), q)
    empty = torch.tensor([0, 2])
    assert not out[:, empty].any() and not grad[:, empty].any()
    assert out[:, 1].all() and grad[:, 1].any()


@pytest.mark.parametrize("shape", [(4, 6), (1, 1, 4, 6), (2, 1, 4, 6), (2, 1, 1, 6), (2, 1, 4, 1)])
def test_any_mask(shape):
    """bool and additive; wherever it is True, or 0, also above the diagonal."""
    q, kv, key = operands(2, 4, 6, 3, SIZES, torch.float32)
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = True
    seen = mask.expand(2, 1, 4, 6)[:, 0] if len(shape) == 4 else mask.expand(2, 4, 6)
    check(q, kv, key, mask, seen)
    check(q, kv, key, torch.where(mask, 0.0, float("-inf")), seen)


def test_a_bias_is_added_to_the_scores():
    q, kv, key = operands(1, 2, 3, 2, SIZES, torch.float64)
    bias = torch.randn(1, 1, 2, 3)  # float32: it takes the dtype of q
    want = attend(q, kv, key, 0.3, seen=torch.ones(1, 2, 3, dtype=torch.bool), bias=bias[:, 0].double())
    torch.testing.assert_close(mla_attention(q, kv, key, 0.3, bias), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [(0, 3, 3, 2), (2, 0, 3, 2), (2, 3, 0, 2), (2, 0, 0, 2), (2, 3, 3, 0)])
def test_nothing_to_attend_to(sizes):
    batch, queries, keys, heads = sizes
    q, kv, key = operands(batch, queries, keys, heads, SIZES, torch.float32)
    out = mla_attention(q, kv, key, 0.3)
    grads = torch.autograd.grad(out.sum(), (q, kv, key))
    for got, shape in zip(
        (out, *grads), ((batch, queries, heads, SIZES[2]), q.shape, kv.shape, key.shape), strict=True
    ):
        assert torch.equal(got, torch.zeros(shape))


def test_views_are_taken_as_they_are():
    q, kv, key = (x.detach() for x in operands(2, 3, 5, 2, SIZES, torch.float64))
    wide = torch.cat((key, key), -1)[..., : SIZES[1]]
    by_head = q.transpose(1, 2).contiguous().transpose(1, 2)
    layouts = by_head, kv.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0), wide
    # Another layout is another order of sums.
    torch.testing.assert_close(mla_attention(*layouts, 0.3), mla_attention(q, kv, key, 0.3), rtol=1e-12, atol=1e-12)


def test_dropout_is_of_the_weights():
    torch.manual_seed(0)
    q, kv, key = operands(1, 200, 200, 4, SIZES, torch.float32)
    kv = torch.ones_like(kv)  # so a result is the sum of the weights that are left
    out = mla_attention(q, kv, key, 0.3, dropout=0.5)
    # Of weights that add up to 1, each kept and doubled or dropped: 1 on average, their spread below 1.
    assert abs(out.mean() - 1) < 0.2 and out.std() > 0
    assert torch.allclose(mla_attention(q, kv, key, 0.3), torch.ones(()))


# Dispatch.


def test_cpu_tensors_run_on_the_reference():
    q, kv, key = operands(1, 2, 2, 2, SIZES, torch.float32)
    with use_backend("auto"):
        assert torch.equal(mla_attention(q, kv, key, 0.3), mla_attention(q, kv, key, 0.3))
    assert any(choice.op == "mla_attention" for choice in dispatch.describe())


UNSUPPORTED = {
    "for bfloat16, float16 and float32, got torch.float64": {"dtype": torch.float64},
    "P, R and V from 1 to 128, 64, 128, got .'P': 129": {"sizes": (129, 4, 5)},
    "P, R and V from 1 to 128, 64, 128, got .'P': 6, 'R': 66": {"sizes": (6, 66, 5)},
    "'V': 0": {"sizes": (6, 4, 0)},
    "no mask but spans, got torch.bool \\[2, 2\\]": {"mask": torch.ones(2, 2, dtype=torch.bool)},
    "no mask but spans, got torch.float32": {"mask": torch.zeros(2, 2)},
    "no dropout": {"dropout": 0.1},
    "a scale above 0, got 0.0": {"scale": 0.0},
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_what_the_kernels_cannot_take(triton_backend, reason):
    case = {"sizes": SIZES, "dtype": torch.float32, "mask": None, "dropout": 0.0, "scale": 0.3} | UNSUPPORTED[reason]
    q, kv, key = operands(1, 2, 2, 2, case["sizes"], case["dtype"])
    arguments = (q, kv, key, case["scale"], case["mask"], case["dropout"])
    with use_backend("auto"):
        assert mla_attention(*arguments).shape == (1, 2, 2, case["sizes"][2])
    with use_backend("triton"), pytest.raises(BackendError, match=reason):
        mla_attention(*arguments)


def test_spans_and_causal_attention_of_the_published_sizes_are_supported():
    for sizes in ((128, 64, 128), (32, 16, 32), (64, 32, 64), (3, 1, 7)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for mask in (None, torch.zeros(1, 1, 2, dtype=torch.int32)):
                assert configs.obstacle(*operands(1, 1, 1, 1, sizes, dtype), 0.1, mask, 0.0) is None


def test_rule_of_the_specialized_kernel():
    def rule(sizes=(128, 64, 128), dtype=torch.bfloat16, spans=None, change=lambda q, kv, key: (q, kv, key)):
        q, kv, key = (x.detach() for x in operands(1, 2, 3, 2, sizes, dtype))
        return configs.specializes(*change(q, kv, key), spans)

    def shifted(x):
        return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)

    assert rule() and rule(dtype=torch.float16)
    assert rule(change=lambda q, kv, key: (q, kv, torch.empty(1, 3, 576, dtype=q.dtype)[..., 512:]))  # of a cache
    assert not rule(dtype=torch.float32) and not rule((64, 32, 64))
    assert not rule((64, 64, 128)) and not rule((128, 64, 64))
    assert not rule(spans=torch.zeros(1, 2, 2, dtype=torch.int32))
    assert not rule(change=lambda q, kv, key: (shifted(q), kv, key))  # address
    assert not rule(change=lambda q, kv, key: (q, kv, torch.empty(1, 3, 65, dtype=q.dtype)[..., :64]))  # row stride
    assert not rule(change=lambda q, kv, key: (q, kv, key[:, :1].expand(1, 3, 64)))  # rows on top of each other


# What is refused.

GOOD = ([2, 3, 4, 10], [2, 5, 4, 11], [2, 5, 4])


@pytest.mark.parametrize(
    "shapes",
    [
        ([2, 3, 4], GOOD[1], GOOD[2]),
        (GOOD[0], [2, 5, 44], GOOD[2]),
        (GOOD[0], GOOD[1], [2, 5, 1, 4]),
        ([1, 3, 4, 10], GOOD[1], GOOD[2]),  # batch
        (GOOD[0], GOOD[1], [1, 5, 4]),
        ([2, 3, 5, 10], GOOD[1], GOOD[2]),  # heads
        (GOOD[0], GOOD[1], [2, 6, 4]),  # keys
        (GOOD[0], [2, 5, 4, 5], GOOD[2]),  # narrower than a key
        ([2, 3, 4, 3], GOOD[1], GOOD[2]),  # narrower than the rotated part
    ],
)
def test_shapes_that_do_not_fit(shapes):
    with pytest.raises(ValueError, match=r"expected q \[B, T, N, P \+ R\], kv .* and key .*, got \["):
        mla_attention(*(torch.zeros(shape) for shape in shapes), 0.3)


def test_other_mistakes():
    q, kv, key = (torch.zeros(shape) for shape in GOOD)
    with pytest.raises(ValueError, match=r"of one dtype, got torch.float32, torch.float32 and torch.bfloat16"):
        mla_attention(q, kv, key.bfloat16(), 0.3)
    with pytest.raises(ValueError, match=r"a dropout from 0 to less than 1, got 1\.0"):
        mla_attention(q, kv, key, 0.3, dropout=1.0)
    for mask, message in {
        torch.zeros(2, 4, 2, dtype=torch.int32): r"expected spans \[2, 3, 2\], got \[2, 4, 2\]",
        torch.zeros(3, 5, dtype=torch.int64): "of int32 .spans., bool or floats, got torch.int64",
        torch.zeros(2, 4, 3, 5): r"for all heads, \[T, S\] or \[B, 1, T, S\], got \[2, 4, 3, 5\]",
        torch.zeros(5): r"for all heads, .* got \[5\]",
        torch.zeros(3, 4): r"of 3 queries and 5 keys, got \[3, 4\]",
        torch.zeros(2, 1, 2, 5): r"of 3 queries and 5 keys, got \[2, 1, 2, 5\]",
    }.items():
        with pytest.raises(ValueError, match=message):
            mla_attention(q, kv, key, 0.3, mask)
