"""The kernel of topk_select against its reference, index by index; test_topk_select.py tests the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepseek_kernels import BackendError, topk_select, use_backend
from deepseek_kernels.attention.topk_select import configs
from deepseek_kernels.common.masks import causal_mask


@pytest.fixture(autouse=True)
def kernels(triton_backend):
    with use_backend("triton"):
        yield


@pytest.fixture
def short_programs(monkeypatch):
    """Programs hold 64 keys, so that rows of some hundred are shared, in several launches."""
    for name, value in {"MOST": 64, "LEAST": 16}.items():
        monkeypatch.setattr(configs, name, value)
        from deepseek_kernels.attention.topk_select import launch

        monkeypatch.setattr(launch, name, value)


def assert_same(scores: Tensor, top_k: int, mask: Tensor | None = None) -> Tensor:
    with use_backend("reference"):
        want = topk_select(scores, top_k, mask)
    got = topk_select(scores, top_k, mask)
    assert got.dtype == want.dtype and got.is_contiguous()
    assert torch.equal(got, want)
    return got


def masks(batch, queries, keys, device):
    """Causal, documents, rows of different length and one with nothing, holes."""
    ends = torch.arange(queries) + keys - queries + 1
    packed = torch.stack((ends // 5 * 5, ends), -1).int().expand(batch, -1, -1)
    rows = packed.clone()
    rows[..., 0] = 3
    rows[-1, :, 1] -= 2
    rows[0, 0] = torch.tensor([9, 2])
    hole = torch.rand(batch, 1, queries, keys) < 0.6
    given = (None, packed, rows, hole, hole[0, 0], hole[:, :, :1], hole[..., :1])
    return [mask if mask is None else mask.to(device) for mask in given]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("batch", "queries", "keys"), [(1, 1, 40), (2, 4, 23), (1, 6, 4), (3, 1, 1), (1, 1, 1500)])
def test_equals_the_reference(device, ties, batch, queries, keys):
    scores = torch.randn(batch, queries, keys, device=device)
    if ties:
        scores = scores.round()  # a few values, zeros of both signs among them
    for mask in masks(batch, queries, keys, device):
        for top_k in (7, keys // 2 + 1, 3 * keys):
            assert_same(scores, top_k, mask)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("batch", "queries", "keys"), [(1, 1, 65), (2, 1, 300)])
def test_rows_that_several_programs_share(short_programs, device, ties, batch, queries, keys):
    """Up to three launches, each on what the programs of the one before have left."""
    scores = torch.randn(batch, queries, keys, device=device)
    scores = scores.round() if ties else scores
    for mask in masks(batch, queries, keys, device)[:4]:
        for top_k in (1, 32):
            assert_same(scores, top_k, mask)


def test_rows_of_several_launches(short_programs, device, monkeypatch):
    """Memory that programs leave for the next launch is bounded: a few rows at a time."""
    from deepseek_kernels.attention.topk_select import launch

    monkeypatch.setattr(launch, "rows_for", lambda keys, top_k: 2)
    scores = torch.randn(2, 3, 150, device=device)
    for mask in masks(2, 3, 150, device)[1:4:2]:
        assert_same(scores, 10, mask)


@pytest.mark.parametrize("kind", ["random", "close", "equal", "few", "rising"])
def test_a_long_row(device, kind):
    """64k keys, which programs of 8192 keys share."""
    keys = 65536
    scores = {
        "random": lambda: torch.randn(1, 1, keys),
        "close": lambda: 1 + torch.randint(0, 40000, (1, 1, keys)) * 2.0**-23,
        "equal": lambda: torch.zeros(1, 1, keys),
        "few": lambda: torch.randn(1, 1, keys).round(),
        "rising": lambda: torch.arange(keys, dtype=torch.float32)[None, None],
    }[kind]().to(device)
    got = assert_same(scores, 2048)
    assert (got[0, 0].diff() > 0).all()
    assert_same(scores, 2048, torch.tensor([[[70, 40011]]], dtype=torch.int32, device=device))


def test_many_rows_of_different_length(device):
    """Tiles of the three sizes, 512 keys of a program and more."""
    scores = torch.randn(1, 9, 4096, device=device)
    ends = torch.tensor([0, 5, 64, 65, 1024, 1025, 2049, 4000, 4096])
    spans = torch.stack((torch.tensor([0, 2, 0, 0, 0, 0, 33, 2000, 0]), ends), -1)[None].int().to(device)
    for top_k in (64, 2048):
        assert_same(scores, top_k, spans)


HOSTILE = (torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.0)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # by numpy
@pytest.mark.parametrize("shared", [False, True])
def test_values_that_no_score_should_have(request, device, shared):
    if shared:
        request.getfixturevalue("short_programs")
    table = torch.tensor(HOSTILE, device=device)
    scores = table[torch.randint(len(table), (2, 4, 100), device=device)]
    scores[0, 0], scores[0, 1], scores[0, 2], scores[0, 3] = torch.nan, -torch.inf, -0.0, torch.inf
    # NaN of either sign, whatever its payload, equals infinity.
    payloads = torch.tensor([0x7FC00000, -0x400000, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    scores[1, 0, 10:14] = payloads.to(device)
    for mask in masks(2, 4, 100, device)[1:4:2]:
        for top_k in (1, 20):
            assert_same(scores, top_k, mask)


@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
def test_scores_that_are_not_seen_are_not_looked_at(device, fill):
    scores = torch.randn(2, 4, 60, device=device)
    seen = causal_mask(4, 60, device).expand(2, -1, -1)
    assert torch.equal(topk_select(scores.masked_fill(~seen, fill), 8), topk_select(scores, 8))


def test_layouts(device):
    scores = torch.randn(2, 3, 50, device=device)
    want = topk_select(scores, 9)
    for other in (
        torch.cat([scores, scores], -1)[..., :50],
        torch.stack([scores, scores], -1)[..., 0],
        scores.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert torch.equal(topk_select(other, 9), want)
    assert_same(scores[:1].expand(2, -1, -1), 9)


def test_is_the_same_in_every_run(short_programs, device):
    scores = torch.randn(1, 2, 150, device=device).round()
    first = topk_select(scores, 30)
    assert all(torch.equal(topk_select(scores, 30), first) for _ in range(3))


def test_nothing_to_do(device):
    for shape in ((0, 2, 5), (1, 0, 5), (1, 2, 0)):
        assert topk_select(torch.zeros(shape, device=device), 3).shape == (*shape[:2], min(3, shape[2]))


def test_rules_of_programs():
    assert configs.block_for(8192) == 8192 and configs.block_for(8191) == 8192 and configs.block_for(1) == 16
    assert [configs.warps_for(block) for block in (16, 512, 1024, 8192)] == [1, 1, 2, 16]
    assert configs.rows_for(65536, 2048) == 512
    assert configs.rows_for(2**30, 4096) == 1


def test_what_runs_on_the_reference_and_why(device):
    scores = torch.randn(1, 1, 9000, device=device)
    with pytest.raises(BackendError, match=r"scores are float32, got torch.float64"):
        topk_select(scores.double(), 3)
    with pytest.raises(BackendError, match="at most 4096 of more than 8192 keys, got 4097 of 9000"):
        topk_select(scores, 4097)
    assert_same(scores[..., :8192], 4097)
    with use_backend("auto"):
        assert topk_select(scores, 4097).shape == (1, 1, 4097)


def test_compiled_gives_the_same(device):
    torch.compiler.reset()
    scores = torch.randn(2, 4, 60, device=device)
    compiled = torch.compile(topk_select, fullgraph=True, backend="aot_eager")
    for mask in masks(2, 4, 60, device)[:4]:
        assert torch.equal(compiled(scores, 7, mask), topk_select(scores, 7, mask))


def test_custom_operators_are_registered_properly(device):
    from deepseek_kernels.attention.topk_select import launch

    torch.library.opcheck(launch.select, (torch.randn(2, 4, 60, device=device), 7, masks(2, 4, 60, device)[2]))
