"""Checks of operators on a GPU with more than 2^31 elements, where a 32-bit offset overflows."""

from __future__ import annotations

import torch

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

from ..operators.fp8_operands import BF16_ROUNDING, CODES_OFF, ceil_div, wide
from ..operators.operands import Random
from ..operators.scales import scale
from ..operators.verify import require_close, require_equal
from .exact_products import integer_codes, power_scales, wide_double
from .sizes import Sizes, Skipped

__all__ = [
    "large_attention",
    "large_experts",
    "large_permutation",
    "large_product",
    "large_quantization",
    "require_memory",
]


def require_memory(device: torch.device, size: int) -> None:
    """Raises `Skipped` unless 1.5 times `size` bytes are free."""
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    if free < 1.5 * size:
        raise Skipped(f"it needs {1.5 * size / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free")


def large_quantization(device: torch.device, sizes: Sizes) -> None:
    """Checks the last rows of a matrix that is quantized in each way, and dequantized."""
    require_memory(device, 8 * sizes.rows * sizes.width)
    x = Random(device, key="large").normal(sizes.rows, sizes.width)
    last = x[-128:]
    with use_backend("reference"):
        rows, transposed, blocks = quantize_rows(last), quantize_transposed(last), quantize_blocks(last)
        gated = swiglu_quantize(last)
        back = dequantize_blocks(*blocks)
    both = quantize_both(x)
    for name, results in (("quantize_rows", quantize_rows(x)), ("quantize_both", both[:2])):
        for got, right in zip(results, rows, strict=True):
            require_equal(got[-128:], right, f"last rows of {name}")
    for name, results in (("quantize_transposed", quantize_transposed(x)), ("quantize_both", both[2:])):
        for got, right in zip(results, transposed, strict=True):
            require_equal(got[:, -right.shape[1] :], right, f"last columns of {name}")
    del both, results, got
    results = quantize_blocks(x)
    for got, right in zip(results, blocks, strict=True):
        require_equal(got[-right.shape[0] :], right, "last rows of quantize_blocks")
    require_equal(dequantize_blocks(*results)[-128:], back, "last rows of dequantize_blocks")
    codes, scales = swiglu_quantize(x)
    require_close(wide(codes[-128:], scales[-128:]), wide(*gated), CODES_OFF, "last rows of swiglu_quantize")


def large_product(device: torch.device, sizes: Sizes) -> None:
    """Checks the last rows of a product."""
    require_memory(device, 2 * sizes.rows * sizes.width)
    random = Random(device, key="large product")
    a, a_scale = integer_codes(random, sizes.rows, 128), power_scales(random, sizes.rows, 1)
    b, b_scale = integer_codes(random, sizes.width, 128), power_scales(random, ceil_div(sizes.width), 1, grid=True)
    right = (wide_double(a[-128:], a_scale[-128:]) @ wide_double(b, b_scale).T).bfloat16()
    require_equal(fp8_gemm(a, a_scale, b, b_scale)[-128:], right, "last rows of fp8_gemm")


def large_experts(device: torch.device, sizes: Sizes) -> None:
    """Checks the last expert of stacked weights: products in FP8 and bfloat16, and both weight gradients."""
    count, n, k = sizes.experts, sizes.expert, sizes.width
    require_memory(device, 6 * count * n * k)
    random, rows = Random(device, key="large experts"), 128 * 2
    # All rows belong to the first expert and the last.
    ends = torch.full((count,), 128, device=device)
    ends[-1] = rows
    x, x_scale = integer_codes(random, rows, k), power_scales(random, rows, ceil_div(k))
    weight = torch.zeros(count, n, k, dtype=torch.float8_e4m3fn, device=device)
    weight[-1] = last = integer_codes(random, n, k)
    w_scale = torch.ones(count, ceil_div(n), ceil_div(k), device=device)
    right = wide_double(x[128:], x_scale[128:]) @ last.double().T
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
    """Checks the last row of a cache, and its last tokens."""
    config = scale(sizes.scale).config
    latent, width = config.kv_lora_rank, config.kv_lora_rank + config.qk_rope_head_dim
    tokens = sizes.rows * sizes.width // width // 2
    require_memory(device, 2 * 2 * tokens * width + 4 * tokens * width)
    random = Random(device, key="large attention")
    states, q = random.normal(2, tokens, width), random.normal(2, 1, 16, width)
    spans = torch.tensor([[[0, 1]], [[tokens - 300, tokens]]], dtype=torch.int32, device=device)
    got = mla_decode(q, states, latent, width**-0.5, spans)[1:]
    with use_backend("reference"):
        right = mla_decode(q[1:], states[1:, -min(300, tokens) :], latent, width**-0.5)
    require_close(got, right, 4 * BF16_ROUNDING, "last row of mla_decode")


def large_permutation(device: torch.device, sizes: Sizes) -> None:
    """Checks the last rows of permuted tokens, and the last tokens on the way back."""
    require_memory(device, 6 * sizes.tokens * sizes.topk * sizes.width)
    random = Random(device, key="large permutation")
    ids = random.normal(sizes.tokens, 4 * sizes.topk, dtype=torch.float32).topk(sizes.topk).indices
    order, inverse, _ = sort_by_expert(ids, 4 * sizes.topk)
    x = random.normal(sizes.tokens, sizes.width)
    y = permute(x, order, inverse)
    require_equal(y[-8:], x[order[-8:] // sizes.topk], "last rows of permute")
    weights = random.normal(sizes.tokens, sizes.topk, dtype=torch.float32).softmax(-1)
    right = (y[inverse[-8:]].float() * weights[-8:, :, None]).sum(1)
    require_close(unpermute(y, weights, order, inverse)[-8:], right, 2 * BF16_ROUNDING, "last tokens of unpermute")
