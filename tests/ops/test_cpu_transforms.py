"""Derivatives, batching and wrappers of operators where the C++ ones run: those step aside or say that they cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

from deepseek_kernels import (
    add_rms_norm,
    dense_gemm,
    fp8_weight_fused_moe,
    fused_moe,
    indexer_scores,
    latent_write,
    mla_attention,
    rms_norm,
    topk_gate,
    topk_select,
    use_backend,
)
from deepseek_kernels.testing.numeric import assert_bitwise


@pytest.fixture(autouse=True)
def backend(cpu_backend) -> Iterator[None]:
    with use_backend("cpu"):
        yield


SEEDED = torch.Generator().manual_seed(0)
GATE_UP, DOWN = torch.randn(4, 6, 16, generator=SEEDED), torch.randn(4, 16, 3, generator=SEEDED)
IDS = torch.tensor([[0, 3], [3, 1]])
SCALES = torch.rand(4, 2, 1, generator=SEEDED) + 0.5, torch.rand(4, 1, 1, generator=SEEDED) + 0.5
CODES = torch.float8_e4m3fn


def weigh_experts(x: Tensor) -> Tensor:
    codes = GATE_UP.to(CODES), SCALES[0], DOWN.to(CODES), SCALES[1]
    return fp8_weight_fused_moe(x, *codes, IDS, torch.rand(2, 2, generator=torch.Generator().manual_seed(0)))


# Functions of x [2, 16].
OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense_gemm": lambda x: dense_gemm(x, GATE_UP[0]),
    "rms_norm": lambda x: rms_norm(x, torch.ones(16), 1e-6),
    "add_rms_norm": lambda x: torch.cat(add_rms_norm(x, x.flip(0), torch.ones(16), 1e-6)),
    "topk_gate": lambda x: topk_gate(x, None, 3, n_group=1, topk_group=1, group_best=1)[0],
    "fused_moe": lambda x: fused_moe(x, GATE_UP, DOWN, IDS, torch.ones(2, 2)),
    "fp8_weight_fused_moe": weigh_experts,
    "indexer_scores": lambda x: indexer_scores(
        x.view(1, 1, 4, 8), GATE_UP.view(1, -1, 8), torch.ones(1, 1, 4), torch.ones(1, 48, dtype=torch.bool)
    ),
}


def tangent(function: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor | None:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))).tangent


DIFFERENTIABLE = ["dense_gemm", "rms_norm", "add_rms_norm", "topk_gate", "indexer_scores"]


@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "fused_moe"])
def test_tangents_are_not_dropped(name):
    """Operators without a derivative forget them in silence."""
    x, direction = torch.rand(2, 16), torch.randn(2, 16)
    found = tangent(OPERATORS[name], x, direction)
    assert found is not None
    step = 1e-3 * direction
    quotient = (OPERATORS[name](x + step) - OPERATORS[name](x - step)) / 2e-3
    torch.testing.assert_close(found, quotient, atol=0.02, rtol=0.02)
    if name in DIFFERENTIABLE:
        torch.testing.assert_close(found, torch.func.jvp(OPERATORS[name], (x,), (direction,))[1])


def test_a_reference_without_tangents_says_so():
    with pytest.raises(NotImplementedError, match="jvp"):
        tangent(OPERATORS["fp8_weight_fused_moe"], torch.rand(2, 16), torch.randn(2, 16))


@pytest.mark.parametrize("name", ["dense_gemm", "rms_norm", "add_rms_norm", "topk_gate"])
def test_batches_of_calls(name):
    x = torch.rand(3, 2, 16)
    want = torch.stack([OPERATORS[name](one) for one in x])
    torch.testing.assert_close(torch.func.vmap(OPERATORS[name])(x), want)


KV, KEY = torch.randn(1, 6, 2, 18), torch.randn(1, 6, 4)


def attention(q: Tensor) -> Tensor:
    return mla_attention(q, KV, KEY, 0.3).square().sum()


def test_gradients_by_functions():
    q = torch.randn(2, 1, 4, 2, 12)
    want = [torch.autograd.grad(attention(one), one)[0] for one in q.clone().requires_grad_().unbind()]
    torch.testing.assert_close(torch.func.grad(attention)(q[0]), want[0])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(attention))(q), torch.stack(want))


@pytest.mark.parametrize("name", ["dense_gemm", "rms_norm", "mla_attention"])
def test_transforms_inside_of_compiled_code(name):
    function = attention if name == "mla_attention" else lambda x: OPERATORS[name](x).square().sum()
    x = torch.randn(1, 4, 2, 12) if name == "mla_attention" else torch.randn(2, 16)
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(function(leaf), leaf)
    torch.compiler.reset()
    compiled = torch.compile(torch.func.grad(function), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want)
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))


class Distributed(Tensor):
    """Runs PyTorch's operators on a tensor inside, and no others, as distributed tensors do."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Distributed:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if not str(func).startswith("aten."):
            raise NotImplementedError(f"no strategy for {func}")
        plain, named = tree_map_only(Distributed, lambda x: x.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, Distributed, func(*plain, **named))


