"""Triton's CPU interpreter, made numerically right for bfloat16 and FP8.

`TRITON_INTERPRET=1` runs kernels in Python, which tests their logic without a GPU. But Triton 3.6 to 3.9 keep bfloat16
as uint16 and FP8 as uint8 and compute on those integers: a bfloat16 `tl.dot`, sum or comparison works on bit patterns,
float32 -> bfloat16 truncates, float32 -> e4m3 loses the carry of the mantissa, does not saturate and has no NaN.

`corrected_interpreter` replaces these operations by those of the hardware: operands are widened exactly to float32, the
operation runs there, and its result is rounded once, to nearest even; FP8 saturates. Differences from a GPU remain:
sums have another order, `tl.dot` of float32 is not TF32, and no compiler fuses products into sums.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["InterpreterChangedError", "corrected_interpreter", "interprets"]

# Triton's name of a type that the interpreter keeps as an integer -> torch's, and the value at which a cast saturates.
_NARROW = {
    "bf16": (torch.bfloat16, None),
    "fp8e4nv": (torch.float8_e4m3fn, 448.0),
    "fp8e5": (torch.float8_e5m2, 57344.0),
}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# The internals that are replaced, and the parameters they must have. All operations pass through them: `tl.maximum`,
# say, is `binary_op` with numpy's maximum.
_REPLACED = {
    "InterpreterBuilder": {
        "binary_op": "lhs rhs op",
        "cast_impl": "src dst_type",
        "create_clampf": "arg lo hi propagate_nans",
        "create_dot": "a b d input_precision max_num_imprecise_acc",
        "create_fma": "x y z",
        "create_maxnumf": "lhs rhs",
        "create_minnumf": "lhs rhs",
        "ternary_op": "lhs rhs other op",
        "unary_op": "arg op",
    },
    "ReduceOps": {"min_max": "input val_reduce_op idx_reduce_op", "sum": "input"},
    "ScanOps": {"cumprod": "input", "cumsum": "input"},
}
_CONVERT_PARAMETERS = "input input_dtype output_dtype rounding_mode"


class InterpreterChangedError(RuntimeError):
    """The interpreter of this version of Triton has other internals than those that are corrected here."""


def interprets() -> bool:
    """Tells if kernels whose modules are imported from now on run in the interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@contextmanager
def corrected_interpreter() -> Iterator[None]:
    """Makes interpreted kernels that run inside the block compute bfloat16 and FP8 as a GPU does.

    The kernels' modules must be imported with TRITON_INTERPRET=1 in the environment. Triton itself may have been
    imported without it, by transformers for instance: its library functions (`tl.max`) are interpreted all the same.

    Raises:
        ImportError: triton is not installed.
        InterpreterChangedError: this version of Triton has to be looked at first.
    """
    module = importlib.import_module("triton.runtime.interpreter")
    library_function = importlib.import_module("triton.runtime.jit").JITFunction
    _check_internals(module)
    correct = _Corrections(module)
    replacements: list[tuple[Any, str, Callable]] = [
        (module, "_convert_float", correct.convert_float),
        (
            library_function,
            "__call__",
            lambda self, *args, **kwargs: module.InterpretedFunction(self.fn)(*args, **kwargs),
        ),
    ]
    for owner, names in _REPLACED.items():
        cls = getattr(module, owner)
        replacements += [(cls, name, _method(getattr(cls, name), getattr(correct, name))) for name in names]
    if not hasattr(module.InterpreterBuilder, "get_bf16"):  # Triton 3.6: `tl.full` of bfloat16
        replacements.append((module.InterpreterBuilder, "get_bf16", correct.get_bf16))
    originals = [(owner, name, getattr(owner, name, None)) for owner, name, _ in replacements]
    try:
        for owner, name, replacement in replacements:
            setattr(owner, name, replacement)
        yield
    finally:
        for owner, name, original in originals:
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


def _method(original: Callable, correction: Callable) -> Callable:
    """Returns a method that passes the original, bound, to its correction."""

    @functools.wraps(original)
    def method(self, *args, **kwargs):
        return correction(functools.partial(original, self), *args, **kwargs)

    return method


def _check_internals(module: Any) -> None:
    expected = {"_convert_float": (module, _CONVERT_PARAMETERS)}
    for owner, methods in _REPLACED.items():
        cls = getattr(module, owner, None)
        expected |= {f"{owner}.{name}": (cls, f"self {parameters}") for name, parameters in methods.items()}
    for name, (owner, parameters) in expected.items():
        function = getattr(owner, name.rpartition(".")[2], None)
        actual = " ".join(inspect.signature(function).parameters) if callable(function) else "nothing"
        if actual != parameters:
            version = importlib.import_module("triton").__version__
            raise InterpreterChangedError(
                f"expected triton.runtime.interpreter.{name} with parameters ({parameters}), got ({actual}) in Triton "
                f"{version}: read what changed, then adapt this module"
            )


