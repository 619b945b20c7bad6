"""The rotation of interleaved pairs: the definition, and the kernel against the reference, bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepseek_kernels import BackendError, use_backend
from deepseek_kernels.attention.rope import rope, rope_
from deepseek_kernels.testing.numeric import assert_bitwise

# Batch, tokens, heads (None: one key for all), width, rotary width.
SIZES = {
    "queries": (2, 3, 4, 24, 16),
    "keys": (2, 5, None, 16, 16),
    "one token of one head": (1, 1, 1, 4, 2),
    "pairs that are no power of two": (1, 3, 3, 19, 12),  # and an odd number of columns before them
    "several tiles": (1, 3, 150, 80, 64),  # of heads: 16 of 64 columns in each
    "several tiles of tokens": (3, 30, None, 72, 64),  # of 16; they end inside of a batch
    "no token": (2, 0, 4, 8, 4),
    "no batch": (0, 3, 4, 8, 4),
    "no head": (2, 3, 0, 8, 4),
}


def angles(batch: int, tokens: int, rotary: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    turns = torch.randn(batch, tokens, rotary // 2, dtype=dtype) * 3
    return turns.cos(), turns.sin()


def operands(
    name: str, dtype: torch.dtype, device: torch.device, shared: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, heads, width, rotary = SIZES[name]
    x = torch.randn(*(size for size in (batch, tokens, heads, width) if size is not None), dtype=dtype)
    cos, sin = angles(1 if shared else batch, tokens, rotary)
    return x.to(device), cos.to(device), sin.to(device)


def rotated_one_by_one(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition in float64, pair by pair, as a product of complex numbers."""
    out = x.double().clone().reshape(*x.shape[:2], -1, x.shape[-1])
    first = x.shape[-1] - 2 * cos.shape[-1]
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for n in range(out.shape[2]):
                for i in range(cos.shape[-1]):
                    turn = cos[b % cos.shape[0], t, i].item() + 1j * sin[b % cos.shape[0], t, i].item()
                    a, c = first + 2 * i, first + 2 * i + 1
                    value = (out[b, t, n, a].item() + 1j * out[b, t, n, c].item()) * turn
                    out[b, t, n, a], out[b, t, n, c] = value.real, value.imag
    return out.view(x.shape)


@pytest.mark.parametrize("shared", [False, True], ids=["own positions", "same positions"])
@pytest.mark.parametrize("name", ["queries", "keys", "one token of one head", "pairs that are no power of two"])
def test_pairs_turn_and_other_columns_stay(name, shared):
    x, cos, sin = operands(name, torch.float32, torch.device("cpu"), shared)
    out, first = rope(x, cos, sin), x.shape[-1] - 2 * cos.shape[-1]
    # Two products and a sum, each rounded to half a unit in 2^24 of at most the sum of the absolute products.
    torch.testing.assert_close(out.double(), rotated_one_by_one(x, cos, sin), rtol=0, atol=4 * 2.0**-24 * x.abs().max())
    assert_bitwise(out[..., :first], x[..., :first], strides=False)
    assert out.is_contiguous()


def test_the_reference_is_exact_in_float64():
    x, cos, sin = operands("queries", torch.float64, torch.device("cpu"))
    out = rope(x, cos.double(), sin.double())
    torch.testing.assert_close(out, rotated_one_by_one(x, cos, sin), rtol=0, atol=1e-14)


def test_what_is_narrow_is_rounded_once():
    x, cos, sin = operands("queries", torch.bfloat16, torch.device("cpu"))
    assert_bitwise(rope(x, cos, sin), rope(x.float(), cos, sin).bfloat16())


def test_gradcheck():
    cos, sin = angles(1, 3, 4, torch.float64)
    x = torch.randn(2, 3, 2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rope(x, cos, sin), (x,))


def test_angles_get_no_gradient():
    x, cos, sin = operands("keys", torch.float32, torch.device("cpu"))
    x, cos, sin = x.requires_grad_(), cos.requires_grad_(), sin.requires_grad_()
    rope(x, cos, sin).sum().backward()
    assert x.grad is not None and cos.grad is None and sin.grad is None


def projection(device: torch.device) -> Tensor:
    return torch.randn(2, 3, 90, device=device).bfloat16()


