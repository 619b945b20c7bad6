"""Operators of the DeepSeek architecture: one folder each, a PyTorch reference beside every kernel.

`deepseek_kernels.dispatch` decides which implementation runs; switching it changes speed, never semantics.
"""

from .dense_gemm import dense_gemm
from .dispatch import BackendError, describe, use_backend
from .fp8_gemm import fp8_gemm
from .fp8_grouped_gemm import fp8_grouped_gemm, fp8_grouped_wgrad
from .fp8_quantize import (
    dequantize_blocks,
    quantize_blocks,
    quantize_both,
    quantize_grouped_transposed,
    quantize_rows,
    quantize_transposed,
)
from .fp8_weight_gemm import fp8_weight_gemm, fp8_weight_grouped_gemm
from .grouped_gemm import grouped_gemm
from .linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from .mla_decode import mla_decode, mla_decode_packed
from .moe_permute import permute, sort_by_expert, unpermute
from .swiglu_quantize import swiglu_quantize

__all__ = [
    "BackendError",
    "LinearCrossEntropy",
    "dense_gemm",
    "dequantize_blocks",
    "describe",
    "fp8_gemm",
    "fp8_grouped_gemm",
    "fp8_grouped_wgrad",
    "fp8_weight_gemm",
    "fp8_weight_grouped_gemm",
    "grouped_gemm",
    "linear_cross_entropy",
    "mla_decode",
    "mla_decode_packed",
    "permute",
    "quantize_blocks",
    "quantize_both",
    "quantize_grouped_transposed",
    "quantize_rows",
    "quantize_transposed",
    "sort_by_expert",
    "swiglu_quantize",
    "unpermute",
    "use_backend",
]
