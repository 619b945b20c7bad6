"""Operators of the DeepSeek architecture, each with a PyTorch reference beside its kernels.

Attention (`attention/`)
    mla_attention, mla_decode, mla_decode_paged, latent_write, latent_write_paged, rope, rope_
    indexer_scores, topk_select, sparse_mla (DeepSeek sparse attention)
Mixture of experts (`moe/`)
    topk_gate, sort_by_expert, permute, unpermute, grouped_gemm, grouped_gemm_swiglu, fused_moe,
    fp8_weight_fused_moe
Products (`gemm/`)
    dense_gemm, fp8_gemm, fp8_grouped_gemm, fp8_grouped_wgrad, fp8_weight_gemm, fp8_weight_grouped_gemm
FP8 quantization (`quant/`)
    quantize_rows, quantize_transposed, quantize_both, quantize_grouped_transposed, quantize_blocks, dequantize_blocks,
    swiglu_quantize, hadamard, hadamard_quantize
Norm (`norm/`)
    rms_norm, add_rms_norm, rms_norm_quantize, add_rms_norm_quantize
Loss (`loss/`)
    linear_cross_entropy, LinearCrossEntropy
Choice of the implementation (`dispatch`)
    use_backend, use_native_half_matmul, describe, BackendError

`dispatch` decides which implementation runs; another one changes the speed, never the semantics. kernels/README.md has
the contract and a table of shapes.
"""

from .attention.indexer_scores import indexer_scores
from .attention.latent_write import latent_write, latent_write_paged
from .attention.mla_attention import mla_attention
from .attention.mla_decode import mla_decode, mla_decode_paged
from .attention.rope import rope, rope_
from .attention.sparse_mla import sparse_mla
from .attention.topk_select import topk_select
from .dispatch import BackendError, describe, use_backend, use_native_half_matmul
from .gemm.dense_gemm import dense_gemm
from .gemm.fp8_gemm import fp8_gemm
from .gemm.fp8_grouped_gemm import fp8_grouped_gemm, fp8_grouped_wgrad
from .gemm.fp8_weight_gemm import fp8_weight_gemm, fp8_weight_grouped_gemm
from .loss.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from .moe.fp8_weight_fused_moe import fp8_weight_fused_moe
from .moe.fused_moe import fused_moe, grouped_gemm_swiglu
from .moe.grouped_gemm import grouped_gemm
from .moe.moe_permute import permute, sort_by_expert, unpermute
from .moe.topk_gate import topk_gate
from .norm.rms_norm import add_rms_norm, add_rms_norm_quantize, rms_norm, rms_norm_quantize
from .quant.fp8_quantize import (
    dequantize_blocks,
    quantize_blocks,
    quantize_both,
    quantize_grouped_transposed,
    quantize_rows,
    quantize_transposed,
)
from .quant.hadamard_quantize import hadamard, hadamard_quantize
from .quant.swiglu_quantize import swiglu_quantize

__all__ = [
    "BackendError",
    "LinearCrossEntropy",
    "add_rms_norm",
    "add_rms_norm_quantize",
    "dense_gemm",
    "dequantize_blocks",
    "describe",
    "fp8_gemm",
    "fp8_grouped_gemm",
    "fp8_grouped_wgrad",
    "fp8_weight_fused_moe",
    "fp8_weight_gemm",
    "fp8_weight_grouped_gemm",
    "fused_moe",
    "grouped_gemm",
    "grouped_gemm_swiglu",
    "hadamard",
    "hadamard_quantize",
    "indexer_scores",
    "latent_write",
    "latent_write_paged",
    "linear_cross_entropy",
    "mla_attention",
    "mla_decode",
    "mla_decode_paged",
    "permute",
    "quantize_blocks",
    "quantize_both",
    "quantize_grouped_transposed",
    "quantize_rows",
    "quantize_transposed",
    "rms_norm",
    "rms_norm_quantize",
    "rope",
    "rope_",
    "sort_by_expert",
    "sparse_mla",
    "swiglu_quantize",
    "topk_gate",
    "topk_select",
    "unpermute",
    "use_backend",
    "use_native_half_matmul",
]
