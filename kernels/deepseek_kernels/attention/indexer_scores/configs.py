"""Tiles of the indexer's scores: static rules on shapes, which need neither Triton nor a GPU.

The compile gate shows registers, spills and shared memory of every configuration here. Nothing here was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...common.host import cdiv, power_of_two

__all__ = [
    "EXACT",
    "FEW",
    "KEY_GRADIENT",
    "MANY",
    "MOST_HEADS",
    "MOST_WIDTH",
    "OTHERS",
    "QUERY_GRADIENT",
    "SMALL",
    "Config",
    "chunk_for",
    "config_for",
    "gradient_config",
    "parts_for",
    "places_of",
]

# A tile holds all heads of a query, whole.
MOST_HEADS, MOST_WIDTH = 128, 256


@dataclass(frozen=True)
class Config:
    """Tile of `keys` keys against `pairs` pairs of a query and a head, at most.

    Attributes:
        maxnreg: registers of a thread at most.
    """

    keys: int
    pairs: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    @property
    def blocks(self) -> dict[str, int]:
        """The kernel's constants."""
        return {"KEYS": self.keys, "STAGES": self.num_stages}

    @property
    def options(self) -> dict[str, int]:
        """The compiler's options."""
        limit = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


# Two programs share a multiprocessor: products of one run beside the sums over heads of the other.
MANY = Config(128, 128, num_warps=8, num_stages=2, maxnreg=128)
OTHERS = Config(128, 128, num_warps=8, num_stages=2)  # than Hopper
FEW = Config(128, 64, num_warps=4, num_stages=3)  # one query of up to 64 heads: reading keys bounds the time
# GPUs with little shared memory: 64 KB on AMD's.
SMALL = Config(64, 64, num_warps=4, num_stages=1)
# float32, whose products are not made by matrix units; for tests on small models.
EXACT = Config(16, 32, num_warps=8, num_stages=1)

# Of gradients, by family: half of a thread's registers are the gradient.
QUERY_GRADIENT = {
    "sm_80": Config(64, 64, num_warps=4, num_stages=2),
    "sm_90": Config(64, 64, num_warps=4, num_stages=2),
    "sm_100": Config(64, 64, num_warps=4, num_stages=2),
    "gfx942": Config(32, 64, num_warps=4, num_stages=1),
}
KEY_GRADIENT = {
    "sm_80": Config(64, 64, num_warps=4, num_stages=2),
    "sm_90": Config(128, 64, num_warps=8, num_stages=2),
    "sm_100": Config(128, 64, num_warps=8, num_stages=2),
    "gfx942": Config(32, 64, num_warps=4, num_stages=1),
}

_ROUNDS = 4  # programs of a multiprocessor, so that longer and shorter ones even out
_LEAST = 512  # keys of a program: its queries and its start are worth as many


def config_for(queries: int, heads: int, dtype: torch.dtype, family: str) -> Config:
    """Returns the tile for T queries of G heads; `family` is the compile gate's target."""
    if dtype == torch.float32:
        return EXACT
    if family == "gfx942":
        return SMALL
    if queries == 1 and heads <= FEW.pairs:
        return FEW
    return MANY if family == "sm_90" else OTHERS


def places_of(queries: int, heads: int, config: Config) -> dict[str, int]:
    """Returns the kernel's constants for the pairs of a tile: QUERIES, and PLACES of heads, powers of two."""
    places = max(16, power_of_two(heads))  # products take at least 16
    return {"QUERIES": min(power_of_two(queries), max(1, config.pairs // places)), "PLACES": places}


def chunk_for(programs: int, keys: int, config: Config, processors: int) -> int:
    """Returns the keys of a program, whole tiles, where there are `programs` blocks of queries."""
    chunks = max(1, min(cdiv(_ROUNDS * processors, programs), cdiv(keys, _LEAST)))
    return cdiv(cdiv(keys, chunks), config.keys) * config.keys


def gradient_config(table: dict[str, Config], dtype: torch.dtype, family: str) -> Config:
    """Returns the tile of QUERY_GRADIENT or KEY_GRADIENT."""
    return EXACT if dtype == torch.float32 else table[family]


def parts_for(programs: int, queries: int, config: Config, processors: int) -> int:
    """Returns the parts of T queries that are added up, where there are `programs` tiles of keys: one or few."""
    return max(1, min(cdiv(2 * processors, programs), cdiv(queries, 4 * config.pairs)))
