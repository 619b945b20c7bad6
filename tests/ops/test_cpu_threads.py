"""The C++ operators that share work among threads: the same bits with any number of them, and any rows beside."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from deepseek_kernels import add_rms_norm, fused_moe, latent_write, mla_decode, mla_decode_paged, topk_gate, use_backend
from deepseek_kernels.attention.packed_latents import pack, unpack
from deepseek_kernels.testing.numeric import assert_bitwise
from support.cpu_operators import cpu_instructions, on_two_threads
from support.expert_bounds import assert_within, experts_loop

LATENT, ROTATED = 64, 16
KEYS = 700  # three parts of the keys, the last one partial


@pytest.fixture(params=["native", "portable"], autouse=True)
def instructions(request, cpu_backend) -> Iterator[str]:
    with cpu_instructions(request.param):
        yield request.param


def states(batch: int, dtype: torch.dtype, packed: bool) -> Tensor:
    plain = torch.randn(batch, KEYS, LATENT + ROTATED).to(dtype)
    with use_backend("reference"):
        return pack(plain, LATENT) if packed else plain


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention(dtype, packed):
    q, keys = torch.randn(2, 2, 5, LATENT + ROTATED).to(dtype), states(2, dtype, packed)
    spans = torch.tensor([[[0, KEYS - 1], [0, KEYS]], [[300, 520], [40, 90]]], dtype=torch.int32)
    for mask in (None, spans, torch.rand(2, KEYS) < 0.5):

        def attend(rows: slice = slice(None), mask=mask) -> Tensor:
            own = mask[rows] if mask is not None and mask.ndim == 3 else mask
            return mla_decode(q[rows], keys[rows], LATENT, 0.2, own)

        together = attend()
        assert_bitwise(on_two_threads(attend), together)
        assert_bitwise(torch.cat([attend(slice(0, 1)), attend(slice(1, 2))]), together)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_in_parts_against_float64(dtype, packed):
    """Keys beyond what is seen are NaN, and the parts are merged with their own greatest scores."""
    q, keys = torch.randn(1, 1, 7, LATENT + ROTATED).to(dtype), states(1, dtype, packed)
    keys[:, 690:] = 255 if packed else torch.nan
    got = mla_decode(q, keys, LATENT, 0.2, torch.tensor([[[5, 690]]], dtype=torch.int32))
    meant = torch.cat(unpack(keys, LATENT, torch.float32), -1) if packed else keys
    seen = meant[0, 5:690].double()
    expected = (q[0, 0].double() @ seen.T * 0.2).softmax(-1) @ seen[:, :LATENT]
    # With u half a unit of bfloat16: weights and result are rounded once each, values of packed keys once, which the
    # scores, some units of magnitude in size, feel too. In float32, sums of up to 685 terms in any order.
    unit = torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else len(seen) * 2.0**-24
    assert (got[0, 0].double() - expected).abs().max() <= 4 * unit * seen.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pages_are_read_like_one_stretch(dtype):
    q, keys = torch.randn(1, 1, 5, LATENT + ROTATED).to(dtype), states(1, dtype, False)
    pages = torch.cat([keys, keys.new_full((1, 4, LATENT + ROTATED), torch.nan)], 1).view(44, 16, LATENT + ROTATED)
    order = torch.randperm(44)
    table = order.argsort()[None].int()
    got = mla_decode_paged(q, pages[order], table, torch.tensor([KEYS], dtype=torch.int32), LATENT, 0.2)
    room = torch.nn.functional.pad(keys, (0, 0, 0, 4))
    spans = torch.tensor([[[0, KEYS]]], dtype=torch.int32)
    assert_bitwise(got, mla_decode(q, room, LATENT, 0.2, spans))


@pytest.mark.parametrize("tokens", [11, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts(dtype, tokens, instructions):
    if tokens > 32 and dtype == torch.bfloat16 and instructions != "native":
        pytest.skip("the experts of many tokens in bfloat16 are the reference's")
    x = torch.randn(tokens, 100).to(dtype)
    gate_up, down = (torch.randn(5, 300, 100) / 10).to(dtype), (torch.randn(5, 100, 150) / 12).to(dtype)
    ids = torch.randint(6, (tokens, 3))  # 5: served elsewhere
    ids[:, 0] = 2  # more rows than one reading of the weights serves
    weights = torch.rand(tokens, 3)
    together = fused_moe(x, gate_up, down, ids, weights)
    assert_within(together, *experts_loop(x, gate_up, down, ids, weights, dtype, True))
    assert_bitwise(on_two_threads(lambda: fused_moe(x, gate_up, down, ids, weights)), together)
    alone = [fused_moe(x[i : i + 1], gate_up, down, ids[i : i + 1], weights[i : i + 1]) for i in range(tokens)]
    assert_bitwise(torch.cat(alone), together)


def test_experts_outside_of_all_are_refused():
    x, gate_up, down = torch.randn(1, 8), torch.randn(2, 8, 8), torch.randn(2, 8, 4)
    for wrong in (3, -1):
        with pytest.raises(IndexError, match=f"expected expert_ids from 0 to 2, got {wrong}"):
            fused_moe(x, gate_up, down, torch.tensor([[wrong]]), torch.ones(1, 1))


def test_norm_choice_and_cache():
    x, residual, weight = torch.randn(70, 500).bfloat16(), torch.randn(70, 500), torch.rand(500)
    scores, bias = torch.rand(70, 32), torch.rand(32)
    kv, gain, angles = torch.randn(1, 70, LATENT + ROTATED).bfloat16(), torch.rand(LATENT), torch.rand(1, 70, 8)
    slots = torch.randint(0, 50, (1, 70))  # with two tokens in one slot, one of them is there, whole

    def norm() -> Tensor:
        return torch.cat(add_rms_norm(x, residual, weight, 1e-6))

    def choose() -> Tensor:
        weights, ids = topk_gate(scores, bias, 4, n_group=4, topk_group=2, group_best=2)
        return torch.cat([weights, ids.float()])

    def write() -> Tensor:
        buffer = torch.zeros(1, 50, LATENT + ROTATED)
        latent_write(kv, gain, 1e-6, angles.cos(), angles.sin(), buffer, slots)
        return buffer

    for action in (norm, choose, write):
        assert_bitwise(on_two_threads(action), action())
