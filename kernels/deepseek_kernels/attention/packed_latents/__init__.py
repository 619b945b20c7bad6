"""Packed latents: a token of the latent cache as bytes, the latent in FP8 and the rotated key as it is.

The order is FlashMLA's: C e4m3 values of the latent, ceil(C / 128) float32 scales, one for each group of 128 along the
latent, and R bfloat16 values of the rotated key, which do not survive FP8 (TRAPS E10). DeepSeek-V3: 512 + 4 * 4 + 64 *
2 = 656 bytes instead of 1152.

Values and scales are those of `quantize_rows`. With s = max(amax, 1e-4) / 448, the scale of a value's group, a value is
read back within max(|value| / 16, s / 1024): half a step of 4 significant bits, or of the least e4m3 number.

`latent_write` stores this format, `mla_decode` reads it; both caches of `deepseek_arch` hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.fp8 import GROUP, HIGH_PRECISION, decode
from ...common.host import cdiv
from ...quant.fp8_quantize import quantize_rows

__all__ = ["aligned", "pack", "packed_bytes", "unpack", "views"]


def packed_bytes(kv_lora_rank: int, qk_rope_head_dim: int) -> int:
    """Returns the bytes of a token in one layer, for a latent of C and a rotated key of R values."""
    return kv_lora_rank + 4 * cdiv(kv_lora_rank, GROUP) + 2 * qk_rope_head_dim


def pack(states: Tensor, kv_lora_rank: int, scale_format: str | None = None) -> Tensor:
    """Packs latents and rotated keys, side by side [..., C + R] in any floating dtype -> uint8 [..., packed bytes].

    Scales are rounded up to powers of two with `scale_format="ue8m0"`, as DeepSeek-V3.2 has them.
    A NaN stays one, and an infinity makes its group NaN. The result carries no gradient.
    """
    latents, keys = states.detach().split([kv_lora_rank, states.shape[-1] - kv_lora_rank], dim=-1)
    latents = latents if latents.dtype in HIGH_PRECISION else latents.float()
    codes, scales = quantize_rows(latents.reshape(-1, kv_lora_rank), scale_format)
    keys = keys.reshape(len(codes), keys.shape[-1]).to(torch.bfloat16)
    packed = torch.cat([codes.view(torch.uint8), *(_copied(part).view(torch.uint8) for part in (scales, keys))], dim=-1)
    return packed.view(*states.shape[:-1], packed.shape[-1])


def unpack(packed: Tensor, kv_lora_rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unpacks uint8 [..., packed bytes] -> latents [..., C] and rotated keys [..., R] in `dtype`, new tensors.

    Latents are `float32(value) * scale`, rounded once.
    """
    groups = cdiv(kv_lora_rank, GROUP)
    codes, scales, keys = packed.split([kv_lora_rank, 4 * groups, packed.shape[-1] - kv_lora_rank - 4 * groups], dim=-1)
    latents, scales = decode(codes.view(torch.float8_e4m3fn)), _copied(scales).view(torch.float32)
    for group in range(groups):
        latents[..., group * GROUP : (group + 1) * GROUP].mul_(scales[..., group, None])
    return latents.to(dtype), _copied(keys).view(torch.bfloat16).to(dtype)


def aligned(packed: Tensor, kv_lora_rank: int) -> bool:
    """Tells if `views` can be made of these bytes: if each part of each token begins where its elements may."""
    # torch.compile knows no offsets; tensors that it makes begin where their memory does.
    offset = 0 if torch.compiler.is_compiling() else packed.storage_offset()
    starts = (kv_lora_rank, offset, *packed.stride()[:-1])
    return packed.stride(-1) == 1 and all(number % 4 == 0 for number in starts)


def views(packed: Tensor, kv_lora_rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views uint8 [..., packed bytes] as e4m3 [..., C], scales [..., C / 128] and rotated keys [..., R].

    The bytes must be `aligned`.
    """
    start = kv_lora_rank + 4 * cdiv(kv_lora_rank, GROUP)
    scales, keys = packed[..., kv_lora_rank:start], packed[..., start:]
    codes = packed[..., :kv_lora_rank].view(torch.float8_e4m3fn)
    return codes, scales.view(torch.float32), keys.view(torch.bfloat16)


def _copied(part: Tensor) -> Tensor:
    """Copies a part of a row, or a column, to memory where it may be viewed as smaller or larger elements.

    `contiguous` would leave a single one in its place, at an offset or with strides that do not divide.
    """
    return part.clone(memory_format=torch.contiguous_format)
