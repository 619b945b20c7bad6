"""Norm, rotation and storing at once: against float64, and bit by bit against the operators one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepseek_kernels import BackendError, use_backend
from deepseek_kernels.attention.latent_write import latent_write, latent_write_paged
from deepseek_kernels.attention.packed_latents import pack, packed_bytes, unpack
from deepseek_kernels.norm.rms_norm import rms_norm
from deepseek_kernels.testing.numeric import assert_bitwise

# numpy's, in the interpreter
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning", "ignore:All-NaN slice")

EPS = 1e-6
FP8 = torch.uint8
SIZES = [(4, 2), (12, 6), (132, 8), (512, 64)]  # of latents and keys; the third ends in a partial group
DTYPES = [  # of kv, of the weight, and of the cache
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, FP8),
    (torch.bfloat16, torch.float32, torch.bfloat16),  # the norm is float32, and rounded to kv's dtype
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.float32, torch.float32, FP8),
    (torch.float16, torch.bfloat16, torch.float32),
]


@pytest.fixture(params=["reference", "triton", "cpu"])
def backend(request):
    if request.param != "reference":
        request.getfixturevalue(f"{request.param}_backend")
    with use_backend(request.param):
        yield request.param


def operands(batch: int, tokens: int, latent: int, rotated: int, device, dtype=torch.bfloat16, weight=torch.bfloat16):
    """kv, weight, eps, cosines and sines."""
    kv = torch.randn(batch, tokens, latent + rotated) * 2.0 ** torch.randint(-6, 6, (batch, tokens, 1))
    angles = 100 * torch.rand(batch, tokens, rotated // 2)
    moved = kv.to(dtype), (0.5 + torch.rand(latent)).to(weight), angles.cos(), angles.sin()
    kv, weight, cos, sin = (t.to(device) for t in moved)
    return kv, weight, EPS, cos, sin


def new_cache(first: int, second: int, latent: int, rotated: int, dtype: torch.dtype, device) -> Tensor:
    """Memory that held something else before."""
    if dtype == FP8:
        return torch.randint(0, 256, (first, second, packed_bytes(latent, rotated)), dtype=FP8, device=device)
    return torch.randn(first, second, latent + rotated, device=device).to(dtype)


def rotate(key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = key.float()[..., 0::2], key.float()[..., 1::2]
    out = torch.empty_like(key)
    out[..., 0::2], out[..., 1::2] = even * cos - odd * sin, even * sin + odd * cos
    return out


def stored(kv: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """Each token as a cache is to hold it, by the operators of the backend in force, one after the other."""
    latent, key = kv[..., : len(weight)], kv[..., len(weight) :]
    states = torch.cat((rms_norm(latent, weight, eps).to(kv.dtype), rotate(key, cos, sin)), -1)
    return pack(states, len(weight)) if dtype == FP8 else states.to(dtype)


def scattered(cache: Tensor, slots: list[list[int]], values: Tensor, page: int | None = None) -> Tensor:
    """A copy of the cache with each token where it belongs, by a plain loop."""
    cache = cache.clone()
    for row, row_slots in enumerate(slots):
        for token, slot in enumerate(row_slots):
            first, second = (row, slot) if page is None else divmod(slot, page)
            if slot >= 0 and first < cache.shape[0] and second < cache.shape[1]:
                cache[first, second] = values[row, token]
    return cache


@pytest.mark.parametrize(("latent", "rotated"), SIZES)
@pytest.mark.parametrize(("dtype", "weight_dtype", "cache_dtype"), DTYPES)
def test_bitwise_what_the_operators_give_one_by_one(backend, device, latent, rotated, dtype, weight_dtype, cache_dtype):
    arguments = operands(2, 3, latent, rotated, device, dtype, weight_dtype)
    cache = new_cache(2, 7, latent, rotated, cache_dtype, device)
    slots = [[4, 0, 6], [1, 2, 3]]
    expected = scattered(cache, slots, stored(*arguments, cache_dtype))
    assert latent_write(*arguments, cache, torch.tensor(slots, device=device)) is None
    assert_bitwise(cache, expected)


def test_against_float64(backend, device):
    """A loop over tokens and pairs. Each number passes through a rounding to bfloat16 at most three times (the norm,
    its product with the weight, FP8's scales are made of those), and float32 is a thousand times finer."""
    kv, weight, eps, cos, sin = operands(2, 3, 132, 8, device)
    exact = torch.empty(kv.shape, dtype=torch.float64)
    size = torch.empty_like(exact)  # of what is added up: a difference may be small
    for row in range(2):
        for token in range(3):
            latent, key = kv[row, token].double().cpu().split([132, 8])
            mean = sum(float(value) ** 2 for value in latent) / 132
            exact[row, token, :132] = weight.double().cpu() * latent / (mean + eps) ** 0.5
            for pair in range(4):
                c, s = float(cos[row, token, pair]), float(sin[row, token, pair])
                even, odd = float(key[2 * pair]), float(key[2 * pair + 1])
                exact[row, token, 132 + 2 * pair] = even * c - odd * s
                exact[row, token, 133 + 2 * pair] = even * s + odd * c
                size[row, token, 132 + 2 * pair] = abs(even * c) + abs(odd * s)
                size[row, token, 133 + 2 * pair] = abs(even * s) + abs(odd * c)
    size[..., :132] = exact[..., :132].abs()
    slots, rounding = torch.tensor([[4, 0, 6], [1, 2, 3]], device=device), 2.0**-8
    cache = new_cache(2, 7, 132, 8, torch.bfloat16, device)
    latent_write(kv, weight, eps, cos, sin, cache, slots)
    got = torch.stack([cache[row, slots[row]] for row in range(2)]).cpu()
    error = (got - exact).abs()
    assert (error[..., :132] <= 2.01 * rounding * size[..., :132]).all()
    assert (error[..., 132:] <= rounding * exact[..., 132:].abs() + 4 * 2.0**-24 * size[..., 132:]).all()
    # In FP8 the key is the same, and the latent within what `packing` says.
    packed = new_cache(2, 7, 132, 8, FP8, device)
    latent_write(kv, weight, eps, cos, sin, packed, slots)
    latents, keys = unpack(torch.stack([packed[row, slots[row]] for row in range(2)]), 132, torch.float32)
    assert_bitwise(keys.bfloat16().cpu(), got[..., 132:].contiguous())
    scale = got[..., :132].float().abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448  # of the larger group, at most
    written = got[..., :132].float()
    assert ((latents.cpu() - written).abs() <= torch.maximum(written.abs() / 16, scale / 1024) * (1 + 2.0**-20)).all()


SLOTS = {
    "some not stored": [[-1, 0, 5], [2, -1, -7]],
    "none stored": [[-1, -1, -1], [-2, -3, -1]],
    "beyond the capacity": [[4, 5, 6], [5, 2**31, 2**40]],
    "the last ones": [[5, 4, 3], [3, 4, 5]],
}


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("name", SLOTS)
def test_slots_outside_of_the_cache_are_not_stored(backend, device, name, cache_dtype):
    arguments = operands(2, 3, 12, 6, device)
    cache = new_cache(2, 6, 12, 6, cache_dtype, device)
    expected = scattered(cache, SLOTS[name], stored(*arguments, cache_dtype))
    latent_write(*arguments, cache, torch.tensor(SLOTS[name], device=device))
    assert_bitwise(cache, expected)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
def test_pages(backend, device, cache_dtype):
    """Slots of any row in any page; those of no page are not stored."""
    arguments = operands(2, 3, 132, 8, device)
    pages = new_cache(5, 4, 132, 8, cache_dtype, device)
    slots = [[17, 3, 4], [-1, 19, 20]]
    expected = scattered(pages, slots, stored(*arguments, cache_dtype), page=4)
    latent_write_paged(*arguments, pages, torch.tensor(slots, device=device))
    assert_bitwise(pages, expected)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("enough", [0, 1000], ids=["many tokens to a program", "one token to a program"])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
def test_either_tile(triton_backend, device, monkeypatch, cache_dtype, enough, tokens):
    from deepseek_kernels.attention.latent_write import configs

    monkeypatch.setattr(configs, "ENOUGH_PROGRAMS", enough)
    arguments = operands(2, tokens, 132, 8, device)
    cache = new_cache(2, 10, 132, 8, cache_dtype, device)
    slots = torch.stack([torch.randperm(10)[:tokens] for _ in range(2)])
    with use_backend("triton"):
        expected = scattered(cache, slots.tolist(), stored(*arguments, cache_dtype))
        latent_write(*arguments, cache, slots.to(device))
    assert_bitwise(cache, expected)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
def test_one_table_and_one_row_of_slots_for_all(backend, device, cache_dtype):
    kv, weight, eps, cos, sin = operands(3, 2, 12, 6, device)
    slots = torch.tensor([[5, 2]], device=device)
    cache = new_cache(3, 6, 12, 6, cache_dtype, device)
    expected = cache.clone()
    latent_write(kv, weight, eps, cos[[0, 0, 0]], sin[[0, 0, 0]], expected, slots[[0, 0, 0]])
    latent_write(kv, weight, eps, cos[:1], sin[:1], cache, slots)
    assert_bitwise(cache, expected)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
def test_other_layouts_give_the_same(backend, device, cache_dtype):
    """kv as a part of wider rows, tokens first, with columns apart; a cache that is a part of a larger one."""
    kv, weight, eps, cos, sin = operands(2, 3, 12, 6, device)
    slots = torch.tensor([[4, 0, -1], [1, 2, 3]], device=device)
    large = new_cache(2, 9, 12, 6, cache_dtype, device)
    expected = large.clone()
    latent_write(kv, weight, eps, cos, sin, expected, slots)
    for moved in (
        torch.cat((kv, kv), -1)[..., :18],
        kv.transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack((kv, kv), -1)[..., 0],
    ):
        apart = [torch.stack((t, t), -1)[..., 0] for t in (cos, sin, slots)]
        cache = large.clone()
        latent_write(moved, torch.stack((weight, weight), -1)[:, 0], eps, *apart[:2], cache[:, :5], apart[2])
        assert_bitwise(cache, expected)


@pytest.mark.parametrize(("batch", "tokens", "capacity"), [(0, 2, 3), (2, 0, 3), (2, 2, 0)])
def test_nothing_to_store_or_nowhere(backend, device, batch, tokens, capacity):
    arguments = operands(batch, tokens, 12, 6, device)
    cache = new_cache(batch, capacity, 12, 6, torch.bfloat16, device)
    before = cache.clone()
    latent_write(*arguments, cache, torch.zeros(batch, tokens, dtype=torch.int64, device=device))
    latent_write_paged(*arguments, cache, torch.zeros(batch, tokens, dtype=torch.int64, device=device))
    assert_bitwise(cache, before)


def test_what_is_not_finite_stays_in_its_token(backend, device):
    kv, *rest = operands(1, 3, 132, 8, device)
    kv[0, 0, 3], kv[0, 1, 135] = float("nan"), float("inf")
    for cache_dtype in (torch.bfloat16, FP8):
        cache = new_cache(1, 3, 132, 8, cache_dtype, device)
        latent_write(kv, *rest, cache, torch.arange(3, device=device)[None])
        latents, keys = unpack(cache, 132, torch.float32) if cache_dtype == FP8 else cache.float().split([132, 8], -1)
        assert latents.isnan().any(-1).tolist() == [[True, False, False]]
        assert keys.isfinite().all(-1).tolist() == [[True, False, True]]


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8])
def test_compiled_gives_the_same(backend, device, cache_dtype):
    torch.compiler.reset()
    kv, *rest = operands(2, 3, 12, 6, device)
    slots = torch.tensor([[4, -1, 5], [1, 2, 99]], device=device)

    def step(kv: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
        latent_write(kv * 2, *rest, cache, slots)
        latent_write_paged(kv, *rest, cache, slots + 6)
        return cache.float().sum(-1)

    caches = [new_cache(2, 6, 12, 6, cache_dtype, device)]
    caches.append(caches[0].clone())
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_bitwise(compiled(kv, caches[0], slots), step(kv, caches[1], slots))
    assert_bitwise(*caches)


def test_the_custom_operator_is_registered_properly(triton_backend, device):
    from deepseek_kernels.attention.latent_write import launch

    slots = torch.tensor([[4, 0, 6], [1, 2, 3]], device=device)
    for cache_dtype in (torch.bfloat16, FP8):
        cache = new_cache(2, 7, 12, 6, cache_dtype, device)
        arguments = (*operands(2, 3, 12, 6, device), cache, slots, False)
        torch.library.opcheck(launch.write, arguments, test_utils=("test_schema", "test_faketensor"))


# What users do wrong, and what kernels do not take.


def test_a_gradient_is_refused(backend, device):
    kv, weight, *rest = operands(1, 2, 12, 6, device)
    cache, slots = new_cache(1, 2, 12, 6, torch.bfloat16, device), torch.tensor([[0, 1]], device=device)
    for leaves in ((kv.clone().requires_grad_(), weight), (kv, weight.clone().requires_grad_())):
        with pytest.raises(ValueError, match=r"no gradient through a cache .* got kv or weight that require one"):
            latent_write(*leaves, *rest, cache, slots)
        with torch.no_grad():
            latent_write(*leaves, *rest, cache, slots)
    assert not cache.requires_grad


def test_kernels_say_what_they_do_not_take(triton_backend, device):
    slots = torch.tensor([[0, 1]], device=device)

    def attempt(latent: int, cache: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
        arguments = operands(1, 2, latent, 6, device, dtype)
        with use_backend("triton"):
            latent_write(*arguments, cache, slots)

    def cache(latent: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return new_cache(1, 2, latent, 6, dtype, device)

    with pytest.raises(BackendError, match=r"kv is bfloat16, float16 or float32, got torch.float64"):
        attempt(12, cache(12), torch.float64)
    with pytest.raises(BackendError, match=r"cache is bfloat16, float16 or float32, got torch.float64"):
        attempt(12, cache(12, torch.float64))
    with pytest.raises(BackendError, match=r"4096 features at most and its keys 1024, got 4097, 6"):
        attempt(4097, cache(4097))
    with pytest.raises(BackendError, match=r"in one piece, got a cache with strides \(36, 1, 2\)"):
        attempt(12, cache(12).transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(BackendError, match=r"a multiple of 4 bytes, got 13 in strides"):
        attempt(13, cache(13, FP8))
    arguments, apart = operands(1, 2, 12, 6, device), cache(12).transpose(1, 2).contiguous().transpose(1, 2)
    with use_backend("auto"):  # the reference takes them
        latent_write(*arguments, apart, slots)
    with use_backend("reference"):
        assert_bitwise(apart.contiguous(), stored(*arguments, torch.bfloat16))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kv": lambda t: t[0]}, r"kv \[B, T, C \+ R\] and weight \[C\], R even, got \[3, 18\], \[12\]"),
        ({"kv": lambda t: t[..., 1:]}, r"got \[2, 3, 17\], \[12\]"),
        ({"weight": lambda t: torch.cat((t, t))}, r"got \[2, 3, 18\], \[24\]"),
        ({"kv": lambda t: t.int()}, r"kv in a floating dtype, got torch.int32"),
        ({"cos": lambda t: t.double()}, r"cos torch.float32 \[2 or 1, 3, 3\], got torch.float64 \[2, 3, 3\]"),
        ({"sin": lambda t: t[:, :2]}, r"sin torch.float32 \[2 or 1, 3, 3\], got torch.float32 \[2, 2, 3\]"),
        ({"slots": lambda t: t.int()}, r"slots torch.int64 \[2 or 1, 3\], got torch.int32 \[2, 3\]"),
        ({"slots": lambda t: t[:, 1:]}, r"slots torch.int64 \[2 or 1, 3\], got torch.int64 \[2, 2\]"),
        ({"buffer": lambda t: t[..., 1:]}, r"\[.., .., 18\] in a floating dtype or uint8 \[.., .., 28\], got .* 17\]"),
        ({"buffer": lambda t: t.to(FP8)}, r"uint8 \[.., .., 28\], got torch.uint8 \[2, 7, 18\]"),
        ({"buffer": lambda t: t.int()}, r"got torch.int32 \[2, 7, 18\]"),
        ({"buffer": lambda t: t[:1]}, r"a buffer for 2 rows, as kv has, got \[1, 7, 18\]"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    kv, weight, eps, cos, sin = operands(2, 3, 12, 6, torch.device("cpu"))
    arguments = {"kv": kv, "weight": weight, "eps": eps, "cos": cos, "sin": sin, "buffer": torch.zeros(2, 7, 18)}
    arguments["slots"] = torch.zeros(2, 3, dtype=torch.int64)
    for name, change in changed.items():
        arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        latent_write(**arguments)
