"""Operators of the DeepSeek architecture: one folder each, a PyTorch reference beside every kernel.

`deepseek_kernels.dispatch` decides which implementation runs; switching it changes speed, never semantics.
"""

from .dense_gemm import dense_gemm
from .dispatch import BackendError, describe, use_backend
from .grouped_gemm import grouped_gemm
from .mla_decode import mla_decode
from .moe_permute import permute, sort_by_expert, unpermute

__all__ = [
    "BackendError",
    "dense_gemm",
    "describe",
    "grouped_gemm",
    "mla_decode",
    "permute",
    "sort_by_expert",
    "unpermute",
    "use_backend",
]