@pytest.mark.parametrize("name", ["dense_gemm", "rms_norm", "add_rms_norm", "topk_gate", "indexer_scores"])
def test_tensors_with_rules_of_their_own(name):
    x = torch.rand(2, 16)
    found = OPERATORS[name](Distributed(x))
    assert isinstance(found, Distributed)
    torch.testing.assert_close(found.inner, OPERATORS[name](x))


def test_attention_on_tensors_with_rules_of_their_own():
    q = torch.randn(1, 4, 2, 12)
    found = mla_attention(Distributed(q), Distributed(KV), Distributed(KEY), 0.3)
    torch.testing.assert_close(found.inner, mla_attention(q, KV, KEY, 0.3))
    scores = torch.rand(1, 4, 9)
    seen = torch.ones(4, 9, dtype=torch.bool)
    assert_bitwise(topk_select(Distributed(scores), 3, Distributed(seen)), topk_select(scores, 3, seen), strides=False)


def test_a_second_derivative_that_there_is_not_raises():
    q = torch.randn(1, 4, 2, 12).requires_grad_()
    (gradient,) = torch.autograd.grad(attention(q), q, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for deepseek_kernels_cpu::mla_attention_backward"):
        gradient.sum().backward()


@pytest.mark.parametrize(("x", "weight"), [(torch.float64, torch.float64), (torch.float32, torch.float64)])
def test_norms_of_other_dtypes_are_the_reference_s(x, weight):
    values, gain = torch.randn(3, 20, dtype=x), torch.rand(20, dtype=weight)
    found = rms_norm(values, gain, 1e-6), *add_rms_norm(values, values, gain, 1e-6)
    with use_backend("reference"):
        want = rms_norm(values, gain, 1e-6), *add_rms_norm(values, values, gain, 1e-6)
    for got, right in zip(found, want, strict=True):
        assert_bitwise(got, right)


def test_what_autograd_has_saved_is_not_overwritten_in_silence():
    buffer, factor = torch.zeros(1, 5, 8), torch.ones(1, 5, 8, requires_grad=True)
    product = factor * buffer
    turns = torch.ones(1, 2, 2)
    with torch.no_grad():
        latent_write(torch.randn(1, 2, 8), torch.ones(4), 1e-6, turns, turns, buffer, torch.tensor([[0, 1]]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_a_cache_made_in_inference_mode_is_written():
    with torch.inference_mode():
        buffer = torch.zeros(1, 5, 8)
    turns = torch.ones(1, 1, 2)
    latent_write(torch.ones(1, 1, 8), torch.ones(4), 0.0, turns, 0 * turns, buffer, torch.tensor([[3]]))
    assert buffer[0, 3].eq(1).all() and not buffer[0, :3].any()


class Operators(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(dense_gemm(x, GATE_UP[0]), torch.ones(6), 1e-6)


def test_exported_programs_call_none_of_the_library():
    """They run where it is not built, and for numbers of rows that no branch has looked at."""
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(Operators(), (torch.rand(3, 16),), dynamic_shapes={"x": {0: rows}}, strict=False)
    assert not [node for node in program.graph.nodes if "deepseek_kernels_cpu" in str(node.target)]
    x = torch.rand(17, 16)
    torch.testing.assert_close(program.module()(x), Operators()(x))
