"""Types of arguments, checked where users pass them: a decorator that reads a function's annotations.

Python itself would fail later and elsewhere, or not at all: a numpy integer in a config that is saved as JSON, a float
that becomes an index, a string of digits. Nothing here imports PyTorch.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import math
import numbers
import operator
import os
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from .validation import DTYPES

__all__ = ["Size", "as_integer", "check_types", "shown"]

_T = TypeVar("_T", bound=Callable[..., Any])
_NUMBERS = {bool: "True or False", int: "an integer", float: "a finite number"}
_LARGEST = 2**31 - 1
Size = Annotated[int, "size"]  # of a dimension: from 1 to _LARGEST
_Check = Callable[[Any], Any]


class _Refused(Exception):
    """A value is not of a type; its text, if any, says why."""


def check_types(decorated: _T) -> _T:
    """Decorates a function, or a class for its constructor: every argument is what its annotation says.

    Integers may be numpy's, or anything else with `__index__`, and become Python's own; so do floating-point numbers,
    which must be finite. A bool is neither of the two. Paths are names that the file system can hold. Of containers
    the kind is checked, and not what they contain. What is annotated as `Any`, or not at all, is taken as it is.

    Raises:
        ValueError: (the decorated) arguments of other types, all of them named in one message.
    """
    if isinstance(decorated, type):
        decorated.__init__ = check_types(decorated.__init__)  # type: ignore[misc]
        return decorated

    @functools.wraps(decorated)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if _is_traced():
            return decorated(*args, **kwargs)
        signature, checks = _checks_of(decorated)
        bound = signature.bind(*args, **kwargs)  # a missing or unknown argument is Python's own TypeError
        problems = []
        for name, (what, alternatives) in checks.items():
            if name not in bound.arguments:
                continue
            value = bound.arguments[name]
            refused = ""
            for check in alternatives:
                try:
                    bound.arguments[name] = check(value)
                    break
                except _Refused as error:
                    refused = refused or str(error)
            else:
                problems.append(refused or f"expected {name} to be {what}, got {shown(value)}")
        if problems:
            raise ValueError("; ".join(problems))
        return decorated(*bound.args, **bound.kwargs)

    return typing.cast(_T, checked)


@functools.cache
def _checks_of(function: Callable[..., Any]) -> tuple[inspect.Signature, dict[str, tuple[str, list[_Check]]]]:
    """Returns a function's signature, and by argument what it is to be and the checks of which one must pass.

    Read at the first call: an annotation may name what its module imports below the function.
    """
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function, include_extras=True)
    parts = {name: _alternatives(hints[name]) for name in signature.parameters if name in hints}
    return signature, {
        name: (" or ".join(dict.fromkeys(what for what, _ in kinds)), [check for _, check in kinds])
        for name, kinds in parts.items()
        if kinds and signature.parameters[name].kind not in (inspect.Parameter.VAR_KEYWORD,)
    }


def _is_traced() -> bool:
    """Returns True while torch.compile or torch.export read the caller: they cannot read annotations."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_compiling()


def as_integer(name: str, value: object) -> int:
    """Returns an argument as Python's integer, or raises ValueError."""
    try:
        return _integer(value)
    except _Refused:
        raise ValueError(f"expected {name} to be an integer, got {shown(value)}") from None


