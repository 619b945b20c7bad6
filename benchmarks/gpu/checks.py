"""What only a GPU can show of the operators: that they repeat bit by bit, that integers stay exact, that offsets beyond
2^31 are right, and that long FP8 sums are promoted.

Each check is a function of a device and sizes that raises `Mismatch`. At small sizes all of them run on a CPU too, on
the references: that tests the checks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepseek_arch import DeepseekConfig, DeepseekLM
from deepseek_arch.cache.static_cache import StaticLatentCache
from deepseek_arch.generation.compiled_step import CompiledDecodeStep
from deepseek_kernels import (
    dequantize_blocks,
    fp8_gemm,
    fp8_grouped_gemm,
    fp8_grouped_wgrad,
    grouped_gemm,
    mla_decode,
    permute,
    quantize_blocks,
    quantize_both,
    quantize_rows,
    quantize_transposed,
    sort_by_expert,
    swiglu_quantize,
    unpermute,
    use_backend,
)
from deepseek_kernels.common.fp8 import empty_codes, empty_scales

from ..operators.declare import Mismatch, Operator, Random, Shape, operators, require_close, require_equal
from ..operators.fp8_operands import BF16_ROUNDING, CODES_OFF, PRODUCT_ERROR, ceil_div, wide
from ..operators.scales import scale

__all__ = ["FULL", "SMALL", "Sizes", "Skipped", "checks", "repeats"]

REPEATS = 20


class Skipped(Exception):
    """The device cannot hold what a check needs."""


@dataclass(frozen=True)
class Sizes:
    """How large the checks are.

    Attributes:
        scale: whose first shape of each operator is repeated.
        products: M, N, K of the exact products.
        rows, width: of a matrix that no int32 can index.
        experts, expert: their weights [experts, expert, width], likewise.
        tokens, topk: their rows [tokens * topk, width], likewise.
        long: terms of the longest sum.
    """

    scale: str
    products: tuple[tuple[int, int, int], ...]
    rows: int
    width: int
    experts: int
    expert: int
    tokens: int
    topk: int
    long: int


FULL = Sizes(
    scale="v3",
    # Whole tiles, a decode, one token on a partial block, and sizes that nothing divides.
    products=((4096, 7168, 2048), (64, 7168, 16384), (1, 576, 7168), (300, 200, 1008)),
    rows=300_032,
    width=7168,
    experts=80,
    expert=4096,
    tokens=40_000,
    topk=8,
    long=16384,
)
SMALL = Sizes("tiny", ((20, 24, 200), (1, 130, 128)), 256, 192, 3, 160, 12, 2, 512)

Check = Callable[[torch.device, Sizes], None]


def checks(sizes: Sizes) -> dict[str, Check]:
    """Every check by name, the quick ones first."""
    found: dict[str, Check] = dict(_CHECKS)
    for operator in operators():
        shape = min(operator.shapes(scale(sizes.scale)), key=lambda one: one.priority)
        found[f"repeats: {operator.name} {shape.name}"] = _repeats_of(operator, shape)
    return found | _LARGE


# ------------------------------------------------------------------ bitwise repeats


def _repeats_of(operator: Operator, shape: Shape) -> Check:
    return lambda device, sizes: repeats(operator, shape, device)


def repeats(operator: Operator, shape: Shape, device: torch.device, times: int = REPEATS) -> None:
    """The same bits every time: a race shows as a difference, memory that nobody wrote as NaN.

    Each turn has the same inputs, also where the operator writes to them.
    """

    def inputs() -> tuple[Any, ...]:
        return operator.inputs(shape, Random(device, key=f"{operator.name} {shape.name}"))

    same = inputs()
    first = tuple(result.clone() for result in _tensors(operator.ours(*same)))
    for turn in range(1, times):
        for result in first:  # the allocator hands this memory to the next call
            _poison(torch.empty_like(result))
        same = inputs() if operator.in_place else same
        for mine, expected in zip(_tensors(operator.ours(*same)), first, strict=True):
            require_equal(mine, expected, f"repetition {turn} of {times - 1}")


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return tuple(one.detach() for one in (result if isinstance(result, tuple) else (result,)))


def _poison(memory: Tensor) -> None:
    if memory.element_size() == 1:
        memory.view(torch.uint8).fill_(0x7F)  # NaN in e4m3
    else:
        memory.fill_(torch.nan if memory.is_floating_point() else -1)


# ------------------------------------------------------------------ exact products of integers


def _integer_codes(random: Random, rows: int, columns: int) -> Tensor:
    """Integers from -2 to 2: 128 products of them fit into the bits that the FP8 units keep."""
    codes = empty_codes(rows, columns, random.device)
    codes.copy_(random.integers(-2, 3, rows, columns).to(torch.float8_e4m3fn))
    return codes


def _power_scales(random: Random, rows: int, columns: int, *, grid: bool = False) -> Tensor:
    """1/2, 1 or 2; of groups, or of blocks with `grid`."""
    powers = (1 << random.integers(0, 3, rows, columns)).float() / 2
    return powers if grid else empty_scales(rows, columns, random.device).copy_(powers)


def _double(codes: Tensor, scale: Tensor) -> Tensor:
    return wide(codes, scale).double()


def exact_products(device: torch.device, sizes: Sizes) -> None:
    """`fp8_gemm` on integers, with scales that are powers of two: every sum is exact, so every bit is determined."""
    for m, n, k in sizes.products:
        random = Random(device, key=f"exact {m} {n} {k}")
        a, a_scale = _integer_codes(random, m, k), _power_scales(random, m, ceil_div(k))
        b = _integer_codes(random, n, k)
        for b_scale in (
            _power_scales(random, ceil_div(n), ceil_div(k), grid=True),
            _power_scales(random, n, ceil_div(k)),
        ):
            right = (_double(a, a_scale) @ _double(b, b_scale).T).float()
            what = f"product {m}x{n}x{k} with scales {list(b_scale.shape)}"
            require_equal(fp8_gemm(a, a_scale, b, b_scale, torch.float32), right, what)


def _ragged_ends(rows: int, device: torch.device) -> Tensor:
    """Four experts: some rows, none, one, and not all of the rest."""
    return torch.tensor([rows // 3, rows // 3, rows // 3 + 1, rows - 1], device=device)


def _spans(ends: Tensor) -> list[tuple[int, slice]]:
    stops = ends.tolist()
    return [(expert, slice(start, stop)) for expert, (start, stop) in enumerate(zip([0, *stops], stops, strict=False))]


def exact_grouped_products(device: torch.device, sizes: Sizes) -> None:
    """`fp8_grouped_gemm` and `grouped_gemm` on integers, for experts with many rows, none and one."""
    for m, n, k in sizes.products:
        rows = max(m, 6)
        random, ends = Random(device, key=f"grouped {m} {n} {k}"), _ragged_ends(rows, device)
        x, x_scale = _integer_codes(random, rows, k), _power_scales(random, rows, ceil_div(k))
        weight = torch.stack([_integer_codes(random, n, k) for _ in ends])
        w_scale = torch.stack([_power_scales(random, ceil_div(n), ceil_div(k), grid=True) for _ in ends])
        right, plain = torch.zeros(2, rows, n, dtype=torch.float64, device=device)
        for expert, own in _spans(ends):
            right[own] = _double(x[own], x_scale[own]) @ _double(weight[expert], w_scale[expert]).T
            plain[own] = x[own].double() @ weight[expert].double().T
        got = fp8_grouped_gemm(x, x_scale, weight, w_scale, ends, torch.float32)
        require_equal(got, right.float(), f"grouped product {rows}x{n}x{k}")
        got = grouped_gemm(x.bfloat16(), weight.bfloat16(), ends)
        require_equal(got, plain.bfloat16(), f"grouped bfloat16 product {rows}x{n}x{k}")


def exact_grouped_gradients(device: torch.device, sizes: Sizes) -> None:
    """`fp8_grouped_wgrad` on integers, in the layout of `quantize_grouped_transposed`."""
    m, n, k = sizes.products[0]
    random, ends = Random(device, key="gradient"), _ragged_ends(m, device)
    spans = [(expert, own.stop - own.start) for expert, own in _spans(ends)]
    columns = sum(ceil_div(count) * 128 for _, count in spans)
    grad, x = _integer_codes(random, n, columns), _integer_codes(random, k, columns)
    grad_scale, x_scale = _power_scales(random, n, columns // 128), _power_scales(random, k, columns // 128)
    right = torch.zeros(len(ends), n, k, dtype=torch.float64, device=device)
    first = 0
    for expert, count in spans:
        for codes in (grad, x):  # columns that hold no token are zero
            codes[:, first + count : first + ceil_div(count) * 128] = 0
        own, groups = slice(first, first + ceil_div(count) * 128), slice(first // 128, first // 128 + ceil_div(count))
        right[expert] = _double(grad[:, own], grad_scale[:, groups]) @ _double(x[:, own], x_scale[:, groups]).T
        first = own.stop
    got = fp8_grouped_wgrad(grad, grad_scale, x, x_scale, ends, torch.float32)
    require_equal(got, right.float(), f"gradient {n}x{k} of {m} rows")


# ------------------------------------------------------------------ promotion


def promotion(device: torch.device, sizes: Sizes) -> None:
    """A long sum of positive terms: kept in the FP8 units' 14 bits it would lose a percent or more."""
    random = Random(device, key="promotion")
    with use_backend("reference"):
        operands = [quantize_rows(random.normal(128, sizes.long).abs()) for _ in range(2)]
    (a, a_scale), (b, b_scale) = operands
    right = _double(a, a_scale) @ _double(b, b_scale).T
    got = fp8_gemm(a, a_scale, b, b_scale, torch.float32).double()
    worst = float(((got - right) / right).abs().max())
    if not worst <= PRODUCT_ERROR:
        raise Mismatch(f"expected sums of {sizes.long} terms within {PRODUCT_ERROR:g} (relative), got {worst:.3g}")


