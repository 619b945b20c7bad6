"""Rates of devices and links that plans are made with, and where each comes from.

A rate is what kernels reach, not a data sheet's peak. Where none is published for a device, it is the device's peak
times the share of the peak that the H800 reaches; `Device.sources` says which are which.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["DEVICES", "RESERVED", "Device", "find_device"]

# Share of a device's memory that no tensor of a plan may use, an assumption: the runtime's context, buffers of the
# communication libraries, fragmentation.
RESERVED = 0.05


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device's memory, and the rates its kernels and links reach.

    Attributes:
        memory: bytes. memory_rate: bytes/s of its memory, as read by decoding kernels.
        fp8, bf16: FLOP/s of matrix products, fp8_wgrad of those for weight gradients; fp8 is 0 without FP8 units.
        attention, attention_backward: FLOP/s of expanded attention; decode_attention: of attention over latents.
        peak_bf16: the data sheet's dense BF16 peak, which model FLOP utilization is measured against.
        nvlink, network: bytes/s that one device sends within its node, and to other nodes.
        small_nvlink, small_network: the same for the small messages of a decoding step.
        per_node: devices that reach each other by `nvlink`.
        unfused: share of a layer's time in norms, casts, SwiGLU and permutation.
        exchange_share: share of the processors that move tokens while products run beside them.
    """

    name: str
    memory: float
    memory_rate: float
    fp8: float
    fp8_wgrad: float
    bf16: float
    attention: float
    attention_backward: float
    decode_attention: float
    peak_bf16: float
    nvlink: float
    network: float
    small_nvlink: float
    small_network: float
    per_node: int = 8
    unfused: float = 0.20
    exchange_share: float = 20 / 132
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def is_measured(self) -> bool:
        """True if the rates of products and attention are published measurements of this device."""
        return "fp8, fp8_wgrad, attention, attention_backward" in self.sources


_TRACE = "deepseek-ai/profile-data, train.json (EP64, 4,096 tokens)"
_H800 = Device(
    name="H800",
    memory=80e9,
    memory_rate=3.0e12,
    fp8=1.0e15,
    fp8_wgrad=0.7e15,
    bf16=0.6e15,
    attention=555e12,
    attention_backward=455e12,
    decode_attention=660e12,
    peak_bf16=989.5e12,
    nvlink=160e9,
    network=50e9,
    small_nvlink=100e9,
    small_network=45e9,
    sources={
        "memory": "data sheet",
        "memory_rate": "deepseek-ai/FlashMLA README: 3,000 GB/s of 3,350",
        "fp8, fp8_wgrad, attention, attention_backward": _TRACE,
        "bf16": "assumed: 0.6 of the peak (FP8 products reach 0.5 of theirs)",
        "decode_attention": "deepseek-ai/FlashMLA README: 660 TFLOP/s",
        "peak_bf16": "data sheet",
        "nvlink, network": "arXiv 2412.19437, section 3.2.2; deepseek-ai/DeepEP measures 153 to 158 and 43 to 58 GB/s",
        "small_nvlink, small_network": "deepseek-ai/DeepEP, low-latency kernels: 77 us (EP8), 173 us (EP64) a dispatch",
        "unfused": "calibrated on " + _TRACE,
        "exchange_share": "arXiv 2412.19437, section 3.2.2: 20 of 132 processors",
    },
)


def _like_h800(
    name: str,
    memory: float,
    memory_peak: float,
    peak_bf16: float,
    nvlink_peak: float,
    network: float = 50e9,
    has_fp8: bool = True,
    per_node: int = 8,
) -> Device:
    """Returns a device with its data sheet's peaks at the H800's shares of them.

    The H800's NVLink sends 200 GB/s by its data sheet and 160 as used; its memory 3,350 and 3,000.
    """
    products = peak_bf16 / _H800.peak_bf16
    links = nvlink_peak / 200e9
    return Device(
        name=name,
        memory=memory,
        memory_rate=memory_peak * 3.0 / 3.35,
        fp8=_H800.fp8 * products if has_fp8 else 0.0,
        fp8_wgrad=_H800.fp8_wgrad * products if has_fp8 else 0.0,
        bf16=_H800.bf16 * products,
        attention=_H800.attention * products,
        attention_backward=_H800.attention_backward * products,
        decode_attention=_H800.decode_attention * products,
        peak_bf16=peak_bf16,
        nvlink=_H800.nvlink * links,
        network=network,
        small_nvlink=_H800.small_nvlink * links,
        small_network=network * 0.9,
        per_node=per_node,
        sources={
            "memory, peak_bf16": "data sheet",
            "network": "data sheet of one adapter a device",
            "all other rates": "assumed: the data sheet's peak at the share that the H800 reaches",
        },
    )


DEVICES = {
    device.name.lower(): device
    for device in (
        _H800,
        _like_h800("H100", 80e9, 3.35e12, 989.5e12, 450e9),
        _like_h800("H200", 141e9, 4.8e12, 989.5e12, 450e9),
        _like_h800("H20", 96e9, 4.0e12, 148e12, 450e9),
        _like_h800("A100", 80e9, 2.0e12, 312e12, 300e9, network=25e9, has_fp8=False),
        _like_h800("B200", 180e9, 8.0e12, 2250e12, 900e9),
        _like_h800("GB200", 186e9, 8.0e12, 2500e12, 900e9, per_node=72),
    )
}


def find_device(name: str | Device) -> Device:
    """Returns the device called `name`, in any case; a `Device` is returned as it is.

    Raises:
        ValueError: no such device.
    """
    if isinstance(name, Device):
        return name
    if name.lower() not in DEVICES:
        raise ValueError(f"expected a device of {', '.join(DEVICES)}, got {name!r}")
    return DEVICES[name.lower()]
