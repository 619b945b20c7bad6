"""Operands of the GEMMs in FP8 training: in high precision, or FP8 values with their scales."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_kernels import quantize_both, quantize_grouped_transposed, quantize_rows, quantize_transposed

__all__ = ["Operand", "Quantized", "as_quantized", "flat", "input_codes", "operand", "quantize"]


class Quantized(NamedTuple):
    """FP8 values and their scales."""

    codes: Tensor
    scale: Tensor


Operand = Tensor | Quantized


def flat(operand: Operand | None) -> tuple[Tensor | None, Tensor | None]:
    """Returns an operand as the two tensors that autograd can pass and save; no scale for one in high precision."""
    return operand if isinstance(operand, Quantized) else (operand, None)


def operand(values: Tensor | None, scale: Tensor | None) -> Operand | None:
    """Returns the operand that `flat` took apart."""
    return values if values is None or scale is None else Quantized(values, scale)


def as_quantized(operand: Operand | None) -> Quantized:
    """Returns an operand that must be in FP8."""
    assert isinstance(operand, Quantized)
    return operand


def quantize(
    x: Tensor, ends: Tensor | None, scale_format: str | None, *, rows: bool, columns: bool
) -> tuple[Quantized | None, Quantized | None]:
    """Quantizes `x` [M, K] in groups along its rows, and in groups of tokens; with `ends` [E], each expert's."""
    if ends is None and rows and columns:
        codes, scale, codes_t, scale_t = quantize_both(x, scale_format)
        return Quantized(codes, scale), Quantized(codes_t, scale_t)
    along_rows = Quantized(*quantize_rows(x, scale_format)) if rows else None
    if not columns:
        return along_rows, None
    if ends is None:
        return along_rows, Quantized(*quantize_transposed(x, scale_format))
    return along_rows, Quantized(*quantize_grouped_transposed(x, ends, scale_format))


class _LastInput(NamedTuple):
    """The input that was quantized last; its version counts changes in place."""

    x: weakref.ref[Tensor]
    version: int
    how: tuple[str | None, bool, bool]
    result: tuple[Quantized | None, Quantized | None]


_last: _LastInput | None = None


def input_codes(
    x: Tensor, ends: Tensor | None, scale_format: str | None, *, rows: bool, columns: bool
) -> tuple[Quantized | None, Quantized | None]:
    """Returns `quantize` of an input [..., K], once for all layers that read the same tensor one after the other.

    An MLP's gate and up, and attention's first two projections, share their input.
    """
    global _last
    x_rows = x.detach().reshape(x.shape[:-1].numel(), x.shape[-1])
    # Compiled code cannot tell tensors apart; inference tensors have no version.
    if ends is not None or torch.compiler.is_compiling() or x.is_inference() or not (rows or columns):
        return quantize(x_rows, ends, scale_format, rows=rows, columns=columns)
    how, last = (scale_format, rows, columns), _last
    if last is not None and last.x() is x and (last.version, last.how) == (x._version, how):
        return last.result
    result = quantize(x_rows, None, scale_format, rows=rows, columns=columns)
    _last = _LastInput(weakref.ref(x, _forget), x._version, how, result)
    return result


def _forget(x: weakref.ref[Tensor]) -> None:
    """Frees the result when its input is gone."""
    global _last
    if _last is not None and _last.x is x:
        _last = None
