"""The kernels of indexer_scores against the sum over heads in float64; test_indexer_scores.py tests the reference.

Tolerance: products are exact in float32 or rounded once; a score is a sum of D products, then of G, whose terms may be
larger than itself: each partial sum is rounded.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepseek_kernels import BackendError, hadamard_quantize, indexer_scores, use_backend
from deepseek_kernels.attention.indexer_scores import configs
from deepseek_kernels.attention.packed_index_keys import pack_index_keys, split_index_keys
from deepseek_kernels.common.masks import as_dense, causal_mask
from deepseek_kernels.testing.numeric import assert_bitwise

NAN = float("nan")
WIDTH = 24  # no power of two


@pytest.fixture(autouse=True)
def kernels(triton_backend):
    with use_backend("triton"):
        yield


def seen_by(mask: Tensor | None, batch: int, queries: int, keys: int, device) -> Tensor:
    """Returns bool [B, T, S]."""
    dense = causal_mask(queries, keys, device) if mask is None else as_dense(mask, keys)
    return (dense if dense.ndim == 4 else dense[None, None]).expand(batch, 1, queries, keys)[:, 0]


def expected(q: Tensor, keys: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor:
    """In float64; a key that a query does not see is left out, whatever it holds."""
    seen = seen_by(mask, q.shape[0], q.shape[1], keys.shape[1], q.device)
    products = torch.einsum("btgd,bsd->btgs", q.double(), keys.double()).clamp(min=0)
    return torch.einsum("btg,btgs->bts", weights.double(), products).masked_fill(~seen, -torch.inf)


def assert_close(got: Tensor, want: Tensor, width: int, heads: int) -> None:
    assert got.dtype == torch.float32 and got.shape == want.shape
    assert got.isneginf().equal(want.isneginf()) and not got.isnan().any()
    seen, bound = ~want.isneginf(), 4 * (width + heads) * heads * 2.0**-24
    if seen.any():
        assert (got.double() - want)[seen].abs().max() <= bound * want[seen].abs().max()


def operands(batch, queries, heads, keys, device, dtype=torch.bfloat16, width=WIDTH):
    q, k = torch.randn(batch, queries, heads, width), torch.randn(batch, keys, width)
    return q.to(dtype).to(device), k.to(dtype).to(device), torch.randn(batch, queries, heads).to(device)


def packed_operands(batch, queries, heads, keys, device, width=32):
    """Arguments of the operator, then the queries and keys that they mean."""
    q, k, weights = operands(batch, queries, heads, keys, device, width=width)
    with use_backend("reference"):
        codes, scale = hadamard_quantize(q.reshape(-1, width))
        packed = pack_index_keys(k)
    q, weights = codes.reshape(q.shape), weights * scale.reshape(weights.shape)
    key_codes, key_scale = split_index_keys(packed, width)
    return (q, packed, weights), (q.double(), key_codes.double() * key_scale.double())


def masks(batch, queries, keys, device):
    """Causal, documents, rows of different length and one with nothing, holes."""
    ends = torch.arange(queries) + keys - queries + 1
    spans = torch.stack((ends // 5 * 5, ends), -1).int().expand(batch, -1, -1).clone()
    spans[-1, :, 0] = 0
    spans[-1, :, 1] -= 3
    spans[0, 0] = torch.tensor([7, 2])
    dense = torch.rand(batch, 1, queries, keys) < 0.6
    return [mask if mask is None else mask.to(device) for mask in (None, spans, dense, dense[0, 0], dense[:, :, :1])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("batch", "queries", "heads", "keys"),
    [
        (1, 1, 1, 1),
        (2, 1, 20, 150),  # decoding; keys that end within a tile
        (2, 7, 5, 41),  # padded heads, and several queries of a tile
        (1, 5, 3, 3),  # queries before all keys
        (1, 3, 100, 40),  # padded heads that fill a tile
    ],
)
def test_equals_the_sum_over_heads(device, dtype, batch, queries, heads, keys):
    q, k, weights = operands(batch, queries, heads, keys, device, dtype)
    for mask in masks(batch, queries, keys, device):
        assert_close(indexer_scores(q, k, weights, mask), expected(q, k, weights, mask), WIDTH, heads)


@pytest.mark.parametrize("width", [32, 128])
@pytest.mark.parametrize(("batch", "queries", "heads", "keys"), [(2, 1, 16, 150), (2, 7, 5, 41)])
def test_fp8(device, batch, queries, heads, keys, width):
    given, meant = packed_operands(batch, queries, heads, keys, device, width)
    for mask in masks(batch, queries, keys, device):
        assert_close(indexer_scores(*given, mask), expected(*meant, given[2], mask), width, heads)


def test_programs_that_share_a_row(device, monkeypatch):
    """Keys in any number of parts, some of which no query sees."""
    monkeypatch.setattr(configs, "_LEAST", 32)
    q, k, weights = operands(2, 3, 4, 300, device)
    spans = torch.tensor([[[0, 1], [3, 3], [20, 60]], [[299, 300], [130, 140], [250, 999]]], dtype=torch.int32)
    spans = spans.to(device)
    assert configs.chunk_for(2, 300, configs.MANY, 2) == 128
    for mask in (None, spans):
        assert_close(indexer_scores(q, k, weights, mask), expected(q, k, weights, mask), WIDTH, 4)


@pytest.mark.parametrize("fp8", [False, True])
def test_keys_that_are_not_seen_may_hold_anything(device, fp8):
    if fp8:
        (q, keys, weights), (meant_q, meant_keys) = packed_operands(2, 2, 3, 70, device)
    else:
        q, keys, weights = operands(2, 2, 3, 70, device)
        meant_q, meant_keys = q, keys.clone()
    spans = torch.tensor([[[5, 20], [5, 21]], [[40, 69], [40, 70]]], dtype=torch.int32, device=device)
    outside = ~seen_by(spans, 2, 2, 70, device).any(1)
    keys[outside] = 255 if fp8 else NAN
    assert_close(indexer_scores(q, keys, weights, spans), expected(meant_q, meant_keys, weights, spans), 32, 3)
    dense = seen_by(spans, 2, 2, 70, device)[:, None]
    assert_close(indexer_scores(q, keys, weights, dense), expected(meant_q, meant_keys, weights, spans), 32, 3)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # by numpy
def test_nan_and_infinity_are_those_of_the_reference(device):
    """A padded head adds nothing to the score of an infinite key."""
    q, keys, weights = operands(1, 2, 3, 9, device, torch.float32)
    keys[0, 2, 3], keys[0, 4, 1], weights[0, 1, 1] = NAN, torch.inf, torch.inf
    mask = torch.ones(2, 9, dtype=torch.bool, device=device)
    got = indexer_scores(q, keys, weights, mask)
    with use_backend("reference"):
        want = indexer_scores(q, keys, weights, mask)
    assert want.isnan().any() and want.isinf().any()
    torch.testing.assert_close(got, want, equal_nan=True)


LAYOUTS = {
    "queries head by head": lambda q, k, w: (q.transpose(1, 2).contiguous().transpose(1, 2), k, w),
    "queries of a wider tensor": (lambda q, k, w: (torch.cat([q, q], -1)[..., : q.shape[-1]], k, w)),
    "columns apart": lambda q, k, w: tuple(torch.stack([x, x], -1)[..., 0] for x in (q, k, w)),
    "keys in a cache with room": lambda q, k, w: (q, torch.cat([k, k], 1)[:, : k.shape[1]], w),
    "keys of one row for all": lambda q, k, w: (q, k[:1].expand_as(k), w),
    "weights of a wider tensor": lambda q, k, w: (q, k, torch.cat([w, w], -1)[..., : w.shape[-1]]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(device, name):
    q, keys, weights = LAYOUTS[name](*operands(2, 3, 4, 40, device))
    assert_close(indexer_scores(q, keys, weights), expected(q, keys, weights, None), WIDTH, 4)


def test_packed_keys_in_a_cache_with_room(device):
    (q, packed, weights), (meant_q, meant_keys) = packed_operands(2, 1, 4, 40, device)
    room = torch.full((2, 64, packed.shape[2]), 255, dtype=torch.uint8, device=device)
    room[:, :40] = packed
    assert_close(indexer_scores(q, room[:, :40], weights), expected(meant_q, meant_keys, weights, None), 32, 4)
    apart = torch.cat([packed, packed[..., :1]], -1)[..., :-1]
    with pytest.raises(BackendError, match="packed keys begin at multiples of 4 bytes"):
        indexer_scores(q, apart, weights)


def test_repeats_are_equal_bit_by_bit(device):
    given = operands(2, 3, 5, 150, device)
    first = indexer_scores(*given)
    for _ in range(3):
        assert_bitwise(indexer_scores(*given), first)


def test_nothing_to_do(device):
    for sizes in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 3, 0)):
        assert indexer_scores(*operands(*sizes, device)).shape == (sizes[0], sizes[1], sizes[3])


def test_rules_of_tiles_and_parts():
    def rule(queries, heads=64, dtype=torch.bfloat16, family="sm_90"):
        return configs.config_for(queries, heads, dtype, family)

    assert rule(1) is rule(1, dtype=torch.float8_e4m3fn) is configs.FEW
    assert rule(2) is rule(1, heads=128) is configs.MANY
    assert rule(4096, family="sm_100") is rule(2, family="sm_80") is configs.OTHERS
    assert rule(1, family="gfx942") is configs.SMALL and rule(9, dtype=torch.float32) is configs.EXACT
    assert configs.places_of(4096, 64, configs.MANY) == {"QUERIES": 2, "PLACES": 64}
    assert configs.places_of(1, 64, configs.FEW) == {"QUERIES": 1, "PLACES": 64}
    assert configs.places_of(3, 4, configs.MANY) == {"QUERIES": 4, "PLACES": 16}
    assert configs.chunk_for(4096, 8192, configs.MANY, 132) == 8192  # a prompt: one program for each two queries
    assert configs.chunk_for(128, 65536, configs.FEW, 132) == 13184  # decoding
    assert configs.chunk_for(1, 65536, configs.FEW, 132) == 512


def test_what_runs_on_the_reference_and_why(device):
    q, keys, weights = operands(1, 2, 3, 8, device)
    many = operands(1, 2, 200, 8, device)
    for words, call in (
        ("got torch.float64", lambda: indexer_scores(q.double(), keys.double(), weights.double())),
        ("1 to 128 heads of 1 to 256 values, got 200 of 24", lambda: indexer_scores(*many)),
    ):
        with pytest.raises(BackendError, match=words):
            call()
        with use_backend("auto"):
            assert not call().isnan().any()


def test_compiled_gives_the_same(device):
    torch.compiler.reset()
    given, (packed, _) = operands(2, 2, 4, 40, device), packed_operands(2, 2, 4, 40, device)
    compiled = torch.compile(indexer_scores, fullgraph=True, backend="aot_eager")
    for mask in masks(2, 2, 40, device)[:3]:
        assert_bitwise(compiled(*given, mask), indexer_scores(*given, mask))
        assert_bitwise(compiled(*packed, mask), indexer_scores(*packed, mask))


def test_custom_operators_are_registered_properly(device):
    from deepseek_kernels.attention.indexer_scores import launch

    mask = masks(1, 2, 20, device)[1]
    given = operands(1, 2, 4, 20, device, torch.float32)
    torch.library.opcheck(launch.scores, (*(x.requires_grad_() for x in given), mask))


# Gradients.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "queries", "heads", "keys"), [(1, 1, 1, 1), (2, 1, 20, 70), (2, 7, 5, 41), (1, 5, 3, 3)]
)
def test_gradients(device, dtype, batch, queries, heads, keys):
    """dp is rounded once to the operands' dtype, and so are results; sums are float32 and have terms of both signs."""
    leaves = [x.requires_grad_() for x in operands(batch, queries, heads, keys, device, dtype)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    unit = torch.finfo(dtype).eps + (WIDTH + heads) * 2.0**-24
    for mask in masks(batch, queries, keys, device):
        seen = seen_by(mask, batch, queries, keys, device)
        grad = torch.randn(batch, queries, keys, device=device).masked_fill(~seen, NAN)
        got = torch.autograd.grad(indexer_scores(*leaves, mask), leaves, grad)
        exact = expected(*wide, mask).masked_fill(~seen, 0)
        want = torch.autograd.grad(exact, wide, grad.double().nan_to_num(0), allow_unused=True)
        # The same sums of magnitudes bound what roundings of their terms can do.
        sizes = [x.detach().abs().requires_grad_() for x in wide]
        bound = expected(*sizes, mask).masked_fill(~seen, 0)
        bounds = torch.autograd.grad(bound, sizes, grad.double().abs().nan_to_num(0))
        for mine, right, most, leaf in zip(got, want, bounds, leaves, strict=True):
            assert mine.dtype == leaf.dtype and mine.shape == leaf.shape
            assert ((mine.double() - right).abs() <= 2 * unit * most + 1e-30).all()


def test_gradients_in_parts(device, monkeypatch):
    """Of a tile of keys, from several parts of the queries."""
    from deepseek_kernels.attention.indexer_scores import launch

    leaves = [x.requires_grad_() for x in operands(2, 9, 5, 40, device, torch.float32)]
    grad = torch.randn(2, 9, 40, device=device)
    results = []
    for parts in (1, 3):
        monkeypatch.setattr(launch, "parts_for", lambda *sizes, parts=parts: parts)
        results.append(
            [torch.autograd.grad(indexer_scores(*leaves, m), leaves, grad) for m in masks(2, 9, 40, device)[:2]]
        )
    for one, other in zip(*results, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_only_the_gradients_that_are_needed(device):
    q, keys, weights = operands(1, 3, 4, 20, device, torch.float32)
    grad = torch.randn(1, 3, 20, device=device)
    everything = [x.clone().requires_grad_() for x in (q, keys, weights)]
    want = torch.autograd.grad(indexer_scores(*everything), everything, grad)
    for index in range(3):
        leaves = [q, keys, weights]
        leaves[index] = leaves[index].clone().requires_grad_()
        (got,) = torch.autograd.grad(indexer_scores(*leaves), leaves[index], grad)
        assert_bitwise(got, want[index])


def test_fp8_operands_have_the_gradient_of_the_reference(device):
    (q, packed, weights), _ = packed_operands(1, 2, 3, 20, device)
    weights.requires_grad_()
    with pytest.raises(BackendError, match="it has no gradient with FP8 operands"):
        indexer_scores(q, packed, weights)
    with use_backend("auto"):
        indexer_scores(q, packed, weights).masked_fill(~causal_mask(2, 20), 0).sum().backward()
    assert weights.grad.any()
