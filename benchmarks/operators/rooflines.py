"""Measured ceilings of the machine, and the least time that they allow.

No implementation of an operator is faster than its bytes at the speed of a copy, or its products at the speed of a
large matrix product. Both speeds are measured in the session that uses them: clocks and power differ from day to day.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..core.timing import time_calls

__all__ = ["Ceilings", "measure_ceilings"]

_WIDER = ("fp8", "bf16", "fp32")


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second of a copy (read and written), FLOP/s of each matrix product, and reasons for missing ones."""

    copy: float
    products: Mapping[str, float]
    absent: Mapping[str, str] = field(default_factory=dict)

    def product(self, kind: str) -> float:
        """Returns the FLOP/s that bound products of `kind`: the fastest of that dtype and the wider ones.

        A CPU without bfloat16 products multiplies bfloat16 in float32.
        """
        enough = _WIDER[_WIDER.index(kind) :]
        return max((speed for name, speed in self.products.items() if name in enough), default=math.inf)

    def floor(self, flops: float, moved: float, kind: str) -> float:
        """Returns the least seconds that the ceilings allow."""
        return max(moved / self.copy, flops / self.product(kind))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Ceilings:
        return cls(**data)

    def __str__(self) -> str:
        products = ", ".join(f"{kind} product {speed / 1e12:.4g} TFLOP/s" for kind, speed in self.products.items())
        missing = "".join(f"; no {kind} product: {why}" for kind, why in self.absent.items())
        return f"measured ceilings: copy {self.copy / 1e9:.4g} GB/s, {products}{missing}"


def measure_ceilings(device: torch.device, *, size: int = 0, copied: int = 0, rounds: int = 10) -> Ceilings:
    """Times a copy and square products of random matrices.

    Args:
        size: rows and columns of the matrices (default: 8192 on a GPU, 1024 elsewhere).
        copied: bytes to copy (default: 2 GiB on a GPU, 256 MiB elsewhere).
    """
    gpu = device.type == "cuda"
    size, copied = size or (8192 if gpu else 1024), copied or (2**31 if gpu else 2**28)
    source = torch.randint(0, 256, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _time(target.copy_, (source,), device, rounds)
    del source, target
    products: dict[str, float] = {}
    absent: dict[str, str] = {}
    for kind, make in (_GPU_PRODUCTS if gpu else _CPU_PRODUCTS).items():
        try:
            call, operands = make(size, device)
            products[kind] = 2 * size**3 / _time(call, operands, device, rounds)
        except (RuntimeError, AttributeError, NotImplementedError) as error:  # an older GPU, another build of torch
            absent[kind] = str(error).strip().partition("\n")[0]
    return Ceilings(2 * copied / seconds, products, absent)


def _time(call: Callable[..., Any], operands: tuple[Any, ...], device: torch.device, rounds: int) -> float:
    return time_calls({"it": call}, [operands], device, rounds=rounds, budget_s=5)["it"].samples.median


def _plain(dtype: torch.dtype):
    def make(size: int, device: torch.device):
        return torch.mm, tuple(torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    return make


def _fp8(size: int, device: torch.device):
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)

    def call(a, b):
        return torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return call, (a, b)


_GPU_PRODUCTS = {"bf16": _plain(torch.bfloat16), "fp8": _fp8}
_CPU_PRODUCTS = {"fp32": _plain(torch.float32), "bf16": _plain(torch.bfloat16)}
