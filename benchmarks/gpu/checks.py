"""Checks of the operators that only a GPU can make, by name.

Operators repeat bit by bit, products of integers are exact, long FP8 sums are promoted, offsets beyond 2^31 are right,
and a decoding step captured as a CUDA graph gives the same logits. Each check is a function of a device and sizes that
raises `Mismatch`. At small sizes all of them run on a CPU too, on the references: that tests the checks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from deepseek_arch import DeepseekConfig, DeepseekLM
from deepseek_arch.cache.static_cache import StaticLatentCache
from deepseek_arch.generation.compiled_step import CompiledDecodeStep

from ..operators.declare import Operator, Shape, operators
from ..operators.fp8_operands import BF16_ROUNDING
from ..operators.operands import Random, as_tuple
from ..operators.scales import scale
from ..operators.verify import require_close, require_equal
from .exact_products import exact_grouped_gradients, exact_grouped_products, exact_products, promotion
from .large_offsets import large_attention, large_experts, large_permutation, large_product, large_quantization
from .sizes import Sizes

__all__ = ["Check", "checks", "repeats"]

REPEATS = 20

Check = Callable[[torch.device, Sizes], None]


def checks(sizes: Sizes) -> dict[str, Check]:
    """Returns every check by name, the quick ones first."""
    repeated: dict[str, Check] = {}
    for operator in operators():
        shape = min(operator.shapes(scale(sizes.scale)), key=lambda one: one.priority)
        repeated[f"repeats: {operator.name} {shape.name}"] = _repeats_of(operator, shape)
    return {**_QUICK, **repeated, **_LARGE}


def _repeats_of(operator: Operator, shape: Shape) -> Check:
    return lambda device, sizes: repeats(operator, shape, device)


def repeats(operator: Operator, shape: Shape, device: torch.device, times: int = REPEATS) -> None:
    """Checks that an operator gives the same bits every time.

    A race shows as a difference, unwritten memory as NaN. Each turn has the same inputs, also if the operator writes to
    them.
    """

    def inputs() -> tuple[Any, ...]:
        return operator.inputs(shape, Random(device, key=f"{operator.name} {shape.name}"))

    same = inputs()
    first = tuple(result.clone() for result in _tensors(operator.ours(*same)))
    for turn in range(1, times):
        for result in first:  # the allocator hands this memory to the next call
            _poison(torch.empty_like(result))
        same = inputs() if operator.in_place else same
        for mine, expected in zip(_tensors(operator.ours(*same)), first, strict=True):
            require_equal(mine, expected, f"repetition {turn} of {times - 1}")


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return tuple(one.detach() for one in as_tuple(result))


def _poison(memory: Tensor) -> None:
    if memory.element_size() == 1:
        memory.view(torch.uint8).fill_(0x7F)  # NaN in e4m3
    else:
        memory.fill_(torch.nan if memory.is_floating_point() else -1)


def captured_decoding(device: torch.device, sizes: Sizes) -> None:
    """Checks that a decoding step replayed as a CUDA graph (on a CPU, called) gives the logits of a plain step."""
    config = DeepseekConfig.from_pretrained("tiny")
    model = DeepseekLM(config, device=device, dtype=torch.bfloat16).eval()
    ids = Random(device, key="captured").integers(0, config.vocab_size, 3, 40)
    with torch.no_grad():
        caches = [model.new_cache(3), model.new_cache(3)]
        for cache in caches:
            model(ids, cache=cache)
        static, captured = (StaticLatentCache(cache, 128) for cache in caches)
        graph = CompiledDecodeStep(model, captured) if device.type == "cuda" else None
        for turn in range(8):
            right = model(ids[:, turn : turn + 1], cache=static).logits[:, -1]
            got = graph(ids[:, turn]) if graph else model(ids[:, turn : turn + 1], cache=captured).logits[:, -1]
            # The same kernels, but products may take other algorithms under capture, with other roundings.
            require_close(got, right, 4 * BF16_ROUNDING, f"captured step {turn}")


_QUICK: Mapping[str, Check] = {
    "integers: fp8_gemm": exact_products,
    "integers: grouped products": exact_grouped_products,
    "integers: grouped gradients": exact_grouped_gradients,
    "promotion: fp8_gemm": promotion,
    "decoding as a CUDA graph": captured_decoding,
}
_LARGE: Mapping[str, Check] = {
    "beyond 2^31: quantization": large_quantization,
    "beyond 2^31: fp8_gemm": large_product,
    "beyond 2^31: experts": large_experts,
    "beyond 2^31: permutation": large_permutation,
    "beyond 2^31: mla_decode": large_attention,
}
