"""Absorbed attention of few queries against a float64 softmax, on states as they are and packed in bytes."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from torch import Tensor

from deepseek_kernels.attention.mla_decode import mla_decode, mla_decode_paged, reference
from deepseek_kernels.attention.packed_latents import aligned, pack, packed_bytes, unpack, views
from deepseek_kernels.common.masks import as_dense, causal_mask
from support.fp8_definition import E4M3, hostile, matrix, quantize_group

WIDTH = 24  # C + R
RANK = 20  # C


def expected(q: torch.Tensor, states: torch.Tensor, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
    """[B, T, N, C + R]; `mask` None is causal."""
    scores = torch.einsum("btnd,bsd->bnts", q.double(), states.double()) * scale
    mask = causal_mask(*scores.shape[2:]) if mask is None else as_dense(mask, states.shape[1])
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1).nan_to_num(0)  # a row that attends to nothing
    return torch.einsum("bnts,bsd->btnd", weights, states.double())


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Outputs are convex combinations of values: rounding is relative to their size, with some for the exponentials."""
    assert (got.double() - want).abs().max() <= 16 * torch.finfo(got.dtype).eps * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "queries", "heads", "keys"),
    [
        (1, 1, 4, 1),  # the first token
        (2, 1, 5, 33),
        (1, 3, 4, 17),  # heads and queries in the rows of one product
        (1, 17, 3, 40),  # more queries: heads stay heads
    ],
)
def test_equals_a_float64_softmax(dtype, batch, queries, heads, keys):
    q = torch.randn(batch, queries, heads, WIDTH, dtype=dtype)
    states = torch.randn(batch, keys, WIDTH, dtype=dtype)
    causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    per_row = causal.expand(batch, 1, -1, -1).clone()
    per_row[-1, ..., 0] = keys == 1  # one row of the batch does not see its first key
    spans = torch.stack((torch.arange(queries) % keys, torch.arange(queries) + keys - queries + 1), -1).int()
    spans = spans.expand(batch, -1, -1)
    for mask in (None, causal, per_row, spans, torch.where(causal, 0.0, -1e4).to(dtype)):
        assert_close(mla_decode(q, states, RANK, 0.3, mask), expected(q, states, 0.3, mask)[..., :RANK])


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("keys", [8, 11])
def test_keys_in_parts_equal_keys_at_once(monkeypatch, threads, keys):
    """Each thread takes a part of the keys; what does not divide is a part of its own."""
    monkeypatch.setattr(reference, "_PART", 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    buffer = torch.full((1, keys + 5, WIDTH), float("nan"))  # a cache with room: nothing behind the keys may leak in
    buffer[:, :keys] = torch.randn(1, keys, WIDTH)
    q, states = torch.randn(1, 1, 4, WIDTH), buffer[:, :keys]
    assert reference._parts(q.reshape(1, 1, 4, WIDTH), states, None) == min(threads, keys // 3) > 1
    assert_close(mla_decode(q, states, RANK, 0.5), expected(q, states, 0.5, None)[..., :RANK])


def test_a_row_that_attends_to_nothing_gives_zeros():
    q, states = torch.randn(1, 2, 3, WIDTH), torch.randn(1, 4, WIDTH)
    mask = torch.tensor([[False] * 4, [True] * 4])
    spans = torch.tensor([[[3, 3], [-2, 9]]], dtype=torch.int32)
    for given in (mask, spans):
        out = mla_decode(q, states, RANK, 1.0, given)
        assert torch.equal(out[:, 0], torch.zeros_like(out[:, 0]))
        assert_close(out, expected(q, states, 1.0, mask)[..., :RANK])
    early = mla_decode(torch.randn(1, 6, 3, WIDTH), states, RANK, 1.0)  # the first two are before all keys
    assert not early[:, :2].any() and early[:, 2:].all()


def test_gradients():
    q = torch.randn(2, 2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    states = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 2, 3, RANK, dtype=torch.float64)
    got = torch.autograd.grad(mla_decode(q, states, RANK, 0.3), (q, states), grad)
    want = torch.autograd.grad(expected(q, states, 0.3, None)[..., :RANK], (q, states), grad)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize(
    ("q", "states", "mask", "words"),
    [
        ((1, 1, 2, 8), (1, 4, 9), None, r"states \[B, S, 8\] or uint8 states \[B, S, 15\] .* got .* \[1, 4, 9\]"),
        ((2, 1, 2, 8), (1, 4, 8), None, r"a batch of 2 in states"),
        ((2, 2, 8), (2, 4, 8), None, r"q \[B, T, N, C \+ R\]"),
        ((1, 1, 2, 5), (1, 4, 5), None, r"for a latent of 5, got \[1, 1, 2, 5\]"),
        ((1, 2, 2, 8), (1, 4, 8), (1, 2, 2, 4), "a mask for all heads"),
        ((1, 2, 2, 8), (1, 4, 8), (2, 3), r"got \[2, 3\] for \[1, 1, 2, 4\]"),
        ((3, 2, 2, 8), (3, 4, 8), (2, 1, 2, 4), r"got \[2, 1, 2, 4\] for \[3, 1, 2, 4\]"),
    ],
)
def test_mistakes_are_named(q, states, mask, words):
    with pytest.raises(ValueError, match=words):
        mla_decode(torch.ones(q), torch.ones(states), 5, 1.0, None if mask is None else torch.ones(mask))


def test_mistakes_of_types_are_named():
    q, states = torch.ones(1, 2, 2, 8), torch.ones(1, 4, 8)
    with pytest.raises(ValueError, match=r"of one dtype, got torch.float32 and torch.float64"):
        mla_decode(q, states.double(), 5, 1.0)
    with pytest.raises(ValueError, match=r"expected spans \[1, 2, 2\], got \[1, 3, 2\]"):
        mla_decode(q, states, 5, 1.0, torch.zeros(1, 3, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"spans\), bool or floats, got torch.int64"):  # it would be added
        mla_decode(torch.ones(1, 2, 1, 8), torch.ones(1, 3, 8), 6, 1.0, torch.ones(2, 3, dtype=torch.int64))
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"block_table int32 \[1, 1\], got torch.int64"):
        mla_decode_paged(q, states, table.long(), lengths, 5, 1.0)
    with pytest.raises(ValueError, match=r"lengths int32 \[1\], got torch.int32 \[1, 1\]"):
        mla_decode_paged(q, states, table, lengths[None], 5, 1.0)
    with pytest.raises(ValueError, match=r"pages \[num_pages, P, 8\]"):
        mla_decode_paged(q, states[..., :7], table, lengths, 5, 1.0)


@pytest.mark.parametrize("packed", [False, True])
def test_pages_have_a_gradient_and_any_size(packed):
    """Pages of three, in disorder; NaN where nothing is held, and nonsense in the table."""
    q = torch.randn(2, 2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    pages = torch.randn(4, 3, WIDTH, dtype=torch.float64)
    given = pack(pages, RANK) if packed else pages
    pages = joined(given, RANK, torch.float64) if packed else pages
    table, lengths = torch.tensor([[2, 0], [3, 999]], dtype=torch.int32), torch.tensor([5, 1], dtype=torch.int32)
    given[0, 2:], given[3, 1:] = (255, 255) if packed else (torch.nan, torch.nan)
    out = mla_decode_paged(q, given, table, lengths, RANK, 0.3)
    for row, states in enumerate((torch.cat((pages[2], pages[0, :2])), pages[3, :1])):
        want = expected(q[row : row + 1], states[None], 0.3, None)[..., :RANK]
        torch.testing.assert_close(out[row : row + 1], want)
    assert not out[1, 0].any()  # before the row's only token
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert not grad.isnan().any() and grad[0].any()


# Tokens in bytes.

SIZES = [(512, 64), (300, 6), (128, 8), (5, 3)]  # V3's; a partial group; one group; nothing at a multiple of 4


def joined(packed: Tensor, rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The states that packed bytes mean."""
    return torch.cat(unpack(packed, rank, dtype), -1)


@pytest.mark.parametrize(("rank", "rope"), SIZES)
def test_bytes_are_codes_then_scales_then_the_rotated_key(rank, rope):
    states = matrix(3, rank + rope)
    packed = pack(states, rank)
    assert packed.dtype == torch.uint8 and packed.shape == (3, packed_bytes(rank, rope))
    for token, got in zip(states.tolist(), packed.tolist(), strict=True):
        codes, scales = [], b""
        for first in range(0, rank, 128):
            found, scale = quantize_group(token[first : min(first + 128, rank)], 1e-4, False)
            codes += found
            scales += struct.pack("<f", scale)
        key = torch.tensor(token[rank:]).to(torch.bfloat16)
        assert bytes(got) == bytes(codes) + scales + struct.pack(f"<{rope}h", *key.view(torch.int16).tolist())


def test_a_token_of_v3_takes_656_bytes():
    assert packed_bytes(512, 64) == 656 == 512 + 4 * 4 + 64 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_unpacking_follows_the_definition(dtype):
    """All codes, also NaN, times scales of their own."""
    codes = [*range(256), 1, 2]
    packed = bytes(codes) + struct.pack("<3f", 0.3, 1.7, 2.0**-20) + struct.pack("<2h", 0x3F80, -0x4000)
    latents, keys = unpack(torch.tensor(list(packed), dtype=torch.uint8)[None], 258, dtype)
    values = torch.tensor([*E4M3, math.nan, *(-v for v in E4M3), math.nan, *E4M3[1:3]])
    scales = torch.tensor([0.3] * 128 + [1.7] * 128 + [2.0**-20] * 2)
    torch.testing.assert_close(latents[0], (values * scales).to(dtype), rtol=0, atol=0, equal_nan=True)
    assert latents.dtype == keys.dtype == dtype and keys.tolist() == [[1.0, -2.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("rank", "rope"), SIZES)
def test_what_comes_back_is_within_half_a_step(rank, rope, dtype):
    """Half a unit of the last of 4 significant bits, or of the least code; the key within half of bfloat16's last."""
    states = matrix(20, rank + rope).to(dtype).double()
    latents, keys = states.split([rank, rope], -1)
    groups = torch.nn.functional.pad(latents, (0, -rank % 128)).unflatten(-1, (-1, 128))
    scale = (groups.abs().amax(-1).clamp(min=1e-4) / 448).repeat_interleave(128, -1)[:, :rank]
    bound = torch.maximum(latents.abs() * 2.0**-4, scale * 2.0**-10) * (1 + 2.0**-20)  # and the float32 roundings
    got_latents, got_keys = unpack(pack(states.to(dtype), rank), rank, torch.float64)
    assert ((got_latents - latents).abs() <= bound).all()
    assert ((got_keys - keys).abs() <= keys.abs() * 2.0**-8).all()


def test_parts_of_a_token_are_read_in_place():
    packed = pack(matrix(6, 300 + 6), 300)
    codes, scales, keys = views(packed, 300)
    assert codes.shape == (6, 300) and scales.shape == (6, 3) and keys.shape == (6, 6)
    latents = codes.float() * scales.repeat_interleave(128, -1)[:, :300]
    assert torch.equal(torch.cat((latents, keys.float()), -1), joined(packed, 300))
    assert aligned(packed, 300) and not aligned(packed, 299)
    assert not aligned(packed.flatten()[1:-3].view(-1, 4), 4) and not aligned(packed[:, ::2], 100)


def test_hostile_values_survive_as_far_as_they_can():
    """A NaN stays alone, an infinity makes NaN of its group, in the key both stay what they are."""
    states = torch.cat((hostile(), hostile(), hostile()[:, :6]), -1)
    latents, keys = unpack(pack(states, 256), 256, torch.float32)
    for half in latents.split(128, -1):
        infinite = hostile().isinf().any(-1, keepdim=True)
        assert torch.equal(half.isnan(), hostile().isnan() | infinite)
    assert torch.equal(keys.nan_to_num(7.0), states[:, 256:].to(torch.bfloat16).float().nan_to_num(7.0))


def test_any_shape_and_layout_is_packed_alike():
    wide = matrix(24, 2 * 140).view(4, 6, 280)
    for states in (
        wide[..., ::2],
        wide[:, 1:4, 3:143],
        wide[..., :140].transpose(0, 1),
        wide[:1, :, :140].expand(3, -1, -1),
    ):
        packed = pack(states, 132)
        assert packed.shape == (*states.shape[:-1], 132 + 8 + 16)
        assert torch.equal(packed, pack(states.contiguous(), 132))
        spread = torch.zeros(*packed.shape[:-1], 2 * packed.shape[-1], dtype=torch.uint8)[..., ::2].copy_(packed)
        assert torch.equal(joined(spread, 132), joined(packed, 132))
    assert pack(wide[:, :0, :140], 132).shape == (4, 0, 156)
    assert not pack(wide[0, 0].clone().requires_grad_(), 132).requires_grad


# Attention on them.


def test_packed_attention_equals_attention_on_the_dequantized_states(monkeypatch):
    """The states' rounding apart, which both have in common."""
    monkeypatch.setattr(reference, "_TILE", 5)
    monkeypatch.setattr(reference, "_LEAST", 2)  # tiles of 5, 2 and 2 keys
    for batch, queries, heads, keys in ((1, 1, 4, 1), (2, 1, 5, 33), (3, 3, 4, 17), (1, 17, 3, 40)):
        packed = pack(matrix(batch * keys, 150) / 16, 142).view(batch, keys, -1)
        causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        per_row = causal.expand(batch, 1, -1, -1).clone()
        per_row[-1, ..., 0] = keys == 1
        for_all_queries = torch.ones(batch, 1, 1, keys, dtype=torch.bool)
        for_all_queries[..., keys // 2 + 1 :] = False
        masks = (None, causal, per_row, for_all_queries, torch.where(causal, 0.0, -1e4), torch.zeros(1, 1, queries, 1))
        for dtype in (torch.float32, torch.bfloat16):
            q, states = torch.randn(batch, queries, heads, 150).to(dtype), joined(packed, 142)
            for mask in masks:
                got = mla_decode(q, packed, 142, 0.3, mask)
                assert got.dtype == dtype and got.shape == (batch, queries, heads, 142)
                assert_close(got, expected(q, states, 0.3, mask)[..., :142])


def test_packed_attention_holds_a_tile_of_keys_at_a_time(monkeypatch):
    held = []

    def watched(packed: Tensor, *arguments):
        held.append(packed.shape[0] * packed.shape[1])
        return unpack(packed, *arguments)

    monkeypatch.setattr(reference, "unpack", watched)
    for batch, keys, most in ((1, 2500, 1024), (3, 800, 1024), (40, 130, 40 * 64)):
        held.clear()
        packed = torch.zeros(batch, keys, packed_bytes(8, 2), dtype=torch.uint8)
        mla_decode(torch.randn(batch, 1, 2, 10), packed, 8, 0.3)
        assert sum(held) == batch * keys and max(held) <= most


def test_packed_rows_that_attend_to_nothing_give_zeros(monkeypatch):
    """Nothing at all, or nothing in the first tiles, or in the last."""
    monkeypatch.setattr(reference, "_TILE", 2)
    monkeypatch.setattr(reference, "_LEAST", 2)
    q, packed = torch.randn(1, 4, 3, WIDTH), pack(torch.randn(1, 6, WIDTH), 20)
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1, 5], mask[2, 0], mask[3] = True, True, True
    additive = torch.zeros(4, 6).masked_fill(~mask, -torch.inf)
    for given in (mask, additive):
        out = mla_decode(q, packed, 20, 1.0, given)
        assert torch.equal(out[:, 0], torch.zeros_like(out[:, 0]))
        assert_close(out, expected(q, joined(packed, 20), 1.0, mask)[..., :20])
    assert not mla_decode(q, packed[:, :0], 20, 1.0).any()


def test_packed_scores_far_apart(monkeypatch):
    """Later tiles with much greater, and much smaller, scores: the running maximum moves, or does not."""
    monkeypatch.setattr(reference, "_TILE", 2)
    monkeypatch.setattr(reference, "_LEAST", 2)
    sizes = torch.tensor([1.0, 400.0, 1e-3, 3e3, 1.0, -3e3])[None, :, None]
    packed = pack(torch.ones(1, 6, WIDTH) * sizes, 20)
    q = torch.randn(1, 2, 3, WIDTH)
    assert_close(mla_decode(q, packed, 20, 1.0), expected(q, joined(packed, 20), 1.0, None)[..., :20])


def test_the_error_of_packing_is_what_the_groups_imply():
    """With scores that move by d at most, weights move by a factor between exp(-2 d) and exp(2 d)."""
    states, q, scale = matrix(40, 576)[None] / 64, torch.randn(1, 2, 4, 576) / 8, 576**-0.5
    exact = expected(q, states, scale, None)[..., :512]
    packed = pack(states, 512)
    values, moved = states.double()[..., :512], joined(packed, 512, torch.float64) - states.double()
    groups = values.unflatten(-1, (4, 128))
    step = groups.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448 * 2.0**-10
    bound = torch.maximum(groups.abs() * 2.0**-4, step).flatten(-2) * (1 + 2.0**-20)
    assert (moved[..., :512].abs() <= bound).all()
    key_bound = states.double()[..., 512:].abs() * 2.0**-8
    d = scale * torch.einsum("btnd,bsd->btns", q.double().abs(), torch.cat((bound, key_bound), -1)).amax()
    limit = bound.amax() + values.abs().amax() * torch.expm1(2 * d)
    off = (mla_decode(q, packed, 512, scale).double() - exact).abs().max()
    assert 0 < off <= limit * (1 + 2.0**-10) and limit < values.abs().amax()


def test_packed_attention_has_a_gradient_for_its_queries():
    q = torch.randn(2, 2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    packed, grad = pack(torch.randn(2, 5, WIDTH), 20), torch.randn(2, 2, 3, 20, dtype=torch.float64)
    (got,) = torch.autograd.grad(mla_decode(q, packed, 20, 0.3), q, grad)
    (want,) = torch.autograd.grad(mla_decode(q, joined(packed, 20, torch.float64), 20, 0.3), q, grad)
    torch.testing.assert_close(got, want)


def test_packed_attention_under_autocast_is_that_of_cast_queries():
    q, packed = torch.randn(1, 1, 3, WIDTH), pack(torch.randn(1, 9, WIDTH), 20)
    with torch.autocast("cpu", torch.bfloat16):
        got = mla_decode(q, packed, 20, 0.3)
    assert torch.equal(got, mla_decode(q.bfloat16(), packed, 20, 0.3))


@pytest.mark.parametrize(
    ("q", "packed", "mask", "words"),
    [
        (
            (1, 1, 2, 8),
            torch.zeros(1, 4, 15),
            None,
            r"uint8 states \[B, S, 15\] for .*latent of 5, got torch.float32 \[1, 4, 15\]",
        ),
        ((1, 1, 2, 8), torch.zeros(1, 4, 16, dtype=torch.uint8), None, r"\[B, S, 15\] .*uint8 \[1, 4, 16\]"),
        ((2, 1, 2, 8), torch.zeros(1, 4, 15, dtype=torch.uint8), None, r"a batch of 2 in states"),
        ((2, 2, 8), torch.zeros(2, 4, 15, dtype=torch.uint8), None, r"q \[B, T, N, C \+ R\]"),
        ((1, 1, 2, 8), torch.zeros(1, 4, 15, dtype=torch.uint8), (1, 2, 1, 4), "a mask for all heads"),
    ],
)
def test_mistakes_with_packed_states_are_named(q, packed, mask, words):
    with pytest.raises(ValueError, match=words):
        mla_decode(torch.ones(q), packed, 5, 1.0, None if mask is None else torch.ones(mask))
