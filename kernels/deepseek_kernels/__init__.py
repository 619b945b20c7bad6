"""Operators of the DeepSeek architecture: one folder each, a PyTorch reference beside every kernel.

`deepseek_kernels.dispatch` decides which implementation runs; switching it changes speed, never semantics.
"""

from .dense_gemm import dense_gemm
from .dispatch import BackendError, describe, use_backend
from .fp8_quantize import dequantize_blocks, quantize_blocks, quantize_both, quantize_rows, quantize_transposed
from .grouped_gemm import grouped_gemm
from .mla_decode import mla_decode
from .moe_permute import permute, sort_by_expert, unpermute

__all__ = [
    "BackendError",
    "dense_gemm",
    "dequantize_blocks",
    "describe",
    "grouped_gemm",
    "mla_decode",
    "permute",
    "quantize_blocks",
    "quantize_both",
    "quantize_rows",
    "quantize_transposed",
    "sort_by_expert",
    "unpermute",
    "use_backend",
]