def queries_of(projection: Tensor) -> Tensor:
    """A part of it as [2, 3, 4, 20]: tokens lie apart, and nothing is aligned."""
    return projection[..., 7:87].unflatten(-1, (4, 20))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_in_place_touches_nothing_but_the_pairs(backend, triton_backend, device):
    memory, (cos, sin) = projection(device), (t.to(device) for t in angles(1, 3, 12))
    queries, before = queries_of(memory), memory.clone()
    expected = rope(queries, cos, sin)
    with use_backend(backend):
        assert rope_(queries, cos, sin) is queries
    assert_bitwise(queries, expected, strides=False)
    assert memory.ne(before).any()
    queries[..., 8:] = queries_of(before)[..., 8:]
    assert_bitwise(memory, before)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", SIZES)
def test_in_place_is_the_new_tensor(backend, triton_backend, device, name, dtype):
    x, cos, sin = operands(name, dtype, device)
    with use_backend("reference"):
        expected = rope(x, cos, sin)
    with use_backend(backend):
        assert_bitwise(rope_(x.clone(), cos, sin), expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_columns_that_lie_apart(backend, triton_backend, device):
    x, cos, sin = operands("queries", torch.bfloat16, device)
    apart = torch.stack([x, x], -1).flatten(-2)
    view, others = apart[..., ::2], apart[..., 1::2].clone()
    with use_backend(backend):
        assert_bitwise(rope(view, cos, sin), rope(x, cos, sin))
        assert_bitwise(rope_(view, cos, sin), rope(x, cos, sin), strides=False)
    assert_bitwise(apart[..., 1::2], others, strides=False)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_in_place_where_gradients_are_off(backend, triton_backend, device):
    x, cos, sin = operands("keys", torch.float32, device)
    x.requires_grad_()
    with use_backend(backend):
        with pytest.raises(ValueError, match=r"expected x without gradient, or torch.no_grad\(\)"):
            rope_(x, cos, sin)
        with torch.no_grad():
            expected = rope(x, cos, sin)
            assert_bitwise(rope_(x, cos, sin).detach(), expected)


# The kernel against the reference.


def both_ways(x: Tensor, cos: Tensor, sin: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = rope(x, cos, sin)
    out.backward(grad)
    return [out.detach(), x.grad]


def assert_same_both_ways(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    grad = torch.randn_like(x)
    with use_backend("reference"):
        expected = both_ways(x, cos, sin, grad)
    with use_backend("triton"):
        got = both_ways(x, cos, sin, grad)
    for mine, theirs in zip(got, expected, strict=True):
        assert_bitwise(mine, theirs, strides=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", SIZES)
def test_kernel_and_its_gradient_are_bitwise(triton_backend, device, name, dtype):
    assert_same_both_ways(*operands(name, dtype, device, shared=name == "queries"))


@pytest.mark.parametrize("layout", ["part of a projection", "heads before tokens", "one row repeated"])
def test_other_layouts_give_the_same(triton_backend, device, layout):
    x = {
        "part of a projection": lambda: queries_of(projection(device)),
        "heads before tokens": lambda: torch.randn(2, 4, 3, 20, device=device).transpose(1, 2),
        "one row repeated": lambda: torch.randn(2, 3, 1, 20, device=device).expand(2, 3, 4, 20),
    }[layout]()
    cos, sin = (t.to(device) for t in angles(2, 3, 12))
    assert_same_both_ways(x, cos, sin)
    with use_backend("triton"):
        assert_bitwise(rope(x, cos, sin), rope(x.contiguous(), cos, sin))


@pytest.mark.parametrize("layout", ["one batch repeated", "transposed", "cosines and sines side by side", "unlike"])
def test_other_layouts_of_angles(triton_backend, device, layout):
    x, cos, sin = operands("queries", torch.float32, device)
    cos, sin = {
        "one batch repeated": lambda: (cos[:1].expand_as(cos), sin[:1].expand_as(sin)),
        "transposed": lambda: (cos.mT.contiguous().mT, sin.mT.contiguous().mT),
        "cosines and sines side by side": lambda: torch.cat((cos, sin), -1).chunk(2, -1),
        "unlike": lambda: (torch.cat((cos, sin), -1).chunk(2, -1)[0], sin),
    }[layout]()
    assert_same_both_ways(x, cos, sin)


def test_many_tokens_take_large_tiles(triton_backend, device, monkeypatch):
    from deepseek_kernels.attention.rope import configs

    assert configs.tile_for(8192, 128, 32) == {"TOKENS": 1, "HEADS": 64, "PAIR_BLOCK": 32}
    assert configs.tile_for(8192, 1, 32) == {"TOKENS": 16, "HEADS": 1, "PAIR_BLOCK": 32}
    monkeypatch.setattr(configs, "_FEW", configs._MANY)
    assert_same_both_ways(*operands("several tiles", torch.bfloat16, device))
    assert_same_both_ways(*operands("several tiles of tokens", torch.bfloat16, device))


def test_what_is_not_finite_stays_in_its_pair(triton_backend, device):
    x, cos, sin = torch.ones(1, 2, 3, 8), torch.ones(1, 2, 2), torch.zeros(1, 2, 2)
    x[0, 0, 1, 0], x[0, 1, 2, 5] = torch.inf, torch.nan
    with use_backend("triton"):
        out = rope(x.to(device), cos.to(device), sin.to(device)).cpu()
    assert out.isfinite().logical_not().nonzero().tolist() == [[0, 0, 1, 0], [0, 1, 2, 4], [0, 1, 2, 5]]


def test_compiled_gives_the_same(triton_backend, device):
    torch.compiler.reset()
    memory, (cos, sin) = projection(device), (t.to(device) for t in angles(1, 3, 12))
    queries = queries_of(memory)
    grad = torch.randn_like(queries)

    def in_place(memory: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rope_(queries_of(memory), cos, sin) * 2

    with use_backend("triton"):
        compiled = torch.compile(rope, fullgraph=True, backend="aot_eager")
        leaf = queries.detach().requires_grad_()
        out = compiled(leaf, cos, sin)
        out.backward(grad)
        for mine, theirs in zip([out.detach(), leaf.grad], both_ways(queries, cos, sin, grad), strict=True):
            assert_bitwise(mine, theirs, strides=False)
        first, second = memory.clone(), memory.clone()
        out = torch.compile(in_place, fullgraph=True, backend="aot_eager")(first, cos, sin)
        assert_bitwise(out, in_place(second, cos, sin), strides=False)
        assert_bitwise(first, second)
        assert first.ne(memory).any()


def test_custom_operators_are_registered_properly(triton_backend, device):
    from deepseek_kernels.attention.rope import launch

    x, cos, sin = operands("queries", torch.float32, device)
    torch.library.opcheck(launch._rope, (x.clone().requires_grad_(), cos, sin, False))
    torch.library.opcheck(launch.rope_, (x, cos, sin))


# What users do wrong.


def test_float64_runs_on_the_reference(triton_backend, device):
    x, cos, sin = operands("keys", torch.float32, device)
    with use_backend("auto"):
        assert rope(x.double(), cos, sin).dtype == torch.float64
    with use_backend("triton"):
        with pytest.raises(BackendError, match=r"its x is bfloat16, float16 or float32, got torch.float64"):
            rope(x.double(), cos, sin)
        with pytest.raises(BackendError, match=r"its cos and sin are float32, got torch.float64"):
            rope_(x, cos.double(), sin.double())


@pytest.mark.parametrize("call", [rope, rope_])
@pytest.mark.parametrize(
    ("x", "cos", "sin", "message"),
    [
        ((3, 8), (1, 3, 2), (1, 3, 2), r"x \[B, T, N, D\] or \[B, T, D\], got torch.float32 \[3, 8\]"),
        ((2, 3, 8), (2, 3, 2), (1, 3, 2), r"cos and sin alike.* got torch.float32 \[2, 3, 2\] and .* \[1, 3, 2\]"),
        ((2, 3, 8), (3, 2), (3, 2), r"cos and sin \[2 or 1, 3, R / 2\] with 0 < R <= 8, got \[3, 2\]"),
        ((2, 3, 8), (3, 3, 2), (3, 3, 2), r"got \[3, 3, 2\]"),
        ((2, 3, 4, 8), (2, 4, 2), (2, 4, 2), r"\[2 or 1, 3, R / 2\].* got \[2, 4, 2\]"),
        ((2, 3, 8), (2, 3, 5), (2, 3, 5), r"with 0 < R <= 8, got \[2, 3, 5\]"),
        ((2, 3, 8), (2, 3, 0), (2, 3, 0), r"got \[2, 3, 0\]"),
    ],
)
def test_wrong_shapes_are_named(call, x, cos, sin, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(x), torch.ones(cos), torch.ones(sin))


@pytest.mark.parametrize("call", [rope, rope_])
def test_wrong_dtypes_are_named(call):
    x, half = torch.ones(2, 3, 8), torch.ones(2, 3, 2)
    with pytest.raises(ValueError, match=r"floating-point x .* got torch.int64"):
        call(x.long(), half, half)
    with pytest.raises(ValueError, match=r"in float32 or float64, got torch.bfloat16"):
        call(x, half.bfloat16(), half.bfloat16())
    with pytest.raises(ValueError, match=r"alike.* got torch.float32 .* and torch.float64"):
        call(x, half, half.double())
