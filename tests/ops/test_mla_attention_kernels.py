"""The Triton kernels of mla_attention, forward and gradients, against a plain loop in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepseek_kernels import use_backend
from deepseek_kernels.attention.mla_attention import mla_attention
from deepseek_kernels.testing.numeric import assert_bitwise
from support.attention_loop import assert_attention, operands, visible

TINY, PUBLISHED = (32, 16, 32), (128, 64, 128)  # P, R, V
NAN = float("nan")


@pytest.fixture
def launch(triton_backend):
    from deepseek_kernels.attention.mla_attention import launch

    with use_backend("triton"):
        yield launch


def run(q: Tensor, kv: Tensor, key: Tensor, grad: Tensor, mask: Tensor | None = None, scale: float = 0.2):
    """The result, and the gradients of q, kv and key."""
    out = mla_attention(q, kv, key, scale, mask)
    return out, *torch.autograd.grad(out, (q, kv, key), grad)


def case(batch, queries, keys, heads, sizes, dtype, device, spans=None):
    """q, kv, key, the result's gradient and spans."""
    grad = torch.randn(batch, queries, heads, sizes[2], dtype=dtype).to(device)
    spans = None if spans is None else spans.to(device)
    return *operands(batch, queries, keys, heads, sizes, dtype, device), grad, spans


def check(q, kv, key, grad, spans) -> None:
    assert_attention(run(q, kv, key, grad, spans), q, kv, key, 0.2, grad, spans)


def documents(batch: int, tokens: int, starts: list[int]) -> Tensor:
    """Spans of packed documents that begin there."""
    index = torch.arange(tokens)
    first = torch.tensor([max(start for start in starts if start <= t) for t in index.tolist()])
    return torch.stack((first, index + 1), -1).int().expand(batch, -1, -1)


def scattered(batch: int, queries: int, keys: int) -> Tensor:
    """Random spans, some empty and some beyond the keys."""
    first = torch.randint(-3, keys + 2, (batch, queries))
    return torch.stack((first, first + torch.randint(-1, keys, (batch, queries))), -1).int()


