"""FP8 quantization by its definition, in Python's floats, and inputs that expose mistakes."""

from __future__ import annotations

import bisect
import itertools
import math
import struct

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from deepseek_kernels import use_backend
from deepseek_kernels.testing.numeric import assert_bitwise

FORMATS = [None, "ue8m0"]
# The fixtures, which `given` does not renew for each example, hold no state.
few_examples = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])

E4M3 = [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]


def float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def encode(value: float) -> int:
    """Returns the e4m3 byte nearest to a number, ties to the even byte."""
    if math.isnan(value):
        return 0x7F
    sign, value = (0x80 if math.copysign(1, value) < 0 else 0), abs(value)
    above = min(bisect.bisect_left(E4M3, value), len(E4M3) - 1)
    near = [code for code in (above - 1, above) if code >= 0]
    return sign | min(near, key=lambda code: (abs(E4M3[code] - value), code & 1))


def quantize_group(values: list[float], floor: float, power_of_two: bool) -> tuple[list[int], float]:
    amax = max([abs(v) for v in values if not math.isnan(v)] + [float32(floor)])
    if math.isinf(amax):
        return [0x7F] * len(values), math.inf
    scale = float32(amax / 448)  # one rounding: a float64 quotient of two float32 numbers is precise enough
    if power_of_two:
        mantissa, exponent = math.frexp(scale)
        scale = 2.0 ** (exponent - (mantissa == 0.5))
    return [encode(float32(v / scale)) for v in values], scale


def plain_loop(x: Tensor, block: tuple[int, int], floor: float, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Returns the bytes and scales of a matrix, block by block."""
    rows, columns = x.shape
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    scales = torch.zeros(-(-rows // block[0]), -(-columns // block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            down, across = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            part = x[down, across].float()
            group, scale = quantize_group(part.flatten().tolist(), floor, power_of_two)
            codes[down, across] = torch.tensor(group, dtype=torch.uint8).view_as(part)
            scales[i, j] = scale
    return codes.view(torch.float8_e4m3fn), scales


# Groups that expose mistakes, one row each: their first values.
HOSTILE = {
    "zeros": [0.0, -0.0],  # TRAPS E4
    "below the floor": [1e-7, -2e-6, 1e-30],
    "subnormal": [1e-45, -1e-40, 1.1754944e-38],
    "largest": [3.4028235e38, -3.4028235e38, 1.0, 1e36],
    "nan": [math.nan, 1.0, -2.0, 448.0],
    "only nan": [math.nan] * 128,
    "infinity": [math.inf, 1.0, -2.0, 0.0],
    "both infinities and nan": [-math.inf, math.inf, math.nan, 3.0],
    "power of two": [448.0, 1.0, 2.0**-9, 2.0**-10, 3 * 2.0**-11, -(2.0**-10)],  # scale 1; the least codes and ties
    "ties": [448.0, 17.0, 19.0, 432.0, 416.0, -17.0, 31.76, -124.3],
    "just above a power of two": [448.0001, 447.9999, 1.0],  # ue8m0 rounds the scale up, not to nearest
}


def hostile(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.zeros(len(HOSTILE), 128)
    for row, values in enumerate(HOSTILE.values()):
        x[row, : len(values)] = torch.tensor(values)
    return x.to(dtype)


def near_ties() -> Tensor:
    """Returns groups whose quotients are within a few ulps of a change of code: only a true division is right."""
    amax = torch.rand(64) * 1000 + 1
    scale = amax / 448
    middles = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(E4M3)])  # [126]
    x = middles * scale[:, None]
    steps = torch.randint(-2, 3, x.shape, dtype=torch.int32)
    x = (x.view(torch.int32) + steps).view(torch.float32) * torch.where(torch.rand(x.shape) < 0.5, -1.0, 1.0)
    return torch.cat([amax[:, None], x, amax[:, None]], 1)  # [64, 128]


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns columns of very different size, as in activations with outliers."""
    return (torch.randn(rows, columns) * 2.0 ** torch.randint(-12, 8, (columns,))).to(dtype)


INPUTS = {
    "hostile": hostile,
    "hostile in bfloat16": lambda: hostile(torch.bfloat16),
    "near ties": near_ties,
    # Below the floor of activations, just above that of weights, where float32 itself runs out of bits.
    "tiny near ties": lambda: near_ties() * 2.0**-124,
    "usual": lambda: matrix(3, 300),
}


def on_triton(function, *arguments):
    with use_backend("triton"):
        return function(*arguments)


def on_reference(function, *arguments):
    with use_backend("reference"):
        return function(*arguments)


def assert_all_bitwise(got, expected) -> None:
    for a, b in zip(got, expected, strict=True):
        assert_bitwise(a, b)
