"""Serving on many devices: bytes held, and bounds on the tokens per second of decoding and of prefill.

Attention is data parallel (or cut into heads by `tp`, which repeats the latent cache on every rank), experts are spread
by `ep`. Times are bounds: launches, waits for the slowest device and scheduling are not in them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..config.argument_types import check_types
from ..config.deepseek_config import DeepseekConfig
from ..layout.accounting import indexer_cache_bytes, kv_cache_bytes
from ..layout.parallel_layout import LayoutError, ParallelLayout
from ..layout.published_tensors import scale_shape
from .devices import RESERVED, Device, find_device
from .setup import PRECISIONS, TrainingSetup
from .shards import Parameter, end_parameters, layer_parameters, per_layer
from .timing import layer_seconds

__all__ = ["DecodeSeconds", "InferencePlan", "InferenceSetup", "exchange_seconds", "plan_inference"]


@check_types
@dataclass(frozen=True, kw_only=True)
class InferenceSetup:
    """Batch, context and number formats of serving.

    Attributes:
        batch: sequences that every data-parallel rank decodes at a time; context: tokens that each has cached.
        precision: of weights: "fp8" as published, "bf16" dequantized. cache_bytes: of a cached value.
        redundant: copies of busy experts beyond one of each.
        overlap: two half batches take turns, so that one computes while the other is exchanged.

    Raises:
        ValueError: a number is too small, or no such precision.
    """

    batch: int = 1
    context: int = 4096
    precision: str = "fp8"
    cache_bytes: int = 2
    redundant: int = 0
    overlap: bool = True

    def __post_init__(self) -> None:
        for name, least in {"batch": 1, "context": 1, "cache_bytes": 1, "redundant": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} >= {least}, got {getattr(self, name)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"expected precision to be one of {', '.join(PRECISIONS)}, got {self.precision!r}")


@dataclass(frozen=True)
class DecodeSeconds:
    """Seconds of one decoding step on one device, by what they go to.

    Attributes:
        attention: reading the cache, or multiplying with it; dense: all weights but routed experts'.
        experts: reading those routed experts that any token chose, or multiplying with them.
        exchange: expert dispatch and combine; tensor: all-reduces.
    """

    attention: float
    dense: float
    experts: float
    exchange: float
    tensor: float


@dataclass(frozen=True)
class InferencePlan:
    """Everything `plan_inference` finds.

    Attributes:
        memory: bytes by kind of one device; largest_batch: sequences a data-parallel rank has memory for.
        decode: seconds of a step; step_seconds: of the whole, overlapped as the setup says.
        prefill_tokens_per_second: bound of one device, with expert exchange hidden as far as computing lasts.
    """

    layout: ParallelLayout
    setup: InferenceSetup
    device: Device
    memory: dict[str, int]
    largest_batch: int
    decode: DecodeSeconds
    prefill_tokens_per_second: float

    @property
    def memory_total(self) -> int:
        """Bytes of one device."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """True if the device has the memory."""
        return self.memory_total <= self.device.memory

    @property
    def step_seconds(self) -> float:
        """Seconds of one decoding step: the longer of computing and exchange if they overlap, else both."""
        d = self.decode
        computing = d.attention + d.dense + d.experts + d.tensor
        return max(computing, d.exchange) if self.setup.overlap else computing + d.exchange

    @property
    def decode_tokens_per_second(self) -> float:
        """Bound of one device, without speculation."""
        return self.setup.batch / self.layout.tp / self.step_seconds

    @property
    def binds(self) -> str:
        """The largest part of a decoding step that is not hidden."""
        parts = dataclasses.asdict(self.decode)
        if self.setup.overlap and parts["exchange"] < self.step_seconds:
            del parts["exchange"]
        return max(parts, key=parts.__getitem__)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        return {
            "layout": dataclasses.asdict(self.layout) | {"edp": self.layout.edp, "devices": self.layout.world_size},
            "setup": dataclasses.asdict(self.setup),
            "device": dataclasses.asdict(self.device),
            "memory_bytes": self.memory,
            "memory_total_bytes": self.memory_total,
            "fits": self.fits,
            "largest_batch": self.largest_batch,
            "decode_seconds": dataclasses.asdict(self.decode),
            "decode_step_seconds": self.step_seconds,
            "decode_tokens_per_second_per_device": self.decode_tokens_per_second,
            "prefill_tokens_per_second_per_device": self.prefill_tokens_per_second,
            "binds": self.binds,
        }


def exchange_seconds(
    hidden: int, copies: int, tokens: float, ranks: int, device: Device, value: float, spans: int
) -> float:
    """Returns the seconds of sending `copies` rows of each of `tokens` tokens to evenly chosen ranks, one way.

    Low-latency kernels send a row for each choice, straight to its device.

    Args:
        value: bytes of a value; spans: consecutive devices that the group of `ranks` covers.
    """
    link = device.small_nvlink if spans <= device.per_node else device.small_network
    return tokens * copies * hidden * value * (1 - 1 / ranks) / link


@check_types
def plan_inference(
    config: DeepseekConfig,
    layout: ParallelLayout,
    device: str | Device = "H800",
    setup: InferenceSetup | None = None,
) -> InferencePlan:
    """Plans serving `config`'s main model, without its prediction layers.

    Raises:
        LayoutError: pipeline or context parallelism, all that does not divide, cuts within FP8 blocks.
        ValueError: no such device.
    """
    device, setup = find_device(device), setup or InferenceSetup()
    c = config.replace(num_nextn_predict_layers=0)
    if layout.pp * layout.cp > 1:
        raise LayoutError(f"expected pp = cp = 1 for serving, got pp {layout.pp}, cp {layout.cp}")
    layout.validate(c, fp8_blocks=setup.precision == "fp8", redundant_experts=setup.redundant)
    # All experts of a layer, of which each rank takes its part together with the copies.
    layers = per_layer(c, lambda i: layer_parameters(c, i, dataclasses.replace(layout, ep=1)))
    sizes = per_layer(c, lambda i: _layer_bytes(c, layers[i], setup, layout.ep))
    ends = sum(_stored_bytes(c, parameter, setup) for parameter in end_parameters(c, layout, True, True))
    cached = kv_cache_bytes(c, setup.context, setup.cache_bytes) + indexer_cache_bytes(c, setup.context)
    # Two batches' rows to and from the experts, in BF16, and float32 logits.
    working = (2 * 2 * 2 * (c.num_experts_per_tok or 1) * c.hidden_size + 4 * c.vocab_size) // layout.tp
    memory = {
        "weights": ends + sum(dense + routed for dense, routed in sizes),
        "cache": setup.batch * cached,
        "working": setup.batch * working,
        "reserved": round(RESERVED * device.memory),
    }
    free = device.memory - memory["weights"] - memory["reserved"]
    return InferencePlan(
        layout=layout,
        setup=setup,
        device=device,
        memory=memory,
        largest_batch=max(0, int(free // (cached + working))),
        decode=_decode_seconds(c, layout, setup, device, layers, sizes),
        prefill_tokens_per_second=_prefill_rate(c, layout, setup, device),
    )


def _stored_bytes(c: DeepseekConfig, parameter: Parameter, setup: InferenceSetup) -> int:
    """Returns the bytes of a parameter; FP8 scales are one float32 a block of every matrix."""
    if parameter.kind == "float32":
        return 4 * parameter.elements
    if setup.precision == "bf16" or parameter.kind != "projection":
        return 2 * parameter.elements
    *stack, rows, columns = parameter.shape
    # Gate and up share one tensor, but not their blocks.
    halves = 2 if parameter.name.endswith("gate_up_proj") else 1
    scale_rows, scale_columns = scale_shape(c, (rows // halves, columns))
    return parameter.elements + 4 * (stack[0] if stack else 1) * halves * scale_rows * scale_columns


def _layer_bytes(c: DeepseekConfig, parameters: list[Parameter], setup: InferenceSetup, ep: int) -> tuple[int, int]:
    """Returns a layer's bytes on one device: of everything but routed experts, and of these with redundant copies."""
    dense = sum(_stored_bytes(c, parameter, setup) for parameter in parameters if not parameter.routed)
    routed = sum(_stored_bytes(c, parameter, setup) for parameter in parameters if parameter.routed)
    experts = c.n_routed_experts or 1
    return dense, routed // experts * ((experts + setup.redundant) // ep)


