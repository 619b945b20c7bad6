"""FP8 products in every configuration of the kernels, on integers, which need no rounding; and which one is chosen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek_kernels import fp8_gemm, use_backend
from deepseek_kernels.gemm.fp8_gemm import configs
from deepseek_kernels.gemm.fp8_gemm.configs import FEW, PLAIN, PLAIN_ROWS, SPECIALIZED, product_config
from deepseek_kernels.testing.interpreter import interprets
from deepseek_kernels.testing.numeric import assert_bitwise
from support.fp8_products import (
    assert_product,
    dequantized,
    exact,
    integer_codes,
    integer_operands,
    on,
    random_operands,
)

# Every configuration there is, with the kind of scales of b that it is for, in one part and split.
CONFIGS = {
    "specialized, blocks": (SPECIALIZED, 1, False),
    "specialized, rows": (SPECIALIZED, 1, True),
    "plain, blocks": (PLAIN, 1, False),
    "plain, blocks, split": (PLAIN, 2, False),
    "plain, rows": (PLAIN_ROWS, 1, True),
    "plain, rows, split": (PLAIN_ROWS, 4, True),
    **{f"{config.columns} tokens": (config, 1, False) for config in FEW},
    "16 tokens, split": (FEW[0], 4, False),
}
few_examples = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


def ragged(config: configs.Config) -> tuple[int, int, int]:
    """Two tiles down and across, four groups, the last of each partial, and nothing a multiple of anything."""
    return (config.columns if config.swapped else config.rows) + 3, 149, 389


def force(monkeypatch: pytest.MonkeyPatch, config: configs.Config, splits: int) -> None:
    from deepseek_kernels.gemm.fp8_gemm import launch

    if config.specialized and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("specialized kernels need Hopper")
    monkeypatch.setattr(launch, "product_config", lambda *sizes: (config, splits))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_is_exact_on_integers(triton_backend, monkeypatch, device, name):
    config, splits, by_rows = CONFIGS[name]
    force(monkeypatch, config, splits)
    operands = integer_operands(*ragged(config), by_rows)
    with use_backend("triton"):
        got = fp8_gemm(*on(device, operands), torch.float32)
        assert torch.equal(got.cpu().double(), exact(*operands))
        for dtype in (torch.bfloat16, torch.float16):
            assert_bitwise(fp8_gemm(*on(device, operands), dtype), got.to(dtype))


@given(
    name=st.sampled_from(list(CONFIGS)), m=st.integers(1, 140), n=st.integers(1, 270), k=st.integers(1, 400), seed=...
)
@few_examples
def test_any_size_in_any_configuration(triton_backend, device, name: str, m: int, n: int, k: int, seed: int):
    torch.manual_seed(seed % 2**32)
    config, splits, by_rows = CONFIGS[name]
    operands = random_operands(m, n, k, by_rows)
    with pytest.MonkeyPatch.context() as monkeypatch, use_backend("triton"):
        force(monkeypatch, config, splits)
        got = fp8_gemm(*on(device, operands), torch.float32)
    assert_product(got, dequantized(*operands[:2]), dequantized(*operands[2:]))


@pytest.mark.parametrize(
    ("m", "n", "k", "by_rows"),
    [
        (1, 72, 896, False),  # V3's kv_a_proj by an eighth, one token: few tiles, so its sum is split
        (40, 192, 256, False),
        (65, 192, 256, False),
        (192, 256, 200, True),
    ],
)
def test_the_configuration_chosen_by_itself(triton_backend, device, m, n, k, by_rows):
    operands = integer_operands(m, n, k, by_rows)
    with use_backend("triton"):
        got = fp8_gemm(*on(device, operands), torch.float32)
    assert torch.equal(got.cpu().double(), exact(*operands))


def truncated(x: np.ndarray) -> np.ndarray:
    """float32 cut to 14 significant bits, as Hopper's FP8 units keep sums."""
    return (x.view(np.int32) & ~((1 << 10) - 1)).view(np.float32)


@pytest.fixture
def imprecise_units(monkeypatch) -> None:
    """Interpreted products of FP8 add to an accumulator of 14 bits; real ones do that by themselves."""
    if not interprets():
        return
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def imprecise(self, *arguments):
        result = plain(self, *arguments)
        return interpreter.TensorHandle(truncated(result.data.astype(np.float32)), result.dtype)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", imprecise)


@pytest.mark.parametrize("name", CONFIGS)
def test_sums_are_promoted_every_128_terms(triton_backend, imprecise_units, monkeypatch, device, name):
    """Positive terms: sums of 128 need 12 bits, sums of all 15 (TRAPS E8)."""
    config, splits, by_rows = CONFIGS[name]
    force(monkeypatch, config, splits)
    a, a_scale, b, b_scale = integer_operands(2, 3, 4000, by_rows, low=1)
    operands = a, torch.ones_like(a_scale), b, torch.ones_like(b_scale)
    assert (exact(*operands) > 2**14).all() and (exact(*operands) % 2 == 1).any()
    with use_backend("triton"):
        got = fp8_gemm(*on(device, operands), torch.float32)
    assert torch.equal(got.cpu().double(), exact(*operands))


