"""The Triton kernels and the C++ of mla_decode against a float64 softmax; test_mla_decode.py tests the reference.

Tolerance, everywhere: with u half a unit in the last place of the dtype that products take (2^-9 for bfloat16), weights
are rounded once (u), values of packed tokens once more (u, and through the scores by `exp`), the result once (u); sums
are float32. Scores stay within a few units of magnitude, so that 4 u times the largest value covers all of it; for
float32, whose sums of up to C + R products come in any order, u is (C + R) 2^-24.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepseek_kernels import BackendError, use_backend
from deepseek_kernels.attention.mla_decode import configs, mla_decode, mla_decode_paged
from deepseek_kernels.attention.packed_latents import pack, unpack
from deepseek_kernels.common.masks import as_dense, causal_mask
from deepseek_kernels.testing.numeric import assert_bitwise

NAN = float("nan")
LATENT, ROTATED = 40, 24  # neither a power of two, rows of 128 bytes
KINDS = ["plain", "packed"]


@pytest.fixture
def launch(triton_backend):
    from deepseek_kernels.attention.mla_decode import launch

    with use_backend("triton"):
        yield launch


@pytest.fixture(params=["triton", "cpu"])
def kernels(request):
    request.getfixturevalue(f"{request.param}_backend")
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def splits(kernels, monkeypatch):
    """Sets how many parts there are, whatever the sizes; those of the C++ depend on nothing but the keys."""

    def set_to(count: int) -> None:
        if kernels == "triton":
            from deepseek_kernels.attention.mla_decode import launch

            monkeypatch.setattr(launch, "splits_for", lambda *sizes: count)

    return set_to


def expected(q: Tensor, states: Tensor, mask: Tensor | None, latent: int = LATENT, scale: float = 0.1) -> Tensor:
    """In float64; a key that a query does not see is left out, whatever it holds."""
    batch, queries, heads, _ = q.shape
    keys = states.shape[1]
    seen = causal_mask(queries, keys, q.device) if mask is None else as_dense(mask, keys)
    seen = (seen if seen.ndim == 4 else seen[None, None]).expand(batch, 1, queries, keys)[:, 0]
    out = q.new_zeros(batch, queries, heads, latent, dtype=torch.float64)
    for b in range(batch):
        for t in range(queries):
            visible = states[b][seen[b, t]].double()
            if len(visible):
                weights = (q[b, t].double() @ visible.T * scale).softmax(-1)
                out[b, t] = weights @ visible[:, :latent]
    return out


def operands(batch: int, queries: int, heads: int, keys: int, device, dtype=torch.bfloat16, kind="plain"):
    """q, what is given to the operator, and the states that it means."""
    q = torch.randn(batch, queries, heads, LATENT + ROTATED).to(dtype).to(device)
    states = torch.randn(batch, keys, LATENT + ROTATED).to(dtype).to(device)
    if kind == "plain":
        return q, states, states
    packed = packed_states(states)
    return q, packed, torch.cat(unpack(packed, LATENT, torch.float32), -1)


def packed_states(states: Tensor, latent: int = LATENT) -> Tensor:
    with use_backend("reference"):
        return pack(states, latent)


def assert_close(got: Tensor, want: Tensor, states: Tensor) -> None:
    assert got.shape == want.shape
    assert not got.isnan().any()
    unit = torch.finfo(got.dtype).eps / 2 if got.dtype != torch.float32 else states.shape[-1] * 2.0**-24
    assert (got.double() - want).abs().max() <= 4 * unit * states.nan_to_num(0).abs().max().double()


def spans_of(*rows: list[tuple[int, int]], device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("batch", "queries", "heads", "keys"),
    [
        (1, 1, 1, 1),  # the first token of one head
        (2, 1, 16, 130),  # a full block of the small tiles; keys that end within a tile
        (1, 3, 23, 70),  # queries and heads in one block of the large ones, and more than a block
        (1, 5, 2, 3),  # queries before all keys
    ],
)
def test_causal(kernels, device, dtype, kind, batch, queries, heads, keys):
    q, given, states = operands(batch, queries, heads, keys, device, dtype, kind)
    assert_close(mla_decode(q, given, LATENT, 0.1), expected(q, states, None), states)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_spans_in_any_number_of_parts(kernels, splits, device, kind, count):
    """Rows of different length, one with nothing, one key, ends outside of the keys, more parts than tiles."""
    splits(count)
    q, given, states = operands(3, 2, 9, 140, device, kind=kind)
    mask = spans_of([(0, 140), (0, 139)], [(7, 8), (70, 3)], [(-5, 30), (100, 999)], device=device)
    got = mla_decode(q, given, LATENT, 0.1, mask)
    assert_close(got, expected(q, states, mask), states)
    assert not got[1, 1].any()
    nothing = torch.zeros_like(mask)
    assert not mla_decode(q, given, LATENT, 0.1, nothing).any()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [4, 9])
def test_what_lies_beyond_the_spans_is_not_read(kernels, splits, device, kind, heads, count):
    splits(count)
    q, given, states = operands(2, 2, heads, 150, device, kind=kind)
    mask = spans_of([(3, 68), (3, 69)], [(80, 131), (90, 132)], device=device)
    outside = ~as_dense(mask, 150)[:, 0].any(1)
    given[outside] = 255 if kind == "packed" else NAN  # bytes 255 are NaN in every part of a token
    assert_close(mla_decode(q, given, LATENT, 0.1, mask), expected(q, states, mask), states)


@pytest.mark.parametrize("heads", [3, 6])
@pytest.mark.parametrize(
    "shape", [(2, 1, 3, 90), (1, 1, 3, 90), (2, 1, 1, 90), (3, 90), (1, 90), (2, 1, 3, 1)], ids=str
)
def test_dense_masks_of_any_shape(kernels, splits, device, shape, heads):
    splits(2)
    q, given, states = operands(2, 3, heads, 90, device)
    mask = torch.rand(shape, device=device) < 0.5
    wide = mask if mask.ndim == 4 else mask[None, None]
    assert_close(mla_decode(q, given, LATENT, 0.1, mask), expected(q, states, wide), states)


def test_a_mask_of_any_layout(kernels, device):
    q, given, states = operands(2, 3, 4, 90, device)
    mask = (torch.rand(2, 1, 90, 6, device=device) < 0.5).transpose(2, 3)[:, :, ::2]
    assert_close(mla_decode(q, given, LATENT, 0.1, mask), expected(q, states, mask), states)
    assert not mla_decode(q, given, LATENT, 0.1, torch.zeros_like(mask)).any()


def paged(states: Tensor, lengths: list[int], page: int, fill: float) -> tuple[Tensor, Tensor, Tensor]:
    """Pages in disorder, with `fill` in slots that hold nothing, and a table with nonsense where no page belongs."""
    needed = [-(-length // page) for length in lengths]
    order = torch.randperm(sum(needed) + 2)
    pages = torch.full((len(order), page, states.shape[2]), fill, device=states.device).to(states.dtype)
    table = torch.full((len(lengths), -(-states.shape[1] // page)), -(2**30), dtype=torch.int32)
    used = 0
    for row, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        for index in range(count):
            number = int(order[used])
            used += 1
            part = states[row, index * page : min(length, (index + 1) * page)]
            pages[number, : len(part)] = part
            table[row, index] = number
    return pages, table.to(states.device), torch.tensor(lengths, dtype=torch.int32, device=states.device)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("page", [16, 64, 128])
@pytest.mark.parametrize(("queries", "heads"), [(1, 5), (3, 6)], ids=["few", "many"])
def test_pages(kernels, splits, device, queries, heads, page, kind, count):
    splits(count)
    lengths = [150, 0, 2, 64]
    q, given, states = operands(4, queries, heads, 150, device, kind=kind)
    pages, table, held = paged(given, lengths, page, 255 if kind == "packed" else NAN)
    ends = held[:, None] - queries + 1 + torch.arange(queries, device=device)
    want = expected(q, states, torch.stack((torch.zeros_like(ends), ends), -1).int())
    assert_close(mla_decode_paged(q, pages, table, held, LATENT, 0.1), want, states)
    with use_backend("reference"):
        assert_close(mla_decode_paged(q, pages, table, held, LATENT, 0.1), want, states)


def test_lengths_beyond_the_table_do_not_count(kernels, device):
    q, given, states = operands(1, 1, 2, 32, device)
    pages, table, held = paged(given, [32], 16, NAN)
    got = mla_decode_paged(q, pages, table, held + 1000, LATENT, 0.1)
    want = expected(q, states, None)
    assert_close(got, want, states)


LAYOUTS = {
    "queries of a wider tensor": (lambda q: torch.cat([q, q], -1)[..., : q.shape[-1]], lambda s: s),
    "queries head by head": (lambda q: q.transpose(1, 2).contiguous().transpose(1, 2), lambda s: s),
    "queries with columns apart": (lambda q: torch.stack([q, q], -1)[..., 0], lambda s: s),
    "states in a cache with room": (lambda q: q, lambda s: torch.cat([s, s], 1)[:, : s.shape[1]]),
    "states of a wider tensor": (lambda q: q, lambda s: torch.cat([s, s], 2)[..., : s.shape[2]]),
    "states token by token": (lambda q: q, lambda s: s.transpose(0, 1).contiguous().transpose(0, 1)),
    "states with columns apart": (lambda q: q, lambda s: torch.stack([s, s], -1)[..., 0]),
    "states off by four bytes": (
        lambda q: q,
        lambda s: torch.cat([s.flatten()[: 4 // s.itemsize], s.flatten()])[4 // s.itemsize :].view_as(s),
    ),
    "states of one row for all": (lambda q: q, lambda s: s[:1].expand_as(s)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [4, 17])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(kernels, device, name, heads, kind):
    q, given, _ = operands(2, 1, heads, 70, device, kind=kind)
    of_q, of_states = LAYOUTS[name]
    q, given = of_q(q), of_states(given)
    if kernels == "triton" and kind == "packed" and name == "states with columns apart":
        with pytest.raises(BackendError, match="packed tokens begin at multiples of 4 bytes"):
            mla_decode(q, given, LATENT, 0.1)
        return
    states = torch.cat(unpack(given, LATENT, torch.float32), -1) if kind == "packed" else given
    assert_close(mla_decode(q, given, LATENT, 0.1), expected(q, states, None), states)


@pytest.mark.parametrize(("latent", "rotated"), [(512, 64), (300, 64), (136, 8), (24, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_widths(kernels, device, latent, rotated, kind):
    """V3's; a partial group of scales, and a block wider than the latent; narrow ones."""
    q = torch.randn(1, 2, 9, latent + rotated).bfloat16().to(device)
    states = torch.randn(1, 40, latent + rotated).bfloat16().to(device)
    given = packed_states(states, latent) if kind == "packed" else states
    if kernels == "triton" and given.dtype == torch.uint8 and given.stride(1) % 4:
        with pytest.raises(BackendError, match="multiples of 4 bytes"):
            mla_decode(q, given, latent, 0.05)
        return
    meant = torch.cat(unpack(given, latent, torch.float32), -1) if kind == "packed" else states
    assert_close(mla_decode(q, given, latent, 0.05), expected(q, meant, None, latent, 0.05), meant)