# Tiles: more than one of queries and of keys, the last ones partial, for each family of GPUs.


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "spans"])
@pytest.mark.parametrize("family", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_configuration(launch, device, monkeypatch, family, masked):
    if device.type == "cuda" and family != launch.family(device):
        pytest.skip("of another GPU")
    monkeypatch.setattr(launch, "family", lambda device: family)
    check(*case(1, 130, 140, 1, TINY, torch.bfloat16, device, scattered(1, 130, 140) if masked else None))


@pytest.mark.parametrize(("queries", "keys"), [(130, 130), (3, 70)])
def test_specialized_kernel(launch, device, monkeypatch, queries, keys):
    used = []
    monkeypatch.setattr(
        launch, "with_scratch", lambda run, original=launch.with_scratch: (used.append(1), original(run))
    )
    check(*case(1, queries, keys, 1, PUBLISHED, torch.bfloat16, device))
    assert used or not launch.hopper(device)


def test_published_sizes_with_spans(launch, device):
    check(*case(1, 40, 40, 2, PUBLISHED, torch.bfloat16, device, documents(1, 40, [0, 7, 8, 30])))


# Shapes and dtypes.


@pytest.mark.parametrize("sizes", [TINY, (24, 10, 20), (3, 2, 1), (5, 1, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sizes_and_dtypes(launch, device, sizes, dtype):
    """float32 is exact, not TF32: its bound has no room for that."""
    check(*case(2, 3, 5, 2, sizes, dtype, device))


@pytest.mark.parametrize(
    ("batch", "queries", "keys"),
    [(1, 1, 1), (2, 1, 40), (1, 40, 40), (1, 20, 7)],  # in the last one, queries see nothing
)
def test_causal_shapes(launch, device, batch, queries, keys):
    check(*case(batch, queries, keys, 1, TINY, torch.float32, device))


@pytest.mark.parametrize("spans", [documents(2, 40, [0, 1, 17, 33]), scattered(2, 5, 40), torch.zeros(1, 3, 2).int()])
def test_spans(launch, device, spans):
    keys = 40 if spans.shape[1] > 3 else 4
    check(*case(*spans.shape[:2], keys, 1, TINY, torch.float32, device, spans))


@pytest.mark.parametrize("sizes", [(0, 3, 3, 2), (2, 0, 3, 2), (2, 3, 0, 2), (2, 3, 3, 0)])
def test_nothing_to_attend_to(launch, device, sizes):
    q, kv, key, grad, _ = case(*sizes, TINY, torch.bfloat16, device)
    for got, like in zip(run(q, kv, key, grad), (grad, q, kv, key), strict=True):
        assert torch.equal(got, torch.zeros_like(like))


# Exact results. Where the assembler reuses registers of a running product too early (triton-lang/triton pull request
# 11781), sums are off by whole numbers.

_EXACT_SCALE = 0.6931471805599453  # times log2(e) it is 1 in float32: weights are powers of two


@pytest.mark.parametrize("sizes", [TINY, PUBLISHED])
def test_each_query_picks_one_key_exactly(launch, device, sizes):
    """Its code's score is above all others' by more than float32 has exponents for; causal, several tiles of keys."""
    queries, keys = 20, 140
    code = 1.0 - 2 * (torch.arange(keys)[:, None] >> torch.arange(8) & 1)  # [S, 8], +1 and -1
    target = torch.arange(keys - queries, keys) - torch.randint(0, keys - queries, (queries,))
    q, kv, key, _, _ = (
        None if x is None else x.detach() for x in case(1, queries, keys, 1, sizes, torch.bfloat16, "cpu")
    )
    q.zero_()
    q[0, :, 0, :4] = 256 * code[target, :4]
    q[0, :, 0, sizes[0] : sizes[0] + 4] = 256 * code[target, 4:]
    kv[0, :, 0, :4], key[0, :, :4] = code[:, :4], code[:, 4:]
    out = mla_attention(q.to(device), kv.to(device), key.to(device), _EXACT_SCALE)
    assert_bitwise(out[0, :, 0].cpu(), kv[0, target, 0, sizes[0] :], strides=False)


@pytest.mark.parametrize("sizes", [TINY, PUBLISHED])
def test_small_integers_exactly(launch, device, sizes):
    """All keys that a query sees, 1, 2, 4, 8 or 16, have one score: every number below is exact in bfloat16.

    Scores are of the first columns of both parts, in which keys are all alike; gradients of the others are not 0.
    """
    own, rotated, value = sizes
    queries, keys = 40, 70
    count = 2 ** torch.randint(0, 5, (1, queries))
    first = (torch.rand(1, queries) * (keys - count)).long()
    spans = torch.stack((first, first + count), -1).int()
    q, k = torch.zeros(1, queries, 1, own + rotated), torch.randint(-3, 4, (1, keys, own + rotated)).float()
    for columns in (slice(0, 8), slice(own, own + 8)):
        q[..., columns] = torch.randint(-2, 3, (1, queries, 1, 8)).float()
        k[..., columns] = torch.randint(-2, 3, (8,)).float()
    v, do = 16.0 * torch.randint(-3, 4, (1, keys, value)), torch.zeros(1, queries, value)
    do.scatter_(2, torch.randint(0, value, (1, queries, 1)), 1.0)

    p = visible(1, queries, keys, spans) / count[..., None]  # [1, T, S]
    out = p @ v
    ds = p * (do @ v.mT - (out * do).sum(-1, keepdim=True))
    scale = torch.tensor(_EXACT_SCALE)
    dq, dk, dv = (ds @ k) * scale, (ds.mT @ q[:, :, 0]) * scale, p.mT @ do
    want = out, dq, torch.cat((dk[..., :own], dv), -1), dk[..., own:]

    inputs = q, torch.cat((k[..., :own], v), -1)[:, :, None], k[..., own:].contiguous()
    inputs = tuple(x.bfloat16().to(device).requires_grad_() for x in inputs)
    for got, right in zip(
        run(*inputs, do[:, :, None].bfloat16().to(device), spans.to(device), _EXACT_SCALE), want, strict=True
    ):
        assert_bitwise(got.detach().cpu().view(right.shape), right.bfloat16(), strides=False)


# Hostile operands.


def test_what_no_query_sees_may_be_anything(launch, device):
    """Keys before and behind those that queries see, and memory behind the keys."""
    spans = torch.tensor([[[5, 8], [7, 40], [6, 30]] * 2]).int()
    q, kv, key, grad, spans = case(1, 6, 50, 2, TINY, torch.float32, device, spans)
    want = run(q, kv, key, grad, spans)
    seen = slice(5, 40)

    def spoiled(x):
        room = torch.full((x.shape[0], x.shape[1] + 9, *x.shape[2:]), NAN, dtype=x.dtype, device=device)
        room[:, seen] = x.detach()[:, seen]
        return room[:, : x.shape[1]].requires_grad_()

    for got, right in zip(run(q, spoiled(kv), spoiled(key), grad, spans), want, strict=True):
        assert_bitwise(got, right)
    assert not want[2][:, :5].any() and not want[2][:, 40:].any()


LAYOUTS = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim == 4 else x,
    "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns of something wider": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "columns apart": lambda x: torch.stack((x, x), -1)[..., 0],
    "off by two bytes": lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view_as(x),
    "one row repeated": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(launch, device, name):
    q, kv, key, grad, _ = case(2, 3, 5, 2, PUBLISHED if "off" in name else TINY, torch.bfloat16, device)
    change = LAYOUTS[name]
    q, kv, key = (change(x.detach()).requires_grad_() for x in (q, kv, key))
    check(q, kv, key, change(grad), None)


def test_gradient_of_a_sum_is_read_in_place(launch, device):
    q, kv, key, grad, _ = case(1, 3, 5, 2, TINY, torch.float32, device)
    out = mla_attention(q, kv, key, 0.2)
    found = torch.autograd.grad(out.sum(), (q, kv, key))
    assert_attention((out, *found), q, kv, key, 0.2, torch.ones_like(grad))


# What runs how often.


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "spans"])
def test_repeats_are_bitwise_equal(launch, device, masked):
    spans = documents(1, 150, [0, 60, 61]) if masked else None
    inputs = case(1, 150, 150, 1, PUBLISHED, torch.bfloat16, device, spans)
    first = run(*inputs)
    for _ in range(20 if device.type == "cuda" else 1):
        for a, b in zip(run(*inputs), first, strict=True):
            assert_bitwise(a, b)


@pytest.mark.parametrize("room", [0, 2 * 40 * 10 * 4])
def test_heads_in_rounds_and_in_groups(launch, device, monkeypatch, room):
    """One or two of five heads at a time for the shared key's gradient; four of them in the cache."""
    monkeypatch.setattr(launch, "PARTIAL_BYTES", room)
    monkeypatch.setattr(launch, "_group", lambda rows, key: 4)
    check(*case(1, 20, 40, 5, (6, 10, 5), torch.float32, device))


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradient_that_is_needed(launch, device, needed):
    inputs = case(1, 3, 3, 2, TINY, torch.float32, device)
    want = run(*inputs)
    own = [x.detach().requires_grad_(need) for x, need in zip(inputs[:3], needed, strict=True)]
    mla_attention(*own, 0.2).backward(inputs[3])
    for x, need, right in zip(own, needed, want[1:], strict=True):
        assert (x.grad is not None) == need
        if need:
            assert_bitwise(x.grad, right)


def test_ranges_of_queries(launch, device):
    """The queries that see each tile of keys, exactly; more queries than a program reads at a time."""
    from deepseek_kernels.attention.mla_attention.configs import Config

    queries, keys, columns = 1100, 50, 16
    spans = scattered(2, queries, keys)
    spans[1, :, 1] = spans[1, :, 1].clamp(max=16)  # in the second row, no query sees the last tiles
    spans[1, 40:] = 0
    found = launch._ranges(spans.to(device), queries, keys, Config(16, columns, 4, 1)).cpu()
    first, last = spans.clamp(0, keys).unbind(-1)
    for b in range(2):
        for tile in range(4):
            low, high = tile * columns, min((tile + 1) * columns, keys)
            sees = ((first[b] < last[b]) & (first[b] < high) & (last[b] > low)).nonzero()[:, 0].tolist()
            assert found[b, tile].tolist() == ([sees[0], sees[-1] + 1] if sees else [queries, 0])


# Around the kernels.


def test_follows_autocast(launch, device):
    q, kv, key, grad, _ = case(1, 3, 3, 2, TINY, torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = run(q, kv, key, grad.bfloat16())
    assert [x.dtype for x in found] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    halves = [x.detach().bfloat16().requires_grad_() for x in (q, kv, key)]
    for got, want in zip(found, run(*halves, grad.bfloat16()), strict=True):
        assert torch.equal(got.float(), want.float())


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "spans"])
def test_compiled_gives_the_same(launch, device, masked):
    torch.compiler.reset()
    q, kv, key, grad, spans = case(1, 4, 4, 2, TINY, torch.float32, device, documents(1, 4, [0, 3]) if masked else None)
    eager = run(q, kv, key, grad, spans)
    out = torch.compile(mla_attention, fullgraph=True, backend="aot_eager")(q, kv, key, 0.2, spans)
    for a, b in zip((out, *torch.autograd.grad(out, (q, kv, key), grad)), eager, strict=True):
        assert_bitwise(a, b)


def test_custom_operator_is_registered_properly(launch, device):
    q, kv, key, _, spans = case(1, 3, 4, 1, (4, 2, 3), torch.float32, device, scattered(1, 3, 4))
    torch.library.opcheck(launch.attend, (q, kv, key, spans, 0.2))
    torch.library.opcheck(launch.attend, (q, kv, key, None, 0.2))


@pytest.mark.parametrize(
    ("capability", "family"),
    [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((12, 0), "sm_80")],
)
def test_every_gpu_gets_tiles_that_fit(monkeypatch, capability, family):
    """A Blackwell of capability 12 has 99 KB of shared memory, which an Ampere's tiles fit into."""
    from deepseek_kernels.common import host

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    host.capability.cache_clear()
    try:
        assert host.family(torch.device("cuda", 7)) == family
    finally:
        host.capability.cache_clear()
