"""Sizes of a chunk and of a program, which need neither Triton nor a GPU."""

from __future__ import annotations

__all__ = ["COLUMNS", "NUM_WARPS", "chunk_bytes"]

COLUMNS = 8192  # of a row of logits at a time
NUM_WARPS = 8


def chunk_bytes(need_weight: bool) -> int:
    """Returns the size of a chunk's logits: 4096 tokens of V3's vocabulary in bfloat16, 1024 with a frozen weight.

    Each chunk reads and writes the weight's float32 gradient, 7.4 GB for V3: by an H200's figures a fifth of the time
    that the products of 1024 tokens take, a twentieth for 4096.
    """
    return 1 << 30 if need_weight else 1 << 28