@pytest.mark.parametrize("heads", [8, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_small_integers_come_out_exactly(kernels, splits, device, heads, kind):
    """No score moves any weight from 1 / keys, a power of two: sums of small integers, exact in every format."""
    splits(2)
    states = torch.randint(-7, 8, (2, 128, LATENT + ROTATED), device=device).float()
    states[:, :, 0] = 448  # the scale of the packed latents is 1
    given = packed_states(states) if kind == "packed" else states.bfloat16()
    q = torch.zeros(2, 1, heads, LATENT + ROTATED, dtype=torch.bfloat16, device=device)
    want = states[:, :, :LATENT].sum(1) / 128
    assert torch.equal(mla_decode(q, given, LATENT, 1.0), want[:, None, None].expand(-1, 1, heads, -1).bfloat16())
    # One key far above the others takes all of the weight: its latent comes out, which finds a wrong key or column.
    q[..., LATENT] = 64
    states[:, :, LATENT] = 0
    states[0, 77, LATENT], states[1, 3, LATENT] = 64, 64
    given = packed_states(states) if kind == "packed" else states.bfloat16()
    got = mla_decode(q, given, LATENT, 1.0)
    for row, key in ((0, 77), (1, 3)):
        assert torch.equal(got[row, 0], states[row, key, :LATENT].bfloat16().expand(heads, -1))


def test_scores_far_apart(kernels, splits, device):
    """The running maximum jumps up, and down; the first tile's weights vanish beside the last one's."""
    splits(2)
    q, _, _ = operands(1, 1, 3, 1, device, torch.float32)
    states = torch.ones(1, 70, LATENT + ROTATED, device=device) * torch.linspace(-300, 300, 70, device=device)[:, None]
    for given in (states, states.flip(1)):
        assert_close(mla_decode(q, given, LATENT, 1.0), expected(q, given, None, scale=1.0), given)


def test_repeats_are_equal_bit_by_bit(kernels, splits, device):
    splits(3)
    q, given, _ = operands(2, 2, 9, 200, device)
    first = mla_decode(q, given, LATENT, 0.1)
    for _ in range(2):
        assert_bitwise(mla_decode(q, given, LATENT, 0.1), first)


@pytest.mark.parametrize(
    "sizes", [(0, 1, 4, 8), (2, 0, 4, 8), (2, 1, 0, 8), (2, 1, 4, 0)], ids=["batch", "queries", "heads", "keys"]
)
def test_nothing_to_do(kernels, device, sizes):
    q, given, _ = operands(*sizes, device)
    for backend in (kernels, "reference"):
        with use_backend(backend):
            out = mla_decode(q, given, LATENT, 0.1)
            assert out.shape == (*sizes[:3], LATENT) and not out.any()


def test_no_pages(kernels, device):
    q, given, _ = operands(2, 1, 4, 16, device)
    table = torch.zeros(2, 3, dtype=torch.int32, device=device)
    for backend in (kernels, "reference"):
        with use_backend(backend):
            for pages, entries in ((given[:0], table), (given, table[:, :0]), (given, table)):
                assert not mla_decode_paged(q, pages, entries, table[:, 0], LATENT, 0.1).any()


# Choosing.


def test_rule_of_tiles():
    def rule(rows, capability=(9, 0), packed=False, dtype=torch.bfloat16):
        return configs.config_for(rows, dtype, packed, capability)

    assert rule(128) is rule(17) is rule(128, packed=True) is configs.MANY
    assert rule(16) is rule(1, dtype=torch.float16) is configs.FEW
    assert rule(16, packed=True) is configs.FEW_PACKED
    assert rule(128, (8, 0)) is configs.FEW
    assert rule(128, (10, 0)) is configs.BLACKWELL
    for smaller in ((8, 9), (12, 0), None):
        assert rule(128, smaller) is rule(1, smaller, packed=True) is configs.SMALL
    assert rule(128, dtype=torch.float32) is configs.WIDE


def test_rule_of_parts():
    def rule(batch, blocks, keys, config):
        return configs.splits_for(batch, blocks, keys, config, processors=132)

    assert rule(128, 2, 4096, configs.MANY) == 1  # 256 programs are two rounds of 132 as they are
    assert rule(128, 1, 8192, configs.FEW) == 2  # 256 programs for 264 places
    assert rule(1, 1, 8192, configs.FEW) == 32  # parts of 256 keys
    assert rule(1, 2, 131072, configs.MANY) == 64  # one round, in whole tiles
    assert rule(1, 1, 10**6, configs.FEW) == 128
    assert rule(1, 1, 200, configs.FEW) == rule(1, 1, 0, configs.FEW) == 1


def test_what_runs_on_the_reference_and_why(launch, device):
    q, given, _ = operands(1, 2, 4, 8, device)
    grad, additive = q.clone().requires_grad_(), torch.zeros(2, 8, device=device)
    lengths, table = torch.tensor([8], dtype=torch.int32, device=device), torch.zeros(1, 1, dtype=torch.int32)
    table = table.to(device)
    for words, call in (
        ("it has no gradient", lambda: mla_decode(grad, given, LATENT, 0.1)),
        ("it has no additive mask", lambda: mla_decode(q, given, LATENT, 0.1, additive)),
        ("got torch.float64", lambda: mla_decode(q.double(), given.double(), LATENT, 0.1)),
        (
            "pages hold a power of two of tokens, .* got 8",
            lambda: mla_decode_paged(q, given, table, lengths, LATENT, 0.1),
        ),
        ("features and rotated keys 64, got 600 and 8", lambda: _wide(device)),
    ):
        with pytest.raises(BackendError, match=words):
            call()
        with use_backend("auto"):
            assert not call().isnan().any()
    with torch.no_grad():  # the same tensor, without a gradient
        assert mla_decode(grad, given, LATENT, 0.1).shape == (1, 2, 4, LATENT)


def _wide(device) -> Tensor:
    return mla_decode(torch.zeros(1, 1, 1, 608, device=device), torch.zeros(1, 2, 608, device=device), 600, 0.1)


# Around the kernels.


def test_compiled_gives_the_same(kernels, device):
    torch.compiler.reset()
    q, given, _ = operands(2, 2, 4, 40, device)
    pages, table, held = paged(given, [40, 9], 16, NAN)
    mask = spans_of([(0, 9), (0, 10)], [(4, 39), (4, 40)], device=device)
    compiled = torch.compile(mla_decode, fullgraph=True, backend="aot_eager")
    for other in (None, mask, as_dense(mask, 40)):
        assert_bitwise(compiled(q, given, LATENT, 0.1, other), mla_decode(q, given, LATENT, 0.1, other))
    paged_arguments = q, pages, table, held, LATENT, 0.1
    compiled = torch.compile(mla_decode_paged, fullgraph=True, backend="aot_eager")
    assert_bitwise(compiled(*paged_arguments), mla_decode_paged(*paged_arguments))


def test_custom_operators_are_registered_properly(launch, device):
    q, given, _ = operands(1, 2, 4, 20, device)
    pages, table, held = paged(given, [20], 16, 0.0)
    mask = spans_of([(0, 9), (0, 10)], device=device)
    torch.library.opcheck(launch.decode, (q, given, LATENT, 0.1, mask))
    torch.library.opcheck(launch.decode_paged, (q, pages, table, held, LATENT, 0.1))


@pytest.mark.gpu
def test_a_graph_replays_with_other_lengths(launch, device):
    q, given, states = operands(2, 1, 16, 128, device)
    pages, table, held = paged(given, [128, 128], 64, NAN)
    mla_decode_paged(q, pages, table, held, LATENT, 0.1)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mla_decode_paged(q, pages, table, held, LATENT, 0.1)
    held.copy_(torch.tensor([5, 100]))
    graph.replay()
    want = expected(q, states, torch.stack((torch.zeros_like(held), held), -1)[:, None].int())
    assert_close(out, want, states)
