"""The kernel of sparse_mla against a float64 softmax over the selected keys; test_sparse_mla.py tests the reference.

Tolerance, as for `mla_decode`: with u half a unit in the last place of the dtype of products, weights, dequantized
values and the result are each rounded once, and scores stay within a few units of magnitude; for float32, whose sums of
up to C + R products come in any order, u is (C + R) 2^-24.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepseek_kernels import BackendError, mla_decode, sparse_mla, topk_select, use_backend
from deepseek_kernels.attention.packed_latents import pack, unpack
from deepseek_kernels.testing.numeric import assert_bitwise

NAN = float("nan")
LATENT, ROTATED = 40, 24  # neither a power of two, rows of 128 bytes
WIDTH = LATENT + ROTATED
KINDS = ["plain", "packed"]


@pytest.fixture(autouse=True)
def kernels(triton_backend):
    with use_backend("triton"):
        yield


@pytest.fixture
def splits(monkeypatch):
    """Sets how many parts there are, whatever the sizes."""

    def set_to(count: int) -> None:
        from deepseek_kernels.attention.sparse_mla import launch

        monkeypatch.setattr(launch, "splits_for", lambda *sizes: count)

    return set_to


def expected(q: Tensor, states: Tensor, ids: Tensor, latent: int = LATENT, scale: float = 0.1) -> Tensor:
    out = torch.zeros(*q.shape[:3], latent, dtype=torch.float64, device=q.device)
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            own = [s for s in ids[b, t].tolist() if s >= 0]
            if own:
                keys = states[b, own].double()
                out[b, t] = (q[b, t].double() @ keys.T * scale).softmax(-1) @ keys[:, :latent]
    return out


def operands(batch, queries, heads, keys, device, dtype=torch.bfloat16, kind="plain"):
    """q, what is given to the operator, and the states that it means."""
    q = torch.randn(batch, queries, heads, WIDTH).to(dtype).to(device)
    states = torch.randn(batch, keys, WIDTH).to(dtype).to(device)
    if kind == "plain":
        return q, states, states
    packed = packed_states(states)
    return q, packed, torch.cat(unpack(packed, LATENT, torch.float32), -1)


def packed_states(states: Tensor, latent: int = LATENT) -> Tensor:
    with use_backend("reference"):
        return pack(states, latent)


def selection(batch, queries, keys, top_k, device) -> Tensor:
    """Causal, so that the first queries of a prompt have less than `top_k` keys, the first of a chunk perhaps none."""
    with use_backend("reference"):
        return topk_select(torch.randn(batch, queries, keys), top_k).to(device)


def assert_close(got: Tensor, want: Tensor, states: Tensor) -> None:
    assert got.shape == want.shape
    assert not got.isnan().any()
    unit = torch.finfo(got.dtype).eps / 2 if got.dtype != torch.float32 else states.shape[-1] * 2.0**-24
    assert (got.double() - want).abs().max() <= 4 * unit * states.nan_to_num(0).abs().max().double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("batch", "queries", "heads", "keys", "top_k"),
    [
        (1, 1, 1, 1, 1),
        (2, 1, 16, 150, 70),  # decoding: a full block of the small tiles, keys that end within a tile
        (1, 2, 23, 90, 80),  # heads of one block of the large tiles, and less than it
        (2, 4, 3, 4, 3),  # a prompt, whose first queries have few keys
        (1, 5, 2, 3, 9),  # queries before all keys, and more asked for than there are
    ],
)
def test_equals_a_float64_softmax(device, dtype, kind, batch, queries, heads, keys, top_k):
    q, given, states = operands(batch, queries, heads, keys, device, dtype, kind)
    ids = selection(batch, queries, keys, top_k, device)
    assert_close(sparse_mla(q, given, ids, LATENT, 0.1), expected(q, states, ids), states)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [4, 18])
def test_any_number_of_parts(splits, device, kind, heads, count):
    """More parts than tiles, rows of different length, queries without keys; tokens not selected hold anything."""
    splits(count)
    q, given, states = operands(2, 2, heads, 200, device, kind=kind)
    ids = torch.full((2, 2, 150), -1, dtype=torch.int32)
    for (b, t), number in {(0, 0): 150, (0, 1): 1, (1, 1): 65}.items():
        ids[b, t, :number] = torch.randperm(100)[:number].sort().values * 2 if number < 100 else torch.arange(150)
    ids = ids.to(device)
    for row in range(2):
        unread = torch.ones(200, dtype=torch.bool, device=device)
        unread[ids[row][ids[row] >= 0].long()] = False
        given[row, unread] = 255 if kind == "packed" else NAN  # bytes 255 are NaN in every part of a token
    got = sparse_mla(q, given, ids, LATENT, 0.1)
    assert_close(got, expected(q, states, ids), states)
    assert not got[1, 0].any()


def test_all_keys_selected_is_mla_decode(device):
    """Up to `top_k` keys nothing is left out (TRAPS G4): bit by bit, where tiles and parts are the same."""
    q, given, _ = operands(2, 1, 9, 150, device)
    ids = selection(2, 1, 150, 500, device)
    assert_bitwise(sparse_mla(q, given, ids, LATENT, 0.1), mla_decode(q, given, LATENT, 0.1))


def test_the_order_of_the_indices_does_not_matter_much(device):
    q, given, states = operands(1, 1, 4, 50, device)
    ids = torch.randperm(50)[:20].int()[None, None].to(device)
    assert_close(sparse_mla(q, given, ids, LATENT, 0.1), expected(q, states, ids), states)


LAYOUTS = {
    "queries of a wider tensor": (lambda q: torch.cat([q, q], -1)[..., : q.shape[-1]], lambda s: s),
    "queries head by head": (lambda q: q.transpose(1, 2).contiguous().transpose(1, 2), lambda s: s),
    "states in a cache with room": (lambda q: q, lambda s: torch.cat([s, s], 1)[:, : s.shape[1]]),
    "states with columns apart": (lambda q: q, lambda s: torch.stack([s, s], -1)[..., 0]),
    "states off by four bytes": (
        lambda q: q,
        lambda s: torch.cat([s.flatten()[: 4 // s.itemsize], s.flatten()])[4 // s.itemsize :].view_as(s),
    ),
    "states of one row for all": (lambda q: q, lambda s: s[:1].expand_as(s)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(device, name, kind):
    q, given, _ = operands(2, 1, 4, 70, device, kind=kind)
    of_q, of_states = LAYOUTS[name]
    q, given, ids = of_q(q), of_states(given), selection(2, 1, 70, 33, device)
    if kind == "packed" and name == "states with columns apart":
        with pytest.raises(BackendError, match="packed tokens begin at multiples of 4 bytes"):
            sparse_mla(q, given, ids, LATENT, 0.1)
        return
    states = torch.cat(unpack(given, LATENT, torch.float32), -1) if kind == "packed" else given
    for other in (ids, torch.cat([ids, ids], -1)[..., :33]):
        assert_close(sparse_mla(q, given, other, LATENT, 0.1), expected(q, states, ids), states)


@pytest.mark.parametrize(("latent", "rotated"), [(512, 64), (300, 64), (136, 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_widths(device, latent, rotated, kind):
    """V3.2's; a partial group of scales, and a block wider than the latent."""
    q = torch.randn(1, 2, 9, latent + rotated).bfloat16().to(device)
    states = torch.randn(1, 40, latent + rotated).bfloat16().to(device)
    given = packed_states(states, latent) if kind == "packed" else states
    ids = selection(1, 2, 40, 20, device)
    meant = torch.cat(unpack(given, latent, torch.float32), -1) if kind == "packed" else states
    assert_close(sparse_mla(q, given, ids, latent, 0.05), expected(q, meant, ids, latent, 0.05), meant)


