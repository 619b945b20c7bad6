"""Packed keys of the indexer: a token's key in FP8 beside its scales, as bytes of a cache.

The order is D e4m3 values, then ceil(D / 128) float32 scales, powers of two: DeepSeek-V3.2 128 + 4 = 132 bytes instead
of 256. Keys are rotated by a Hadamard matrix before they are quantized (`hadamard_quantize`), as DeepSeek's own code
does, so queries have to be rotated as well.

`indexer_scores` reads this format; the caches of `deepseek_arch` hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.fp8 import GROUP, HIGH_PRECISION
from ...common.host import cdiv
from ...quant.hadamard_quantize import hadamard_quantize

__all__ = ["index_key_views", "index_keys_aligned", "pack_index_keys", "packed_index_bytes", "split_index_keys"]


def packed_index_bytes(width: int) -> int:
    """Returns the bytes of a token in one layer, for keys of D values."""
    return width + 4 * cdiv(width, GROUP)


def pack_index_keys(keys: Tensor) -> Tensor:
    """Rotates and packs keys [..., D] in any floating dtype -> uint8 [..., packed bytes], without a gradient.

    Raises:
        ValueError: D is no power of two.
    """
    rows = keys.detach()
    rows = rows if rows.dtype in HIGH_PRECISION else rows.float()
    codes, scales = hadamard_quantize(rows.reshape(-1, keys.shape[-1]))
    # Copies: `contiguous` leaves a single row or column where it is, with strides that do not divide.
    parts = [part.clone(memory_format=torch.contiguous_format).view(torch.uint8) for part in (codes, scales)]
    packed = torch.cat(parts, dim=-1)
    return packed.view(*keys.shape[:-1], packed.shape[-1])


def split_index_keys(packed: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Splits uint8 [..., packed bytes] into codes [..., D] float8_e4m3fn and scales [..., ceil(D / 128)], copies."""
    codes, scales = packed.split([width, packed.shape[-1] - width], dim=-1)
    codes, scales = (part.clone(memory_format=torch.contiguous_format) for part in (codes, scales))
    return codes.view(torch.float8_e4m3fn), scales.view(torch.float32)


def index_keys_aligned(packed: Tensor, width: int) -> bool:
    """Tells if `index_key_views` can be made of these bytes: if each key's scales begin where a float32 may."""
    # torch.compile knows no offsets; tensors that it makes begin where their memory does.
    offset = 0 if torch.compiler.is_compiling() else packed.storage_offset()
    return packed.stride(-1) == 1 and all(number % 4 == 0 for number in (width, offset, *packed.stride()[:-1]))


def index_key_views(packed: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Views uint8 [..., packed bytes] as codes [..., D] float8_e4m3fn and scales [..., ceil(D / 128)] float32.

    The bytes must be aligned (`index_keys_aligned`).
    """
    codes, scales = packed[..., :width], packed[..., width:]
    return codes.view(torch.float8_e4m3fn), scales.view(torch.float32)
