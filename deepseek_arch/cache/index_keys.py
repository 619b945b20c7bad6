"""Keys of the indexer of sparse attention, beside the latents of a cache."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from deepseek_kernels.attention.packed_index_keys import packed_index_bytes

__all__ = ["IndexKeys"]


class IndexKeys:
    """One buffer [B, capacity, D] for each layer with an indexer, or uint8 [B, capacity, bytes] with `format="fp8"`.

    Slots are those of the latents, and so are lengths, growth and zeros beyond a row's tokens: the cache that owns the
    buffers says when.

    Args:
        layers: indices of the layers in the cache, from 0.
        width: of a key, D.
        format: None to store values of `dtype`, "fp8" for bytes of `deepseek_kernels.attention.packed_index_keys`.
    """

    def __init__(
        self, layers: Iterable[int], width: int, format: str | None, batch: int, capacity: int, device, dtype
    ) -> None:
        self.width, self.format = width, format
        self.device, self.dtype = device, torch.uint8 if format == "fp8" else dtype
        self._buffers = {layer: self._new(batch, capacity) for layer in layers}

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers."""
        return tuple(self._buffers)

    @property
    def columns(self) -> int:
        """Elements stored for a token and layer."""
        return packed_index_bytes(self.width) if self.format == "fp8" else self.width

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token takes over all layers."""
        return len(self._buffers) * self.columns * self.dtype.itemsize

    def buffer(self, layer: int, capacity: int) -> Tensor:
        """Returns a layer's buffer with room for at least the slots asked for; grown, it has exactly `capacity`."""
        buffer = self._buffers[layer]
        if capacity > buffer.shape[1]:
            grown = self._new(buffer.shape[0], capacity)
            grown[:, : buffer.shape[1]] = buffer
            self._buffers[layer] = buffer = grown
        return buffer

    def check(self, keys: Tensor, layer: int) -> None:
        """Raises a ValueError if new keys [B, T, D] (or bytes) do not fit."""
        if layer not in self._buffers:
            raise ValueError(f"expected the index of a layer with an indexer, {self.layers}, got {layer}")
        batch = self._buffers[layer].shape[0]
        packed = self.dtype == torch.uint8
        if keys.ndim != 3 or keys.shape[0] != batch or keys.shape[2] != self.columns:
            raise ValueError(f"expected the indexer's keys [{batch}, T, {self.columns}], got {list(keys.shape)}")
        if (keys.dtype == torch.uint8) != packed:
            raise ValueError(f"expected the indexer's keys as {self.dtype}, got {keys.dtype}")

    def reorder(self, index: Tensor) -> None:
        """Makes row i a copy of row `index[i]`."""
        with torch.inference_mode(False):
            self._buffers = {layer: buffer.index_select(0, index) for layer, buffer in self._buffers.items()}

    def clear(self, layer: int, row: int, first: int, last: int) -> None:
        """Zeroes the slots `first` to `last - 1` of a row."""
        if layer in self._buffers:
            self._buffers[layer][row, first:last] = 0

    def release(self, capacity: int) -> dict[int, Tensor]:
        """Returns the buffers, with at least `capacity` slots each, and lets go of them."""
        buffers = {layer: self.buffer(layer, capacity) for layer in self._buffers}
        self._buffers = {layer: self._new(buffer.shape[0], 0) for layer, buffer in buffers.items()}
        return buffers

    def adopt(self, buffers: dict[int, Tensor], capacity: int) -> None:
        """Takes the memory of released buffers, cut to `capacity` slots."""
        self._buffers = {layer: buffer[:, :capacity] for layer, buffer in buffers.items()}

    def _new(self, batch: int, capacity: int) -> Tensor:
        # Zeros, and usable outside of inference mode, as the latents.
        with torch.inference_mode(False):
            return torch.zeros(batch, capacity, self.columns, device=self.device, dtype=self.dtype)