def test_repeats_are_equal_bit_by_bit(splits, device):
    splits(3)
    q, given, _ = operands(2, 2, 9, 200, device)
    ids = selection(2, 2, 200, 150, device)
    first = sparse_mla(q, given, ids, LATENT, 0.1)
    for _ in range(2):
        assert_bitwise(sparse_mla(q, given, ids, LATENT, 0.1), first)


def test_nothing_to_do(device):
    q, given, _ = operands(2, 3, 4, 8, device)
    ids = selection(2, 3, 8, 5, device)
    assert not sparse_mla(q, given, ids[..., :0], LATENT, 0.1).any()
    assert not sparse_mla(q, given[:, :0], torch.full_like(ids, -1), LATENT, 0.1).any()
    assert sparse_mla(q[:, :0], given, ids[:, :0], LATENT, 0.1).shape == (2, 0, 4, LATENT)
    assert sparse_mla(q[:0], given[:0], ids[:0], LATENT, 0.1).shape == (0, 3, 4, LATENT)
    assert sparse_mla(q[:, :, :0], given, ids, LATENT, 0.1).shape == (2, 3, 0, LATENT)


def test_what_runs_on_the_reference_and_why(device):
    q, given, _ = operands(1, 2, 4, 8, device)
    ids, grad = selection(1, 2, 8, 5, device), q.clone().requires_grad_()
    wide = torch.zeros(1, 2, 1, 608, device=device), torch.zeros(1, 8, 608, device=device)
    for words, call in (
        ("it has no gradient", lambda: sparse_mla(grad, given, ids, LATENT, 0.1)),
        (r"got torch.float64", lambda: sparse_mla(q.double(), given.double(), ids, LATENT, 0.1)),
        ("features and rotated keys 64, got 600 and 8", lambda: sparse_mla(*wide, ids, 600, 0.1)),
    ):
        with pytest.raises(BackendError, match=words):
            call()
        with use_backend("auto"):
            assert not call().isnan().any()
    with torch.no_grad():  # the same tensor, without a gradient
        assert sparse_mla(grad, given, ids, LATENT, 0.1).shape == (1, 2, 4, LATENT)


def test_compiled_gives_the_same(device):
    torch.compiler.reset()
    ids = selection(2, 2, 40, 9, device)
    compiled = torch.compile(sparse_mla, fullgraph=True, backend="aot_eager")
    for kind in KINDS:
        q, given, _ = operands(2, 2, 4, 40, device, kind=kind)
        assert_bitwise(compiled(q, given, ids, LATENT, 0.1), sparse_mla(q, given, ids, LATENT, 0.1))


def test_custom_operators_are_registered_properly(device):
    from deepseek_kernels.attention.sparse_mla import launch

    q, given, _ = operands(1, 2, 4, 20, device)
    torch.library.opcheck(launch.attend, (q, given, selection(1, 2, 20, 9, device), LATENT, 0.1))