# ------------------------------------------------------------------ offsets beyond 2^31


def _needs(device: torch.device, size: int) -> None:
    """Raises `Skipped` unless `size` bytes, and half as many again, are free."""
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    if free < 1.5 * size:
        raise Skipped(f"it needs {1.5 * size / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free")


def large_quantization(device: torch.device, sizes: Sizes) -> None:
    """The last rows of a matrix of more than 2^31 elements, quantized each way, and back."""
    _needs(device, 8 * sizes.rows * sizes.width)
    x = Random(device, key="large").normal(sizes.rows, sizes.width)
    last = x[-128:]
    with use_backend("reference"):
        rows, transposed, blocks = quantize_rows(last), quantize_transposed(last), quantize_blocks(last)
        gated = swiglu_quantize(last)
        back = dequantize_blocks(*blocks)
    both = quantize_both(x)
    for name, found in (("quantize_rows", quantize_rows(x)), ("quantize_both", both[:2])):
        for got, right in zip(found, rows, strict=True):
            require_equal(got[-128:], right, f"last rows of {name}")
    for name, found in (("quantize_transposed", quantize_transposed(x)), ("quantize_both", both[2:])):
        for got, right in zip(found, transposed, strict=True):
            require_equal(got[:, -right.shape[1] :], right, f"last columns of {name}")
    del both, found, got
    found = quantize_blocks(x)
    for got, right in zip(found, blocks, strict=True):
        require_equal(got[-right.shape[0] :], right, "last rows of quantize_blocks")
    require_equal(dequantize_blocks(*found)[-128:], back, "last rows of dequantize_blocks")
    codes, scales = swiglu_quantize(x)
    require_close(wide(codes[-128:], scales[-128:]), wide(*gated), CODES_OFF, "last rows of swiglu_quantize")