def shown(value: object) -> str:
    """Returns a value as an error message shows it: on one line of bounded length, also for numbers of any size."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**50:
        return f"an integer of {value.bit_length()} bits"
    if type(value).__module__.partition(".")[0] == "torch":
        return type(value).__name__ if hasattr(value, "shape") or hasattr(value, "parameters") else repr(value)
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a value of a class of the user's
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


# ------------------------------------------------------------------ annotations


def _alternatives(annotation: Any) -> list[tuple[str, _Check]]:
    """Returns name and check of each type that an annotation allows; [] where it allows all."""
    union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    members = typing.get_args(annotation) if union else (annotation,)
    if any(not _is_checked(member) for member in members):
        return []
    kinds = [_kind(member) for member in members]
    if Path in members and str in members:  # one thing to a reader, who may pass either
        return [("a path that is not empty", _path), *([_kind(type(None))] if type(None) in members else [])]
    if any(_is_torch(member, "device") for member in members):
        return [("an available device", _device), *([_kind(type(None))] if type(None) in members else [])]
    return kinds


def _is_torch(member: Any, name: str) -> bool:
    return getattr(member, "__module__", "") == "torch" and getattr(member, "__name__", "") == name


def _is_checked(member: Any) -> bool:
    if typing.get_origin(member) is Annotated:
        return member == Size
    origin = typing.get_origin(member) or member
    return isinstance(origin, type) and origin not in (object, Any)


def _kind(member: Any) -> tuple[str, _Check]:
    if member == Size:
        return f"an integer from 1 to {_LARGEST}", _size
    origin = typing.get_origin(member) or member
    if origin is type(None):
        return "None", functools.partial(_instance, type(None))
    if origin in _NUMBERS:
        return _NUMBERS[origin], {bool: _bool, int: _integer, float: _real}[origin]
    if origin is collections.abc.Callable:
        return "a function", _callable
    if origin is str:
        return "a string", functools.partial(_instance, str)
    if _is_torch(origin, "dtype"):
        return f"one of {', '.join(DTYPES)} (torch.dtype)", _dtype
    if origin in (tuple, collections.abc.Sequence):
        return "a list or tuple", functools.partial(_container, (list, tuple))
    if issubclass(origin, collections.abc.Iterable) and origin.__module__ in ("collections.abc", "builtins"):
        return f"a {origin.__name__.lower()}", functools.partial(_container, origin)
    article = "an" if origin.__name__[0] in "AEIOUaeiou" else "a"
    return f"{article} {origin.__name__}", functools.partial(_instance, origin)


def _instance(kind: type | tuple[type, ...], value: Any) -> Any:
    if not isinstance(value, kind):
        raise _Refused
    return value


def _dtype(value: Any) -> Any:
    if type(value).__name__ != "dtype" or str(value).removeprefix("torch.") not in DTYPES or isinstance(value, str):
        raise _Refused
    return value


def _container(kind: type | tuple[type, ...], value: Any) -> Any:
    if isinstance(value, str | bytes | bytearray) or getattr(value, "ndim", 1) == 0:  # no length: a number of numpy's
        raise _Refused
    return _instance(kind, value)


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if type(value).__name__ in ("bool", "bool_") and type(value).__module__ == "numpy":
        return bool(value)
    raise _Refused


def _integer(value: Any) -> int:
    if isinstance(value, bool) or (hasattr(value, "dtype") and str(value.dtype).endswith(("bool", "bool_"))):
        raise _Refused
    try:
        return operator.index(value)
    except Exception:  # of a tensor there are several
        raise _Refused from None


def _size(value: Any) -> int:
    size = _integer(value)
    if not 1 <= size <= _LARGEST:
        raise _Refused
    return size


def _device(value: Any) -> Any:
    """Takes what torch.device takes, if there is such a device."""
    import torch  # whoever names a device has imported it

    if value is None or isinstance(value, bool):
        raise _Refused
    try:
        torch.empty(0, device=torch.device(value))
    except (RuntimeError, AssertionError, TypeError, ValueError, ImportError, AttributeError) as error:
        # ImportError is what PyTorch raises for the devices of packages that are not installed.
        reason = str(error).partition("\n")[0][:300].encode(errors="replace").decode()
        raise _Refused(f"expected an available device, got {shown(value)}: {reason}") from None
    return value


def _real(value: Any) -> float | int:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise _Refused
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise _Refused from None
    if not math.isfinite(number):
        raise _Refused
    return value if type(value) is int and abs(value) < 2**53 else number


def _callable(value: Any) -> Any:
    if not callable(value):
        raise _Refused
    return value


def _path(value: Any) -> Any:
    try:
        name = os.fspath(value)
        # An empty name would be the working directory: a variable that is not set, rather than what was meant.
        if not isinstance(name, str) or not name or "\0" in name:
            raise _Refused
        os.fsencode(name)
    except (TypeError, UnicodeEncodeError):
        raise _Refused from None
    return value
