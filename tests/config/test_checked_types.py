"""`check_types`: what each annotation takes, what it becomes, and how what is refused is named."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepseek_arch.config.argument_types import Size, check_types, shown


@check_types
def everything(
    count: int = 1,
    share: float = 0.5,
    flag: bool = False,
    size: Size | None = None,
    path: str | Path = "x",
    names: Iterable[str] | None = None,
    pair: tuple[int, int] = (1, 2),
    table: Mapping[str, int] | None = None,
    rate: float | Callable[[int], float] = 0.1,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    listed: Sequence[float] = (),
    tensor: torch.Tensor | None = None,
    anything: Any | None = None,
    unknown=None,
) -> dict[str, Any]:
    """Returns its arguments."""
    return dict(locals())


TAKEN = {
    "count": [(3, 3), (np.int64(3), 3), (torch.tensor(3), 3), (np.array(3), 3), (-(10**30), -(10**30))],
    "share": [(1, 1), (np.float32(0.5), 0.5), (np.int32(2), 2.0), (0.25, 0.25)],
    "flag": [(True, True), (np.bool_(False), False)],
    "size": [(None, None), (np.uint8(7), 7), (2**31 - 1, 2**31 - 1)],
    "path": [("a/b", "a/b"), (Path("a"), Path("a"))],
    "names": [(["a"], ["a"]), (None, None), ({"a"}, {"a"})],
    "pair": [([1, 2], [1, 2])],
    "table": [({"a": 1}, {"a": 1})],
    "rate": [(0.1, 0.1), (len, len)],
    "dtype": [(torch.float64, torch.float64)],
    "device": [("cpu", "cpu"), (torch.device("meta"), torch.device("meta"))],
    "anything": [(1j, 1j), ([], [])],
    "unknown": [(1j, 1j)],
}
REFUSED = {
    "count": [(1.0, "an integer, got 1.0"), (True, "True"), ("1", "'1'"), (None, "None"), (np.bool_(True), "True")],
    "share": [(float("nan"), "a finite number, got nan"), (10**400, "an integer of 1329 bits"), (True, "True")],
    "flag": [(1, "True or False, got 1"), ("yes", "'yes'"), (None, "None")],
    "size": [(0, "an integer from 1 to 2147483647 or None, got 0"), (2**31, "2147483648"), (-1, "-1"), (1.5, "1.5")],
    "path": [("", "a path that is not empty, got ''"), (b"x", "b'x'"), ("a\0b", "a"), ("\ud800", "got"), (3, "3")],
    "names": [("abc", "'abc'"), (np.array(1), "array"), (7, "7")],
    "pair": [("ab", "a list or tuple, got 'ab'"), ({1, 2}, "1, 2")],
    "table": [([("a", 1)], "a mapping or None")],
    "rate": [("fast", "a finite number or a function, got 'fast'"), (float("inf"), "inf")],
    "dtype": [("float32", "one of bfloat16, float16, float32, float64"), (torch.int8, "torch.int8")],
    "tensor": [([1], "a Tensor or None"), (np.ones(2), "array")],
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken_and_what_it_becomes(name):
    for given, expected in TAKEN[name]:
        got = everything(**{name: given})[name]
        assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name):
    for given, message in REFUSED[name]:
        with pytest.raises(ValueError, match=f"^expected {name} to be .*") as caught:
            everything(**{name: given})
        assert message in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("device", ["hpu:7", "nothing", "", 10**30, -5, 1.5, None, True, torch.float32])
def test_devices_that_are_not_there(device):
    with pytest.raises(ValueError, match=r"expected (an available device|device to be an available device), got"):
        everything(device=device)


def test_all_mistakes_come_in_one_message():
    with pytest.raises(ValueError, match=r"expected count .*; expected flag .*; expected path "):
        everything(count="1", flag=1, path=None)


def test_pythons_own_errors_stay():
    """Unknown and missing names are not values."""
    with pytest.raises(TypeError, match="unexpected keyword"):
        everything(other=1)


def test_signatures_and_classes():
    @check_types
    @dataclass(frozen=True)
    class Pair:
        first: int
        second: float = 1.0

    assert list(inspect.signature(everything).parameters)[:2] == ["count", "share"]
    assert everything.__doc__ == "Returns its arguments."
    assert list(inspect.signature(Pair).parameters) == ["first", "second"]
    assert Pair(np.int64(2), 3) == Pair(2, 3.0) and type(Pair(np.int64(2)).first) is int
    with pytest.raises(ValueError, match="expected first to be an integer, got 'x'"):
        Pair("x")


def test_values_are_shown_on_one_short_line():
    class Mute:
        def __repr__(self) -> str:
            raise RuntimeError

    assert shown("a\nb" * 1000).count("\n") == 0 and len(shown("x" * 10_000)) < 300
    assert shown(10**5000) == "an integer of 16610 bits" and shown(Mute()) == "a Mute"
    assert shown(torch.ones(3)) == "Tensor" and shown(torch.nn.Linear(2, 2)) == "Linear"
