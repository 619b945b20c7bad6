"""Tiles of the attention kernels, and the operands they take: static rules, which need neither Triton nor a GPU.

The compile gate shows registers, spills and shared memory of every configuration here. Choices between clean ones are
from arithmetic, not measured: no GPU was at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...common.masks import is_spans

__all__ = [
    "DELTA_ROWS",
    "EXACT",
    "FORWARD",
    "KEYS",
    "L2_BYTES",
    "PARTIAL_BYTES",
    "QUERIES",
    "RANGE_ROWS",
    "SPECIALIZED",
    "Config",
    "block",
    "obstacle",
    "pick",
    "specializes",
]

_HALF = (torch.bfloat16, torch.float16)
_WIDEST = {"P": 128, "R": 64, "V": 128}

# Keys and values that are used at one time: they stay in the L2 cache, 50 MB on a Hopper.
L2_BYTES = 32 << 20
# Bytes of the shared key's gradients, one for each head in float32, which are then added up: they bound the number of
# heads that are computed at a time.
PARTIAL_BYTES = 128 << 20
DELTA_ROWS, RANGE_ROWS = 64, 1024  # of one program


@dataclass(frozen=True)
class Config:
    """A tile of `rows` queries against `columns` keys."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int

    @property
    def tile(self) -> tuple[int, int]:
        """The kernels' constant TILE."""
        return self.rows, self.columns

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of a launch."""
        return {"TILE": self.tile, "num_warps": self.num_warps, "num_stages": self.num_stages}


# Of 16-bit floats, for each family of GPUs. Each warp group of a Hopper has 64 queries, or keys, to itself.
SPECIALIZED = Config(128, 64, 4, 3)
FORWARD = {
    "sm_80": Config(128, 64, 8, 2),
    "sm_90": Config(128, 64, 8, 3),
    "sm_100": Config(128, 64, 8, 2),
    "gfx942": Config(128, 32, 8, 1),
}
# Three gradients of 128 keys are 160 registers of a thread, which leaves no room for the products of 64 queries.
KEYS = {
    "sm_80": Config(32, 32, 4, 2),
    "sm_90": Config(32, 128, 8, 2),
    "sm_100": Config(32, 128, 8, 2),
    "gfx942": Config(32, 32, 4, 1),
}
QUERIES = {
    "sm_80": Config(32, 64, 4, 2),
    "sm_90": Config(128, 64, 8, 2),
    "sm_100": Config(128, 64, 8, 2),
    "gfx942": Config(64, 32, 4, 1),
}
# Of float32, which has no exact products in tensor cores: all from registers, so small.
EXACT = Config(16, 32, 8, 1)


def block(width: int) -> int:
    """Returns the power of two that holds `width` columns; products take at least 16."""
    return max(16, 1 << (width - 1).bit_length())  # in kernels too, where it may call builtins only


def pick(table: dict[str, Config], dtype: torch.dtype, family: str) -> Config:
    """Returns the configuration of FORWARD, KEYS or QUERIES for this dtype on this family of GPUs."""
    return table[family] if dtype in _HALF else EXACT


def specializes(q: Tensor, kv: Tensor, key: Tensor, spans: Tensor | None) -> bool:
    """Tells if the specialized kernel takes these operands: sizes as published, 16-byte rows, causal without spans."""
    width = key.shape[2]
    if spans is not None or q.dtype not in _HALF or (q.shape[3], width, kv.shape[3]) != (192, 64, 256):
        return False
    return all(
        x.stride(1) > 0
        and not any((x.element_size() * stride) % 16 for stride in x.stride()[:-1])
        and x.data_ptr() % 16 == 0
        for x in (q, kv, key)
    )


def obstacle(q: Tensor, kv: Tensor, key: Tensor, scale: float, mask: Tensor | None, dropout: float) -> str | None:
    """Returns the reason why the kernels cannot take these operands, or None."""
    sizes = {"P": q.shape[3] - key.shape[2], "R": key.shape[2]}
    sizes["V"] = kv.shape[3] - sizes["P"]
    if q.dtype not in (*_HALF, torch.float32):
        return f"its kernels are for bfloat16, float16 and float32, got {q.dtype}"
    if any(not 0 < sizes[name] <= widest for name, widest in _WIDEST.items()):
        return f"its kernels are for P, R and V from 1 to {', '.join(map(str, _WIDEST.values()))}, got {sizes}"
    if mask is not None and not is_spans(mask):
        return f"its kernels have no mask but spans, got {mask.dtype} {list(mask.shape)}"
    if dropout:
        return "its kernels have no dropout"
    if not scale > 0:
        return f"its kernels need a scale above 0, got {scale}"
    return None
