"""A latent cache that a decoding step can be compiled with, or captured as a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from deepseek_kernels.attention.packed_latents import pack

from ..config.argument_types import check_types, shown
from .latent_cache import LatentCache, _Append, spans_up_to

__all__ = ["StaticLatentCache"]


@check_types
class StaticLatentCache(LatentCache):
    """A `LatentCache` of fixed capacity, whose lengths are on the device.

    Every step reads and writes the same memory at indices that are tensors, and nothing in it depends on the number of
    tokens: it compiles once, and replays as a graph. Attention gets all slots, and a mask of those that each query
    attends to; the Triton kernel reads no others.

    Tokens beyond the capacity are not stored; on a CPU they raise, elsewhere only the device knows of them.

    Args:
        cache: the prompt's. Its tokens and, if it is large enough, its memory move here; it is empty afterwards.
        capacity: slots for each row.

    Raises:
        ValueError: the capacity is less than the tokens held.
    """

    def __init__(self, cache: LatentCache, capacity: int) -> None:
        if capacity >= 2**31:
            raise ValueError(f"expected a capacity below 2^31, got {shown(capacity)}")
        if capacity < cache.max_length:
            raise ValueError(f"expected a capacity of at least the {cache.max_length} tokens held, got {capacity}")
        held = cache._index_keys
        super().__init__(
            cache.num_layers,
            cache.batch_size,
            cache.kv_lora_rank,
            cache.qk_rope_head_dim,
            first_layer=cache.first_layer,
            format=cache.format,
            scale_format=cache.scale_format,
            index_head_dim=cache.index_head_dim,
            index_layers=() if held is None else [cache.first_layer + layer for layer in held.layers],
            index_format=cache.index_format,
            device=cache.device,
            dtype=cache.dtype,
        )
        lengths = cache.lengths
        buffers, index_buffers = cache.release(capacity)
        self._buffers = [buffer[:, :capacity] for buffer in buffers]
        if self._index_keys is not None:
            self._index_keys.adopt(index_buffers, capacity)
        with torch.inference_mode(False):
            self._device_lengths = torch.tensor(lengths, dtype=torch.int64, device=self.device)
        self._slots: Tensor | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens in the cache, per row; waits for the device."""
        return tuple(self._device_lengths.tolist())

    @property
    def device_lengths(self) -> Tensor:
        """`lengths` on the device, int64 [B]; later calls change it in place."""
        return self._device_lengths

    @contextmanager
    def append(self, num_tokens: int, valid: Tensor | None = None) -> Iterator[Tensor]:
        """Reserves slots as `LatentCache.append`, for tokens without padding.

        Raises:
            ValueError: some tokens are padding, or (on a CPU) there is no room for them.
        """
        if valid is not None:
            raise ValueError("expected tokens without padding for a static cache, got an attention mask")
        if self.device.type == "cpu" and not torch.compiler.is_compiling():
            longest = self.max_length
            if longest + num_tokens > self.capacity:
                raise ValueError(f"expected at most {self.capacity} tokens a row, got {longest} and {num_tokens} more")
        self._slots = self._device_lengths[:, None] + torch.arange(num_tokens, device=self.device)
        try:
            yield self._slots
            self._device_lengths.add_(num_tokens)
        finally:
            self._slots = None

    def spans(self, slots: Tensor, valid: Tensor | None = None) -> Tensor:
        """Returns `LatentCache.spans`, never None: attention gets the slots beyond a row's tokens too."""
        return spans_up_to(slots)

    def rewind(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Drops the tokens of each row beyond `lengths`. On a GPU a tensor is not checked: that would wait for it."""
        if isinstance(lengths, Tensor) and self.device.type != "cpu":
            self._device_lengths.copy_(lengths)
            return
        super().rewind(lengths)

    def reorder(self, index: Tensor) -> None:
        """Reorders as `LatentCache.reorder`; the memory is another one then."""
        super().reorder(index)
        with torch.inference_mode(False):  # as in `__init__`
            self._device_lengths = self._device_lengths.index_select(0, index.to(self.device))

    def update_states(self, states: Tensor, layer_idx: int) -> Tensor:
        """Appends as `LatentCache.update_states` and returns all slots; inside of `append` and without a gradient.

        Raises:
            ValueError: a shape or the layer does not fit, or a gradient is needed.
        """
        index = self._index(layer_idx)
        self._check_states(states)
        if states.requires_grad:
            raise ValueError("expected no gradient through a static cache, got states that require one")
        slots, buffer = self._place(index, states.shape[1]).slots, self._buffers[index]
        stored = pack(states, self.kv_lora_rank, self.scale_format) if self.format == "fp8" else states.to(buffer.dtype)
        rows = torch.arange(self.batch_size, device=self.device)[:, None]
        # Tokens beyond the capacity: see the class.
        buffer[rows, slots.clamp(max=self.capacity - 1)] = stored
        return buffer

    def update_indexer(self, keys: Tensor, layer_idx: int) -> Tensor:
        """Appends as `LatentCache.update_indexer` and returns all slots; inside of `append`."""
        return super().update_indexer(keys, layer_idx)

    def _store_index_keys(self, buffer: Tensor, keys: Tensor, place: _Append) -> Tensor:
        rows = torch.arange(self.batch_size, device=self.device)[:, None]
        buffer[rows, place.slots.clamp(max=self.capacity - 1)] = keys  # beyond the capacity: see the class
        return buffer

    def release(self, capacity: int) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Returns the buffers as `LatentCache.release`."""
        buffers = super().release(capacity)
        self._device_lengths.zero_()
        return buffers

    def _place(self, index: int, tokens: int) -> _Append:
        if self._slots is None:
            raise ValueError("expected a call within `append` for a static cache")
        return _Append((self.capacity,) * self.batch_size, self._slots, None)

    def _restore(self, lengths: list[tuple[int, ...]]) -> None:
        self._device_lengths.copy_(torch.tensor(lengths[0], device=self.device))
