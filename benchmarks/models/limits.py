"""Limit that the machine sets to a model: measured rates of reading and of products, and the work of a step.

The work is counted from the config: every weight that a step needs is read once, experts as often as uniform routing
chooses them, and the cache of every row once. Activations are left out, so the limit is a little lower than any program
can reach.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

import deepseek_arch as da
from deepseek_arch.layout.published_tensors import Weight, model_weights
from deepseek_arch.planning.costs import attention_flops
from deepseek_kernels.common.cpu import library_obstacle

from ..core.timing import interleave

__all__ = ["ModelCeilings", "Work", "decode_work", "measure_model_ceilings", "prefill_work", "training_work"]

BYTES = {"bf16": 2, "fp32": 4}
ROUNDS = 5


@dataclass(frozen=True)
class Work:
    """Bytes that a step has to read or write, and FLOPs of its products."""

    moved: float
    flops: float


@dataclass(frozen=True)
class ModelCeilings:
    """Bytes per second of reading memory, and FLOP/s of the products of each dtype: the best of several ways."""

    read: float
    products: dict[str, float]

    def seconds(self, work: Work, dtype: str) -> float:
        """Returns the least seconds that the ceilings allow.

        A CPU without products of bfloat16 multiplies them in float32.
        """
        rate = max(self.products.values()) if dtype == "bf16" else self.products["fp32"]
        return max(work.moved / self.read, work.flops / rate)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        products = ", ".join(f"{name} products {rate / 1e9:,.0f} GFLOP/s" for name, rate in self.products.items())
        return f"measured ceilings: reading {self.read / 1e9:.3g} GB/s, {products}"


def measure_model_ceilings(size: int) -> ModelCeilings:
    """Measures the ceilings with the threads in force.

    Args:
        size: rows and columns of the matrices that are multiplied; 256 bytes are read for each of their elements.
    """
    read = _read_rate(torch.ones(64 * size, size))
    products = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
        products[name] = 2 * size**3 / _best({"mm": lambda a=a, b=b: a @ b.T, **_onednn(a, b)})
    return ModelCeilings(read, products)


def _read_rate(table: torch.Tensor) -> float:
    """Bytes per second of the fastest of several ways to read the table."""
    reads: dict[str, Callable[[], object]] = {"float32": table.sum, "int64": table.view(torch.int64).sum}
    if library_obstacle(auto=True) is None:
        row = torch.ones(1, table.shape[1])
        reads["product"] = lambda: torch.ops.deepseek_kernels_cpu.dense(row, table)
    return table.nbytes / _best(reads)


def _best(actions: dict[str, Callable[[], object]]) -> float:
    """Seconds of the fastest run of any of them."""
    return min(min(samples.values) for samples in interleave(actions, rounds=ROUNDS).values())


def _onednn(a: torch.Tensor, b: torch.Tensor) -> dict[str, Callable[[], object]]:
    """A product of float32 by oneDNN, where this build of torch has it: on some CPUs it is faster than the default."""
    if a.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return {}
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return {}
    return {"oneDNN": lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")}


# ------------------------------------------------------------------ work


def decode_work(config: da.DeepseekConfig, dtype: str, batch: int, context: int, *, fp8: bool = False) -> Work:
    """Returns the work of one more token of each row, absorbed attention over `context` cached ones.

    Args:
        fp8: projections and experts are kept in FP8; dtype is that of the rest and of the cache.
    """
    c, size = config, BYTES[dtype]
    visible = min(context, c.index_topk or context) if c.is_sparse_attention else context
    cached = batch * visible * c.num_hidden_layers
    moved = float(cached * c.latent_dim * size)
    flops = 2.0 * cached * c.num_attention_heads * (c.latent_dim + c.kv_lora_rank)
    for weight in model_weights(c, mtp=False):
        if weight.part == "embedding" and not c.tie_word_embeddings:
            moved += batch * c.hidden_size * size
            continue
        moved += weight.elements * _read_share(c, weight, batch) * _bytes_of(c, weight, size, fp8)
        flops += 2.0 * batch * _multiplied(c, weight)
    return Work(moved, flops)


def prefill_work(config: da.DeepseekConfig, dtype: str, tokens: int) -> Work:
    """Returns the work of a prompt, with the logits of its last token."""
    return _forward_work(config, dtype, tokens, head_tokens=1)


def training_work(config: da.DeepseekConfig, dtype: str, tokens: int) -> Work:
    """Returns the work of forward and backward: three times the products, weights read twice, gradients written."""
    forward = _forward_work(config, dtype, tokens, head_tokens=tokens)
    return Work(3 * forward.moved, 3 * forward.flops)


def _forward_work(c: da.DeepseekConfig, dtype: str, tokens: int, head_tokens: int) -> Work:
    moved, flops = 0.0, tokens * sum(attention_flops(c, layer, tokens) for layer in range(c.num_hidden_layers))
    head = "embedding" if c.tie_word_embeddings else "head"
    for weight in model_weights(c, mtp=False):
        rows = head_tokens if weight.part == head else 0 if weight.part == "embedding" else tokens
        moved += weight.elements * (_read_share(c, weight, tokens) if rows else 0) * BYTES[dtype]
        flops += 2.0 * rows * _multiplied(c, weight)
    return Work(moved, flops)


def _read_share(c: da.DeepseekConfig, weight: Weight, tokens: int) -> float:
    """The share of a weight that is read: experts that no token chose are not."""
    if weight.part != "experts":
        return 1.0
    return 1 - (1 - (c.num_experts_per_tok or 0) / (c.n_routed_experts or 1)) ** tokens


def _bytes_of(c: da.DeepseekConfig, weight: Weight, size: int, fp8: bool) -> float:
    """Bytes of an element; a block of FP8 values has a float32 scale."""
    if not fp8 or weight.kind != "projection":
        return size
    rows, columns = c.weight_block_size or (128, 128)
    return 1 + 4 / (rows * columns)


def _multiplied(c: da.DeepseekConfig, weight: Weight) -> float:
    """Elements of the weight that one token is multiplied by."""
    if len(weight.shape) != 2:
        return 0.0
    times = c.num_experts_per_tok or 0 if weight.part == "experts" else 1
    return float(weight.shape[0] * weight.shape[1] * times)
