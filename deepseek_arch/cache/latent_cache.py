"""Latent cache: per token and layer, the normed key-value latent and the rotated shared key, nothing per head.

With `format="fp8"` the latent is stored as e4m3 values with a float32 scale for each 128 of them, the rotated key as
bfloat16 (TRAPS E10): 656 bytes a token and layer for V3 instead of 1152. Attention then reads the stored bytes, also of
the new tokens, so that the result does not depend on how a prompt was cut into chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import index as as_index
from typing import Any

import torch
from torch import Tensor

from deepseek_kernels.attention.latent_write import latent_write
from deepseek_kernels.attention.packed_latents import pack, packed_bytes, unpack

from ..config.argument_types import check_types, shown
from ..layers.rope import Rotation
from .index_keys import IndexKeys

__all__ = ["LatentCache", "key_mask_for_slots", "spans_up_to"]

_GROWTH = 1.5
_STEP = 64  # capacities are multiples of this
_LARGEST = 2**31 - 1


@check_types
class LatentCache:
    """Cache of latent attention for a batch whose rows may have different lengths.

    Token i of a row is always in slot i: padding is never stored, so a slot is a position, also in rows that are padded
    or rewound differently. Each layer has one buffer [B, capacity, kv_lora_rank +
    qk_rope_head_dim] (576 values a token for V3), or [B, capacity, bytes] uint8 with `format="fp8"`, which grows by
    half when full; slots beyond a row's length are zeros.

    Args:
        num_layers: decoder layers that write to it.
        batch_size: rows, B.
        kv_lora_rank, qk_rope_head_dim: widths of the latent and of the shared key, C and R.
        capacity: slots to allocate at first (default: what the first tokens need).
        first_layer: the layer index that maps to the first buffer.
        format: None to store values of `dtype`, "fp8" to store bytes in the format of
            `deepseek_kernels.attention.packed_latents`, through which no gradient passes.
        index_head_dim: width of the indexer's keys of a model with sparse attention, or None for a model without.
        index_layers: layers with an indexer, numbered as by `layer_idx`; default all.
        scale_format: None for float32 scales of FP8 latents, "ue8m0" for powers of two; of `update_states` alone.
        index_format: of the indexer's keys, None or "fp8"; default `format`.
        dtype: of the results of `update` and `split`.

    Raises:
        ValueError: a size is less than 1, or a format is unknown.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        kv_lora_rank: int,
        qk_rope_head_dim: int,
        *,
        capacity: int | None = None,
        first_layer: int = 0,
        format: str | None = None,
        scale_format: str | None = None,
        index_head_dim: int | None = None,
        index_layers: Sequence[int] | None = None,
        index_format: str | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = {"num_layers": num_layers, "batch_size": batch_size, "kv_lora_rank": kv_lora_rank}
        sizes |= {"qk_rope_head_dim": qk_rope_head_dim, "capacity": capacity or 1}
        for name, value in {**sizes, "index_head_dim": 1 if index_head_dim is None else index_head_dim}.items():
            if value < 1:
                raise ValueError(f"expected {name} >= 1, got {value}")
            if value > _LARGEST:
                raise ValueError(f"expected {name} <= {_LARGEST}, got {shown(value)}")
        for name, given in (("format", format), ("index_format", index_format)):
            if given not in (None, "fp8"):
                raise ValueError(f"expected {name} None or 'fp8', got {given!r}")
        if scale_format not in (None, "ue8m0"):
            raise ValueError(f"expected scale_format None or 'ue8m0', got {scale_format!r}")
        self.format, self.scale_format = format, scale_format
        self.num_layers, self.batch_size, self.first_layer = num_layers, batch_size, first_layer
        self.kv_lora_rank, self.qk_rope_head_dim = kv_lora_rank, qk_rope_head_dim
        self.device, self.dtype = torch.device(device or "cpu"), dtype or torch.get_default_dtype()
        self._buffers = [self._new_buffer(capacity or 0) for _ in range(num_layers)]
        self._index_keys: IndexKeys | None = None
        if index_head_dim is not None:
            layers = range(num_layers) if index_layers is None else [self._index(layer) for layer in index_layers]
            arguments = (index_format or format, batch_size, capacity or 0, self.device, self.dtype)
            self._index_keys = IndexKeys(layers, index_head_dim, *arguments)
        self._lengths: list[tuple[int, ...]] = [(0,) * batch_size] * num_layers
        self._pending: _Append | None = None

    # ---------------------------------------------------------------- state

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens in the cache, per row."""
        return self._lengths[0]

    @property
    def max_length(self) -> int:
        return max(self.lengths)

    @property
    def capacity(self) -> int:
        """Slots allocated per row."""
        return self._buffers[0].shape[1]

    @property
    def index_format(self) -> str | None:
        """Format of the indexer's keys, None without any."""
        return None if self._index_keys is None else self._index_keys.format

    @property
    def index_head_dim(self) -> int | None:
        """Width of the indexer's keys, None without any."""
        return None if self._index_keys is None else self._index_keys.width

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        latents = sum(buffer.numel() * buffer.element_size() for buffer in self._buffers)
        return latents + (0 if self._index_keys is None else self._index_keys.nbytes)

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token takes over all layers."""
        buffer = self._buffers[0]
        latents = self.num_layers * buffer.shape[2] * buffer.element_size()
        return latents + (0 if self._index_keys is None else self._index_keys.bytes_per_token)

    def __repr__(self) -> str:
        return (
            f"LatentCache(layers={self.num_layers}, lengths={list(self.lengths)}, capacity={self.capacity}, "
            f"{self.bytes_per_token} bytes a token, {self.format or self.dtype}, {self.device})"
        )

    # ---------------------------------------------------------------- writing

    @contextmanager
    def append(self, num_tokens: int, valid: Tensor | None = None) -> Iterator[Tensor]:
        """Reserves slots for one forward pass; every layer's `update` inside the block writes to them.

        Args:
            num_tokens: T, new tokens per row.
            valid: bool [B, T]; tokens that are False (padding) are not stored.

        Yields:
            int64 [B, T], the slot of each token, which is its position. A token that is not stored gets the slot of
            the last one before it, or 0.

        On an exception inside the block every row goes back to its former length.
        """
        before = list(self._lengths)
        start = self.lengths
        lengths = torch.tensor(start, device=self.device)
        if valid is not None and bool(valid.all()):
            valid = None
        if valid is None:
            slots = lengths[:, None]
            if num_tokens > 1:
                slots = slots + torch.arange(num_tokens, device=self.device)
            after = tuple(length + num_tokens for length in start)
        else:
            if valid.shape != (self.batch_size, num_tokens):
                raise ValueError(f"expected valid [{self.batch_size}, {num_tokens}], got {list(valid.shape)}")
            valid = valid.to(self.device)
            slots = (lengths[:, None] + valid.cumsum(-1) - 1).clamp(min=0)
            after = tuple((lengths + valid.sum(-1)).tolist())
        self._pending = _Append(after, slots, valid)
        try:
            yield slots
        except BaseException:
            self._pending = None
            self._restore(before)
            raise
        finally:
            self._pending = None

    def update(self, latent: Tensor, rotated_key: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Appends new tokens to a layer and returns all of its tokens.

        Args:
            latent: [B, 1, T, C], after its norm.
            rotated_key: [B, 1, T, R], after its rotation.
            layer_idx: `first_layer` for the first buffer.

        Returns:
            latents [B, 1, S, C] and rotated keys [B, 1, S, R], as `split`; S is the longest row's length.
        """
        states = torch.cat((latent, rotated_key), dim=-1)[:, 0]
        return self.split(self.update_states(states, layer_idx)[:, None])

    def split(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Splits the result of `update_states` into latents [..., C] and keys [..., R]: views, or dequantized."""
        if self.format == "fp8":
            return unpack(states, self.kv_lora_rank, self.dtype)
        latents, keys = states.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        return latents, keys

    def update_states(self, states: Tensor, layer_idx: int) -> Tensor:
        """Appends latents and rotated keys side by side: [B, T, C + R] -> [B, S, C + R], or the bytes stored.

        Raises:
            ValueError: a shape or the layer does not fit, or FP8 would have to carry a gradient.
        """
        index = self._index(layer_idx)
        self._check_states(states)
        before, place = self._lengths[index], self._place(index, states.shape[1])
        buffer = self._reserve(index, place.longest)
        stored = pack(states, self.kv_lora_rank, self.scale_format) if self.format == "fp8" else states.to(buffer.dtype)
        self._lengths[index] = place.lengths
        if len(set(before)) == 1 and place.valid is None:
            start = before[0]
            if stored.requires_grad:  # the buffer takes a copy; the gradient flows through the returned tensor
                buffer[:, start : place.longest] = stored.detach()
                return torch.cat((buffer[:, :start], stored), dim=1)
            buffer[:, start : place.longest] = stored
            return buffer[:, : place.longest]
        slots, valid = place.slots, place.valid
        rows = torch.arange(self.batch_size, device=self.device)[:, None].expand_as(slots)
        if valid is not None:
            rows, slots, stored = rows[valid], slots[valid], stored[valid]
        buffer[rows, slots] = stored.detach()
        tokens = buffer[:, : place.longest]
        return tokens.index_put((rows, slots), stored) if stored.requires_grad else tokens

    def write(self, kv: Tensor, weight: Tensor, eps: float, rope: Rotation, layer_idx: int) -> Tensor:
        """Normalizes latents, rotates keys and appends both, as `update_states`, in one pass.

        Args:
            kv: [B, T, C + R], latents and keys side by side, without a gradient.
            weight, eps: of the latents' norm.
            rope: cosines and sines [B or 1, T, R / 2].

        Returns:
            [B, S, C + R] or the bytes stored, as `update_states`.

        Raises:
            ValueError: a shape or the layer does not fit.
        """
        index = self._index(layer_idx)
        self._check_states(kv)
        place = self._place(index, kv.shape[1])
        buffer = self._reserve(index, place.longest)
        cos, sin = rope  # a `Rotation`, or a plain tuple
        latent_write(kv, weight, eps, cos, sin, buffer, place.targets)
        self._lengths[index] = place.lengths
        return buffer[:, : place.longest]

    def update_indexer(self, keys: Tensor, layer_idx: int) -> Tensor:
        """Appends the indexer's keys of the new tokens, before their latents, and returns those of all tokens.

        Args:
            keys: [B, T, D] without a gradient, or with `index_format="fp8"` uint8 [B, T, bytes].

        Returns:
            [B, S, D] or [B, S, bytes]; S is the longest row's length with the new tokens.

        Raises:
            ValueError: the cache or the layer has no such keys, or a shape or the dtype does not fit.
        """
        index, held = self._index(layer_idx), self._index_keys
        if held is None:
            raise ValueError("expected a cache with index_head_dim, got one without room for an indexer's keys")
        held.check(keys, index)
        place = self._place(index, keys.shape[1])
        buffer = held.buffer(index, self._grown(held.buffer(index, 0).shape[1], place.longest))
        return self._store_index_keys(buffer, keys.to(buffer.dtype), place)

    def _store_index_keys(self, buffer: Tensor, keys: Tensor, place: _Append) -> Tensor:
        slots, valid = place.slots, place.valid
        rows = torch.arange(self.batch_size, device=self.device)[:, None].expand_as(slots)
        if valid is not None:
            rows, slots, keys = rows[valid], slots[valid], keys[valid]
        buffer[rows, slots] = keys
        return buffer[:, : place.longest]

    def spans(self, slots: Tensor, valid: Tensor | None = None) -> Tensor | None:
        """Returns the attention mask of the tokens that `append` reserves slots for, inside its block."""
        return key_mask_for_slots(slots, self.lengths, valid)

    # ---------------------------------------------------------------- rewinding and reordering

    def rewind(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Drops the tokens of each row beyond `lengths` (one number, or one per row)."""
        target = _row_lengths(lengths, self.batch_size)
        if len(target) != self.batch_size:
            raise ValueError(f"expected one length or {self.batch_size}, got {len(target)}")
        for length, present in zip(target, self.lengths, strict=True):
            if not 0 <= length <= present:
                raise ValueError(f"expected lengths between 0 and those held {list(self.lengths)}, got {list(target)}")
        self._restore([target] * self.num_layers)

    def reset(self) -> None:
        """Empties every row; the memory stays."""
        self.rewind(0)

    @check_types
    def reorder(self, index: Tensor) -> None:
        """Makes row i a copy of row `index[i]` (beam search); the batch may change its size."""
        readable = index.layout == torch.strided and not index.is_meta
        if index.ndim != 1 or index.dtype not in (torch.int64, torch.int32) or not readable:
            kind = f"{index.dtype} {list(index.shape)}, {index.layout} on {index.device}"
            raise ValueError(f"expected integer row indices [rows], dense and with values, got {kind}")
        index = index.to(self.device)
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.batch_size:
            raise ValueError(f"expected row indices between 0 and {self.batch_size - 1}, got {index.tolist()}")
        order = index.tolist()
        with torch.inference_mode(False):  # as in `_new_buffer`
            self._buffers = [buffer.index_select(0, index) for buffer in self._buffers]
        if self._index_keys is not None:
            self._index_keys.reorder(index)
        self._lengths = [tuple(lengths[row] for row in order) for lengths in self._lengths]
        self.batch_size = len(order)

    def release(self, capacity: int) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Empties the cache and returns its buffers, [B, at least `capacity` slots, ...] each.

        Returns:
            those of the layers, and those of the indexer's keys by the layer's index in the cache.
        """
        buffers = [self._reserve(index, capacity) for index in range(self.num_layers)]
        index_buffers = {} if self._index_keys is None else self._index_keys.release(capacity)
        self._buffers = [self._new_buffer(0) for _ in buffers]
        self._lengths = [(0,) * self.batch_size] * self.num_layers
        return buffers, index_buffers

    # ---------------------------------------------------------------- internals

    def _new_buffer(self, capacity: int) -> Tensor:
        # Zeros, not empty: a masked slot still takes part in products, where 0 x NaN would be NaN.
        width, dtype = self.kv_lora_rank + self.qk_rope_head_dim, self.dtype
        if self.format == "fp8":
            width, dtype = packed_bytes(self.kv_lora_rank, self.qk_rope_head_dim), torch.uint8
        with torch.inference_mode(False):  # a cache filled under inference mode stays usable outside of it
            return torch.zeros(self.batch_size, capacity, width, device=self.device, dtype=dtype)

    def _reserve(self, index: int, needed: int) -> Tensor:
        buffer = self._buffers[index]
        if needed > buffer.shape[1]:
            grown = self._new_buffer(self._grown(buffer.shape[1], needed))
            grown[:, : buffer.shape[1]] = buffer
            self._buffers[index] = buffer = grown
        return buffer

    @staticmethod
    def _grown(capacity: int, needed: int) -> int:
        """Returns the capacity of a buffer that has to hold so many tokens."""
        if needed <= capacity:
            return capacity
        return -(-max(needed, int(capacity * _GROWTH)) // _STEP) * _STEP

    def _index(self, layer_idx: int) -> int:
        index = layer_idx - self.first_layer
        if not 0 <= index < self.num_layers:
            last = self.first_layer + self.num_layers - 1
            raise ValueError(f"expected layer_idx between {self.first_layer} and {last}, got {layer_idx}")
        return index

    def _check_states(self, states: Tensor) -> None:
        width = self.kv_lora_rank + self.qk_rope_head_dim
        if states.ndim != 3 or states.shape[0] != self.batch_size or states.shape[2] != width:
            raise ValueError(f"expected states [{self.batch_size}, T, {width}], got {list(states.shape)}")
        if self.format == "fp8" and states.requires_grad:
            raise ValueError(
                "expected no gradient through an FP8 cache, got states that require one: "
                "use torch.no_grad() or a cache without a format"
            )

    def _place(self, index: int, tokens: int) -> _Append:
        """Returns the slots of a layer's next tokens."""
        if self._pending is not None:
            return self._pending
        before = self._lengths[index]
        starts = torch.tensor(before, device=self.device)[:, None]
        slots = starts + torch.arange(tokens, device=self.device)
        return _Append(tuple(length + tokens for length in before), slots, None)

    def _restore(self, lengths: list[tuple[int, ...]]) -> None:
        """Sets the lengths of every layer, zeroing the slots that become free."""
        for index, (old, new) in enumerate(zip(self._lengths, lengths, strict=True)):
            for row, (before, after) in enumerate(zip(old, new, strict=True)):
                if after < before:
                    self._buffers[index][row, after:before] = 0
                    if self._index_keys is not None:
                        self._index_keys.clear(index, row, after, before)
        self._lengths = list(lengths)


def _row_lengths(lengths: int | Sequence[int] | Tensor, rows: int) -> tuple[int, ...]:
    """Returns one length for each row, given one for all or one for each."""
    if isinstance(lengths, Tensor) and (lengths.layout != torch.strided or lengths.is_meta):
        kind = f"{lengths.layout} on {lengths.device}"
        raise ValueError(f"expected lengths in a dense tensor with values, got one of layout {kind}")
    listed: Any = lengths.tolist() if hasattr(lengths, "tolist") else lengths  # also numpy's
    several = listed if isinstance(listed, list | tuple) else (listed,) * rows
    try:
        if isinstance(listed, bool) or any(isinstance(length, bool) for length in several):
            raise TypeError
        return tuple(as_index(length) for length in several)
    except TypeError:
        raise ValueError(f"expected an integer length, or a list of {rows}, got {shown(lengths)}") from None


class _Append:
    """The slots that one forward pass writes to.

    Attributes:
        lengths: of the rows afterwards.
        longest: the largest of them.
        slots: int64 [B, T], as `LatentCache.append` yields them.
        valid: bool [B, T], or None.
        targets: `slots`, but -1 for tokens that are not stored.
    """

    def __init__(self, lengths: tuple[int, ...], slots: Tensor, valid: Tensor | None) -> None:
        self.lengths, self.slots, self.valid = lengths, slots, valid
        self.longest = max(lengths)
        self.targets = slots if valid is None else slots.masked_fill(~valid, -1)


def key_mask_for_slots(slots: Tensor, lengths: tuple[int, ...], valid: Tensor | None) -> Tensor | None:
    """Returns the mask of attention to a cache whose token i lies in slot i: up to each query's own slot.

    Args:
        slots: int64 [B, T] of this call's tokens.
        lengths: tokens of the rows before this call.
        valid: bool [B, T]; None, or all True, where no token is padding.

    Returns:
        Spans [B, T, 2], or None where all rows are equally long and nothing is padding.
    """
    if len(set(lengths)) == 1 and (valid is None or bool(valid.all())):
        return None
    return spans_up_to(slots)


def spans_up_to(slots: Tensor) -> Tensor:
    """Returns spans [B, T, 2] of all slots up to each query's own, int64 [B, T]."""
    return torch.stack((torch.zeros_like(slots), slots + 1), dim=-1).int()