def large_product(device: torch.device, sizes: Sizes) -> None:
    """The last rows of a product of more than 2^31 elements."""
    _needs(device, 2 * sizes.rows * sizes.width)
    random = Random(device, key="large product")
    a, a_scale = _integer_codes(random, sizes.rows, 128), _power_scales(random, sizes.rows, 1)
    b, b_scale = _integer_codes(random, sizes.width, 128), _power_scales(random, ceil_div(sizes.width), 1, grid=True)
    right = (_double(a[-128:], a_scale[-128:]) @ _double(b, b_scale).T).bfloat16()
    require_equal(fp8_gemm(a, a_scale, b, b_scale)[-128:], right, "last rows of fp8_gemm")


def large_experts(device: torch.device, sizes: Sizes) -> None:
    """The last expert of weights of more than 2^31 elements: FP8, bfloat16, and both weight gradients."""
    count, n, k = sizes.experts, sizes.expert, sizes.width
    _needs(device, 6 * count * n * k)
    random, rows = Random(device, key="large experts"), 128 * 2
    # All rows belong to the first and the last expert.
    ends = torch.full((count,), 128, device=device)
    ends[-1] = rows
    x, x_scale = _integer_codes(random, rows, k), _power_scales(random, rows, ceil_div(k))
    weight = torch.zeros(count, n, k, dtype=torch.float8_e4m3fn, device=device)
    weight[-1] = last = _integer_codes(random, n, k)
    w_scale = torch.ones(count, ceil_div(n), ceil_div(k), device=device)
    right = _double(x[128:], x_scale[128:]) @ last.double().T
    got = fp8_grouped_gemm(x, x_scale, weight, w_scale, ends, torch.float32)
    require_equal(got[128:], right.float(), "last expert of fp8_grouped_gemm")
    del weight
    narrow = torch.zeros(count, n, k, dtype=torch.bfloat16, device=device)
    narrow[-1] = last.bfloat16()
    narrow.requires_grad_()
    y = grouped_gemm(x.bfloat16(), narrow, ends)
    require_equal(y[128:].detach(), (x[128:].double() @ last.double().T).bfloat16(), "last expert of grouped_gemm")
    grad = random.integers(-2, 3, rows, n).to(torch.bfloat16)
    (got,) = torch.autograd.grad(y, narrow, grad)
    right = grad[128:].double().T @ x[128:].double()
    require_equal(got[-1], right.bfloat16(), "last expert of grouped_gemm's weight gradient")
    del y, narrow, got
    grad_t, x_t = grad.T.contiguous().to(torch.float8_e4m3fn), x.view(torch.uint8).T.contiguous().view(x.dtype)
    ones = [torch.ones(rows // 128, size, device=device).T for size in (n, k)]
    got = fp8_grouped_wgrad(grad_t, ones[0], x_t, ones[1], ends)
    require_equal(got[-1], right.float(), "last expert of fp8_grouped_wgrad")


def large_attention(device: torch.device, sizes: Sizes) -> None:
    """The last row of a cache of more than 2^31 elements, and the last token of queries as many."""
    config = scale(sizes.scale).config
    latent, width = config.kv_lora_rank, config.kv_lora_rank + config.qk_rope_head_dim
    tokens = sizes.rows * sizes.width // width // 2
    _needs(device, 2 * 2 * tokens * width + 4 * tokens * width)
    random = Random(device, key="large attention")
    states, q = random.normal(2, tokens, width), random.normal(2, 1, 16, width)
    spans = torch.tensor([[[0, 1]], [[tokens - 300, tokens]]], dtype=torch.int32, device=device)
    got = mla_decode(q, states, latent, width**-0.5, spans)[1:]
    with use_backend("reference"):
        right = mla_decode(q[1:], states[1:, -min(300, tokens) :], latent, width**-0.5)
    require_close(got, right, 4 * BF16_ROUNDING, "last row of mla_decode")


def captured_decoding(device: torch.device, sizes: Sizes) -> None:
    """A decoding step replayed as a CUDA graph (on a CPU, just called) gives the logits of one that is not."""
    config = DeepseekConfig.from_pretrained("tiny")
    model = DeepseekLM(config, device=device, dtype=torch.bfloat16).eval()
    ids = Random(device, key="captured").integers(0, config.vocab_size, 3, 40)
    with torch.no_grad():
        caches = [model.new_cache(3), model.new_cache(3)]
        for cache in caches:
            model(ids, cache=cache)
        static, captured = (StaticLatentCache(cache, 128) for cache in caches)
        graph = CompiledDecodeStep(model, captured) if device.type == "cuda" else None
        for turn in range(8):
            right = model(ids[:, turn : turn + 1], cache=static).logits[:, -1]
            got = graph(ids[:, turn]) if graph else model(ids[:, turn : turn + 1], cache=captured).logits[:, -1]
            # The same kernels; products may take other algorithms under capture, each rounding apart.
            require_close(got, right, 4 * BF16_ROUNDING, f"captured step {turn}")


def large_permutation(device: torch.device, sizes: Sizes) -> None:
    """The last rows of permuted tokens of more than 2^31 elements, and the last tokens on the way back."""
    _needs(device, 6 * sizes.tokens * sizes.topk * sizes.width)
    random = Random(device, key="large permutation")
    ids = random.normal(sizes.tokens, 4 * sizes.topk, dtype=torch.float32).topk(sizes.topk).indices
    order, inverse, _ = sort_by_expert(ids, 4 * sizes.topk)
    x = random.normal(sizes.tokens, sizes.width)
    y = permute(x, order, inverse)
    require_equal(y[-8:], x[order[-8:] // sizes.topk], "last rows of permute")
    weights = random.normal(sizes.tokens, sizes.topk, dtype=torch.float32).softmax(-1)
    right = (y[inverse[-8:]].float() * weights[-8:, :, None]).sum(1)
    require_close(unpermute(y, weights, order, inverse)[-8:], right, 2 * BF16_ROUNDING, "last tokens of unpermute")


_CHECKS: Mapping[str, Check] = {
    "integers: fp8_gemm": exact_products,
    "integers: grouped products": exact_grouped_products,
    "integers: grouped gradients": exact_grouped_gradients,
    "promotion: fp8_gemm": promotion,
    "decoding as a CUDA graph": captured_decoding,
}
_LARGE: dict[str, Check] = {
    "beyond 2^31: quantization": large_quantization,
    "beyond 2^31: fp8_gemm": large_product,
    "beyond 2^31: experts": large_experts,
    "beyond 2^31: permutation": large_permutation,
    "beyond 2^31: mla_decode": large_attention,
}