def _decode_seconds(
    c: DeepseekConfig,
    layout: ParallelLayout,
    setup: InferenceSetup,
    device: Device,
    layers: list[list[Parameter]],
    sizes: list[tuple[int, int]],
) -> DecodeSeconds:
    rate = device.fp8 if setup.precision == "fp8" and device.fp8 else device.bf16
    batch, top_k, experts = setup.batch, c.num_experts_per_tok or 0, c.n_routed_experts or 1
    visible = min(setup.context, c.index_topk or setup.context)
    pairs = 2 * c.num_attention_heads // layout.tp * (c.latent_dim + c.kv_lora_rank)
    read = (visible * c.latent_dim * setup.cache_bytes) / device.memory_rate
    attention = batch * max(read, visible * pairs / device.decode_attention)
    # Tokens of the whole group choose among its experts; an expert that no token chose is not read.
    group = batch * layout.ep * layout.etp / layout.tp
    active = 1 - (1 - top_k / experts) ** group
    out = dict.fromkeys(("attention", "dense", "experts", "exchange", "tensor"), 0.0)
    for parameters, (dense, routed) in zip(layers, sizes, strict=True):
        out["attention"] += attention
        elements = sum(parameter.elements for parameter in parameters if not parameter.routed)
        out["dense"] += max(dense / device.memory_rate, 2 * batch * elements / rate)
        out["tensor"] += 2 * 2 * 2 * batch * c.hidden_size * (layout.tp - 1) / layout.tp / device.nvlink
        if not routed:
            continue
        rows = batch / layout.tp * top_k
        expert = 3 * c.hidden_size * (c.moe_intermediate_size or 0)
        out["experts"] += max(active * routed / device.memory_rate, 2 * rows * expert / rate)
        ranks = layout.ep * layout.etp
        there = 1 + 4 / 128 if setup.precision == "fp8" else 2.0
        for value in (there, 2.0):
            tokens = batch / layout.tp * layout.etp
            out["exchange"] += exchange_seconds(c.hidden_size, top_k, tokens, ranks, device, value, ranks)
    head = c.vocab_size * c.hidden_size / layout.tp
    out["dense"] += max(2 * head / device.memory_rate, 2 * batch * head / device.bf16)
    return DecodeSeconds(**out)


def _prefill_rate(c: DeepseekConfig, layout: ParallelLayout, setup: InferenceSetup, device: Device) -> float:
    """Returns tokens/s of one device that runs whole sequences of `context` tokens forward."""
    precision = "fp8" if setup.precision == "fp8" and device.fp8 else "bf16"
    training = TrainingSetup(sequence=setup.context, precision=precision, recompute="none", schedule="1f1b")
    seconds = 0.0
    for layer in layer_seconds(c, layout, training, device):
        beside = layer.forward / (1 - device.exchange_share) if layer.exchange else layer.forward
        seconds += max(beside, layer.exchange) + layer.waits
    return setup.context / seconds / layout.tp
