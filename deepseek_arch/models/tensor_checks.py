"""Checks of the tensors that users pass: dense, with values, integers of any type and in range, masks of 0 and 1.

Values are looked at on CPUs alone: elsewhere a look would wait for the device, and within compiled code it cannot be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config.argument_types import as_integer, shown

__all__ = [
    "as_int64",
    "check_dense",
    "check_kept",
    "check_labels",
    "check_multiplicative",
    "check_token_ids",
    "is_readable",
    "nonzero",
]

_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # types that PyTorch stores, and hardly computes with
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, *_UNSIGNED)


def check_dense(name: str, value: object, beside: Tensor | None = None) -> None:
    """Raises ValueError unless a value is a tensor with memory for each element: no sparse and no nested one.

    Args:
        beside: a tensor that it is used with; on device meta a value has no memory, unless that one has none either.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"expected {name} to be a tensor, got {shown(value)}")
    if value.layout != torch.strided or value.is_nested:
        raise ValueError(f"expected {name} to be a dense tensor, got one of layout {value.layout}")
    if beside is not None and value.is_meta and not beside.is_meta:
        raise ValueError(f"expected {name} with values, for a model on {beside.device}, got a tensor on device meta")


def as_int64(name: str, value: Tensor) -> Tensor:
    """Returns a tensor of integers as int64.

    Raises:
        ValueError: it holds floating-point or complex numbers or bools, or numbers that int64 does not hold.
    """
    if value.dtype == torch.int64:
        return value
    if value.dtype not in _INTEGERS:
        raise ValueError(f"expected integer {name}, got {value.dtype}")
    wide = value.long()
    if value.dtype == torch.uint64 and is_readable(wide) and bool((wide < 0).any()):
        raise ValueError(f"expected {name} below 2**63, got {int(wide[wide < 0][0]) + 2**64}")
    return wide


def check_token_ids(input_ids: Tensor, vocab_size: int, beside: Tensor) -> Tensor:
    """Returns token ids [B, T] as int64, or as the int32 that they are.

    Raises:
        ValueError: they are no integers [B, T], or one lies outside the vocabulary.
    """
    check_dense("input_ids", input_ids, beside)
    ids = input_ids if input_ids.dtype == torch.int32 else as_int64("input_ids", input_ids)
    if ids.ndim != 2 or not ids.shape[1]:
        raise ValueError(f"expected integer input_ids [B, T] with T >= 1, got {list(ids.shape)} {input_ids.dtype}")
    if is_readable(ids) and ids.numel():
        low, high = (int(v) for v in torch.aminmax(ids))
        if low < 0 or high >= vocab_size:
            raise ValueError(f"expected token ids between 0 and {vocab_size - 1}, got {low if low < 0 else high}")
    return ids


def check_labels(labels: Tensor, tokens: object, vocab_size: int, ignored: int = -100) -> Tensor:
    """Returns labels as int64.

    Args:
        tokens: ids or embeddings [B, T, ...] beside them, if there are any.
        ignored: stands for no label.

    Raises:
        ValueError: they are no integers [B, T], or one is neither `ignored` nor in the vocabulary.
    """
    check_dense("labels", labels, tokens if isinstance(tokens, Tensor) else None)
    labels = as_int64("labels", labels)  # before any comparison: -100 is no uint8
    if isinstance(tokens, Tensor) and labels.shape != tokens.shape[:2]:
        raise ValueError(f"expected labels {list(tokens.shape[:2])}, got {list(labels.shape)}")
    if is_readable(labels):
        wrong = labels[(labels != ignored) & ((labels < 0) | (labels >= vocab_size))]
        if wrong.numel():
            raise ValueError(f"expected labels of {ignored} or between 0 and {vocab_size - 1}, got {int(wrong[0])}")
    return labels


def check_kept(logits_to_keep: int | Tensor, tokens: Any) -> int | Tensor:
    """Returns `logits_to_keep` as a number >= 0, or as an index tensor of positions among `tokens`."""
    if isinstance(logits_to_keep, Tensor):
        batch = tokens if isinstance(tokens, Tensor) and tokens.ndim > 1 else None  # `embed` refuses others
        check_dense("logits_to_keep", logits_to_keep, batch)
        if logits_to_keep.ndim not in (1, 2):
            raise ValueError(
                "expected logits_to_keep to be a number or integer positions [n] or [B, n], got "
                f"{logits_to_keep.dtype} {list(logits_to_keep.shape)}"
            )
        positions = as_int64("logits_to_keep", logits_to_keep)
        if batch is not None:
            _check_places(positions, *batch.shape[:2])
        return positions
    if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, int | torch.SymInt):
        logits_to_keep = as_integer("logits_to_keep", logits_to_keep)
    if logits_to_keep < 0:
        raise ValueError(f"expected logits_to_keep >= 0, got {shown(logits_to_keep)}")
    return logits_to_keep


def _check_places(positions: Tensor, rows: int, tokens: int) -> None:
    if positions.ndim == 2 and positions.shape[0] != rows:
        raise ValueError(f"expected logits_to_keep [{rows}, n], got {list(positions.shape)}")
    if positions.numel() and is_readable(positions):
        low, high = (int(v) for v in torch.aminmax(positions))
        if high >= tokens or low < (0 if positions.ndim == 2 else -tokens):
            raise ValueError(
                f"expected logits_to_keep to be positions below {tokens}, got {high if high >= tokens else low}"
            )


def check_multiplicative(mask: Tensor) -> None:
    """Raises ValueError unless a floating-point attention mask has ones and zeros only."""
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            "expected attention_mask of 1 for tokens and 0 for padding, got other values (an additive mask?)"
        )


def nonzero(mask: Tensor) -> Tensor:
    """Returns bool, True where a mask of any type is not zero."""
    return (mask.long() if mask.dtype in _UNSIGNED else mask) != 0


def is_readable(value: Tensor) -> bool:
    """Returns True if values can be looked at without waiting for a device, and outside of compilation."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()