@pytest.mark.skipif(not interprets(), reason="shows that the emulation of imprecise units sees what it has to")
def test_sums_that_are_not_promoted_would_be_seen(triton_backend, imprecise_units):
    import triton
    import triton.language as tl

    @triton.jit
    def unpromoted(a, b, out, depth, SIZE: tl.constexpr, GROUP: tl.constexpr):
        row, k, total = tl.arange(0, SIZE), tl.arange(0, GROUP), tl.zeros((SIZE, SIZE), tl.float32)
        for start in range(0, depth, GROUP):
            left = tl.load(a + row[:, None] * depth + start + k[None, :])
            right = tl.load(b + row[:, None] * depth + start + k[None, :])
            total = tl.dot(left, right.T, total)
        tl.store(out + row[:, None] * SIZE + row[None, :], total)

    a, b, out = (torch.randint(1, 5, (16, 4096)).to(torch.float8_e4m3fn) for _ in "ab"), None, torch.empty(16, 16)
    a, b = a
    unpromoted[(1,)](a, b, out, 4096, SIZE=16, GROUP=128)
    assert not torch.equal(out, a.float() @ b.float().T)


def test_rows_beyond_two_gigabytes(triton_backend, monkeypatch, device):
    """Offsets are 64-bit. Only the pages that are touched exist."""
    stride, rows = 1 << 26, 40
    memory = torch.from_numpy(np.zeros(stride * (rows - 1) + 256, dtype=np.uint8)).to(device)
    far = memory.as_strided((rows, 256), (stride, 1))
    codes = integer_codes(rows, 256).to(device)
    far.copy_(codes.view(torch.uint8))
    far, one = far.view(torch.float8_e4m3fn), torch.ones(rows, 2, device=device)
    force(monkeypatch, PLAIN_ROWS, 1)
    with use_backend("triton"):
        assert_bitwise(fp8_gemm(far, one, far, one), fp8_gemm(codes, one, codes, one))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_repeats_are_bitwise(triton_backend, monkeypatch, device, name):
    """Partial sums are added in one order, and scales that are loaded ahead are there in time."""
    config, splits, by_rows = CONFIGS[name]
    force(monkeypatch, config, splits)
    operands = on(device, random_operands(20, 130, 520, by_rows))
    with use_backend("triton"):
        first = fp8_gemm(*operands)
        for _ in range(20):
            assert_bitwise(fp8_gemm(*operands), first)


# Which configuration runs.

H200 = 132  # processors


@pytest.mark.parametrize(
    ("m", "n", "k", "by_rows", "config", "splits"),
    [
        (4096, 7168, 16384, False, SPECIALIZED, 1),  # a prompt's and training's products
        (4096, 4096, 7168, False, SPECIALIZED, 1),
        (18432, 7168, 8192, True, SPECIALIZED, 1),
        (64, 7168, 16384, False, FEW[2], 8),  # decoding
        (1, 7168, 2048, False, FEW[0], 8),
        (17, 24576, 1536, False, FEW[1], 2),
        (1, 576, 7168, False, FEW[0], 16),  # V3's kv_a_proj: five tiles of the weight
        (4096, 576, 7168, False, PLAIN, 1),  # 160 tiles of 128 x 128 would be a round and a fifth
        (128, 2048, 7168, False, PLAIN, 8),
        (64, 7168, 16384, True, PLAIN_ROWS, 4),
        (1, 1, 1, False, FEW[0], 1),
    ],
)
def test_configuration_of_published_shapes(m, n, k, by_rows, config, splits):
    assert product_config(m, n, k, by_rows, True, H200) == (config, splits)


def test_only_hopper_gets_specialized_kernels():
    assert product_config(4096, 4096, 7168, False, False, H200) == (PLAIN, 1)
    assert product_config(4096, 4096, 7168, True, False, H200) == (PLAIN_ROWS, 1)


@given(st.integers(1, 10**5), st.integers(1, 10**5), st.integers(1, 10**5), st.booleans(), st.integers(1, 200))
@settings(max_examples=200)
def test_every_choice_can_be_launched(m, n, k, by_rows, processors):
    config, splits = product_config(m, n, k, by_rows, True, processors)
    assert not (by_rows and config.swapped) and (m <= 64 or not config.swapped)
    assert splits in configs.SPLITS and (splits == 1 or splits * 2 * 128 <= k)
    assert splits == 1 or not config.specialized
    # Descriptors of one box, blocks of scales that hold the tile, rows for both consumers.
    assert 128 % config.rows == 0 and 128 % config.columns == 0
    assert not config.specialized or config.rows == 128


def test_the_gate_compiles_every_configuration(triton_backend):
    from deepseek_kernels.gemm.fp8_gemm.compile_cases import compile_cases

    cases = [case for case in compile_cases() if "TILE" in case.constants]
    found = {(*case.constants["TILE"], case.kernel.__name__) for case in cases}
    for config in (SPECIALIZED, PLAIN, *FEW):
        name = "specialized_kernel" if config.specialized else "plain_kernel"
        assert (config.rows, config.columns, name) in found