class _Corrections:
    """Each method named as one of the interpreter's does its work; `original` is that one, bound."""

    def __init__(self, module: Any):
        self.module, self.np, self.handle = module, module.np, module.TensorHandle
        self.language = module.tl
        self.convert_original = module._convert_float

    # conversions

    def convert_float(self, input, input_dtype, output_dtype, rounding_mode):
        """numpy data of one type -> unsigned integers with the bits of another."""
        toward_zero = rounding_mode == self.module._ir.ROUNDING_MODE.RTZ
        if toward_zero or not {input_dtype.name, output_dtype.name} & set(_NARROW):
            return self.convert_original(input, input_dtype, output_dtype, rounding_mode)
        values = self._to_torch(input, input_dtype)
        if output_dtype.name in _NARROW:
            dtype, largest = _NARROW[output_dtype.name]
            if largest is not None:  # the hardware's conversions to FP8 saturate, infinities too, and have one NaN
                values = values.clamp(-largest, largest).masked_fill(values.isnan(), torch.nan)
        else:
            dtype = {16: torch.float16, 32: torch.float32, 64: torch.float64}[output_dtype.primitive_bitwidth]
        bits = values.to(dtype).view(_INTEGERS[dtype.itemsize]).numpy()
        return bits.view(f"uint{8 * dtype.itemsize}").reshape(input.shape)

    def _to_torch(self, data, source) -> torch.Tensor:
        copied = torch.from_numpy(self.np.array(data, order="C"))  # broadcast views are read-only
        if source.name in _NARROW:
            copied = copied.view(_INTEGERS[copied.element_size()]).view(_NARROW[source.name][0])
        return copied.float()

    def wide(self, handle):
        """The handle with float32 numbers in place of narrow ones; any other unchanged."""
        if handle.dtype.scalar.name not in _NARROW:
            return handle
        bits = self.convert_float(handle.data, handle.dtype.scalar, self.language.float32, None)
        return self.handle(bits.view("float32"), self.language.float32)

    def narrow(self, handle, dtype):
        """A float32 handle rounded to `dtype`; what a comparison gave stays what it is."""
        if handle.data.dtype == bool:
            return self.handle(handle.data, self.language.int1)
        data = self.np.asarray(handle.data, dtype="float32")
        return self.handle(self.convert_float(data, self.language.float32, dtype, None), dtype)

    def cast_impl(self, original, src, dst_type):
        target = dst_type.scalar
        if not {src.dtype.scalar.name, target.name} & set(_NARROW):
            return original(src, dst_type)
        source = self.wide(src)
        return self.narrow(source, target) if target.name in _NARROW else original(source, dst_type)

    @staticmethod
    def get_bf16(builder, value):
        return builder.create_fp_trunc(builder.get_fp32(value), builder.get_bf16_ty())

    # arithmetic

    def _in_float32(self, original, dtype, operands, *rest):
        if dtype.scalar.name not in _NARROW:
            return original(*operands, *rest)
        return self.narrow(original(*map(self.wide, operands), *rest), dtype.scalar)

    def unary_op(self, original, arg, op):
        return self._in_float32(original, arg.dtype, [arg], op)

    def binary_op(self, original, lhs, rhs, op):
        return self._in_float32(original, lhs.dtype, [lhs, rhs], op)

    def ternary_op(self, original, lhs, rhs, other, op):
        if op is self.np.where:  # moves bits only
            return original(lhs, rhs, other, op)
        return self._in_float32(original, other.dtype, [lhs, rhs, other], op)

    # Unlike a GPU, Triton 3.6 lets a NaN win over a number here.

    def create_maxnumf(self, original, lhs, rhs):
        return original.args[0].binary_op(lhs, rhs, self.np.fmax)

    def create_minnumf(self, original, lhs, rhs):
        return original.args[0].binary_op(lhs, rhs, self.np.fmin)

    def create_clampf(self, original, arg, lo, hi, propagate_nans):
        if propagate_nans != self.module._ir.PROPAGATE_NAN.NONE:
            return original(arg, lo, hi, propagate_nans)
        builder = original.args[0]
        return builder.create_minnumf(builder.create_maxnumf(arg, lo), hi)

    def create_fma(self, original, x, y, z):
        if z.data.dtype == self.np.float32 and not hasattr(self.module._interpreter, "fma_fp32"):
            return self._fused(x, y, z)
        return self._in_float32(original, z.dtype, [x, y, z])

    def _fused(self, x, y, z):
        """float32 x * y + z, rounded once. Triton 3.6 rounds the product as well.

        In float64 the product is exact and the sum is not; rounded to odd, it has what the last rounding must know.
        """
        product, addend = x.data.astype("float64") * y.data, z.data.astype("float64")
        total = product + addend
        part = total - product
        error = (product - (total - part)) + (addend - part)
        even = total.view("int64") & 1 == 0
        nudge = self.np.isfinite(total) & (error != 0) & even
        total = self.np.where(nudge, self.np.nextafter(total, self.np.copysign(self.np.inf, error)), total)
        return self.handle(total.astype("float32"), z.dtype.scalar)

    def create_dot(self, original, a, b, d, input_precision, max_num_imprecise_acc):
        return original(self.wide(a), self.wide(b), d, input_precision, max_num_imprecise_acc)

    # reductions and scans

    def _reduce(self, original, input, *args, **kwargs):
        tensor = input[0] if isinstance(input, tuple) else input
        dtype = tensor.dtype
        if dtype.name not in _NARROW:
            return original(input, *args, **kwargs)
        results = original(self._retyped(tensor, self.wide(tensor.handle)), *args, **kwargs)
        if not isinstance(results, (list, tuple)):
            return self._retyped(results, self.narrow(results.handle, dtype))
        # A minimum or maximum may come with its index.
        back = [self._retyped(r, self.narrow(r.handle, dtype)) if r.dtype.is_floating() else r for r in results]
        return type(results)(back)

    min_max = sum = cumprod = cumsum = _reduce

    def _retyped(self, tensor, handle):
        dtype = handle.dtype.scalar
        shape = list(tensor.shape)
        return self.language.core.tensor(handle, self.language.block_type(dtype, shape) if shape else dtype)
