"""Cost of a model in memory and FLOPs, as one structure: `deepseek-arch plan` prints it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config.deepseek_config import DeepseekConfig
from ..layout.accounting import (
    ParameterCount,
    count_parameters,
    decode_flops_per_token,
    expanded_cache_bytes,
    flops_per_token,
    indexer_cache_bytes,
    kv_cache_bytes,
    weight_bytes,
)

__all__ = ["DEVICE_GIGABYTES", "USABLE", "Fit", "MemoryPlan", "plan_memory"]

DEVICE_GIGABYTES = (24.0, 40.0, 80.0, 141.0)
# The rest of a device's memory is left for activations, the runtime and fragmentation.
USABLE = 0.9
DTYPES = ("bf16", "fp8", "fp32")
_MOST = 1e15  # tokens, sequences or gigabytes: far above all there are, and every result is a finite number


@dataclass(frozen=True)
class Fit:
    """Fit of weights and cache into devices of one size (10^9 bytes a gigabyte).

    Attributes:
        devices: number that it takes, weights and cache spread evenly.
        cache_tokens: tokens of cache that one device holds beside all the weights; 0 if these alone are too large.
    """

    gigabytes: float
    dtype: str
    devices: int
    cache_tokens: int


@dataclass(frozen=True)
class MemoryPlan:
    """Everything `deepseek-arch plan` prints. Weights include the MTP modules, of which
    `mtp_weight_bytes` is the part; caches are bfloat16; FLOPs are per token."""

    model_type: str
    context: int
    batch: int
    parameters: ParameterCount
    prefill_flops: int
    decode_flops: int
    training_flops: int
    latent_cache_bytes_per_token: int
    indexer_cache_bytes_per_token: int
    expanded_cache_bytes_per_token: int
    cache_bytes: int
    weight_bytes: dict[str, int]
    mtp_weight_bytes: dict[str, int]
    fits: tuple[Fit, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON can hold it."""
        return dataclasses.asdict(self)


def plan_memory(
    config: DeepseekConfig, context: int = 4096, batch: int = 1, gigabytes: Sequence[float] = DEVICE_GIGABYTES
) -> MemoryPlan:
    """Returns the sizes of a model with a cache for `batch` sequences of `context` tokens, on devices of each size.

    Raises:
        ValueError: a number is not positive, not finite, or beyond all measure.
    """
    for name, value in (("context", context), ("batch", batch), *(("memory", size) for size in gigabytes)):
        if value <= 0:
            raise ValueError(f"expected {name} > 0, got {value}")
        if not value <= _MOST:
            raise ValueError(f"expected {name} to be a number of at most {_MOST:g}, got {value}")
    per_token = kv_cache_bytes(config) + indexer_cache_bytes(config)
    cache = per_token * context * batch
    weights = {dtype: weight_bytes(config, dtype, mtp=True) for dtype in DTYPES}
    fits = []
    for size in gigabytes:
        usable = size * 1e9 * USABLE
        for dtype, needed in weights.items():
            free = max(0, math.floor(usable - needed))
            fits.append(Fit(size, dtype, math.ceil((needed + cache) / usable), free // per_token))
    return MemoryPlan(
        model_type=config.model_type,
        context=context,
        batch=batch,
        parameters=count_parameters(config),
        prefill_flops=flops_per_token(config, context),
        decode_flops=decode_flops_per_token(config, context),
        training_flops=flops_per_token(config, context, training=True),
        latent_cache_bytes_per_token=kv_cache_bytes(config),
        indexer_cache_bytes_per_token=indexer_cache_bytes(config),
        expanded_cache_bytes_per_token=expanded_cache_bytes(config),
        cache_bytes=cache,
        weight_bytes=weights,
        mtp_weight_bytes={dtype: weights[dtype] - weight_bytes(config, dtype) for dtype in DTYPES},
        fits=tuple(fits),
    )
