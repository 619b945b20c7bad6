"""Graders: numbers, mathematics in a process of its own, multiple choice, text, and programs in a limited process."""

from __future__ import annotations

import json
import threading

import pytest

from deepseek_arch.r1.rewards import CodeLimits, grade, math_process, run_program
from deepseek_arch.r1.rewards.answers import grade_choice, grade_number, number_of


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), (" -3 ", -3), ("- 3", -3), ("\u22123", -3), ("1,234,567", 1234567), ("1,23", None), ("3.", 3),
        (".5", 0.5), ("$4$", 4), ("1\\,000", 1000), ("6/4", 1.5), ("1/0", None), ("3 4", None), ("1e3", 1000),
        ("1e9999", None), ("٤", None), ("0x10", None), ("", None), ("-", None), ("1_000", None), ("9" * 2000, None),
    ],
)  # fmt: skip
def test_numbers(text, value):
    assert number_of(text) == value


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("\\frac{6}{2}", "3", 1), ("x = 3", "3", 1), ("2x+2", "2(x+1)", 1), ("\\{1,2\\}", "\\{2,1\\}", 1),
        ("(1,2)", "(2,1)", 0), ("[0,1)", "[0,1)", 1), ("3 or 4", "3", 0), ("3, 4", "3", 0), ("3 = 3 = 4", "4", 0),
        ("x \\in \\{3,4\\}", "3", 0), ("0.333", "1/3", 0), ("\\sqrt{4}", "2", 1), ("3} \\boxed{4", "4", 0),
        ("3\\text{ or }4", "4", 0), ("\\pm 3", "3", 0), ("", "3", 0), ("\\", "3", 0), ("__import__('os')", "3", 0),
    ],
)  # fmt: skip
def test_mathematics(answer, reference, right):
    pytest.importorskip("math_verify")
    assert grade(answer, reference, "math") == right


def test_an_endless_expression_is_wrong_and_the_next_one_is_judged(monkeypatch):
    pytest.importorskip("math_verify")
    assert not math_process.equal_expressions("9^{9^{9^{9^9}}}", "3")
    assert math_process.equal_expressions("\\frac{6}{2}", "3")
    math_process._process._running.process.kill()  # as if out of memory
    assert not math_process.equal_expressions("x = 3", "3")
    assert math_process.equal_expressions("x = 3", "3")


def test_mathematics_in_another_thread():
    """Time limits by signals, as math-verify's own, raise outside of the main thread."""
    pytest.importorskip("math_verify")
    out = []
    thread = threading.Thread(target=lambda: out.append(grade("x = 3", "3", "math")))
    thread.start()
    thread.join()
    assert out == [1.0]


def test_without_math_verify_numbers_are_compared_and_the_rest_says_what_to_install(monkeypatch):
    math_process.close()
    monkeypatch.setattr(math_process.importlib.util, "find_spec", lambda name: None)
    assert grade("4/2", "2", "math") == 1
    with pytest.raises(ImportError, match=r"deepseek-arch\[r1\]"):
        grade("x = 3", "3", "math")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("B", 1), ("b", 1), ("(B)", 1), ("B.", 1), ("[B]", 1), ("\\text{B}", 1), ("\\text{(B)}", 1), ("B: Paris", 1),
        ("B) paris", 1), ("A", 0), ("A or B", 0), ("AB", 0), ("B) Rome", 0), ("B, C", 0), ("", 0), ("Paris", 0),
        ("not A", 0), ("A B", 0), ("B B", 0), ("B" * 5000, 0),
    ],
)  # fmt: skip
def test_multiple_choice(answer, right):
    assert grade_choice(answer, "B", {"choices": {"A": "Rome", "B": "Paris"}}) == right


def test_text_and_unknown_rules():
    assert grade(" New  YORK", "new york", "text") == 1
    assert grade("York", "new york", "text") == 0
    assert grade("3", None, "number") is None
    with pytest.raises(ValueError, match="is a number"):
        grade_number("3", "three", {})
    with pytest.raises(ValueError, match="is a letter"):
        grade_choice("B", "42", {})


TESTS = json.dumps([{"input": "1 2\n", "output": "3"}, {"input": "5 5\n", "output": "10"}])
ADD = "a, b = map(int, input().split())\nprint(a + b)"


@pytest.mark.parametrize(
    ("program", "right"),
    [
        (ADD, 1),
        (f"Here it is:\n```python\n{ADD}\n```\nDone.", 1),
        (f"```\n{ADD}\n```", 1),
        (f"```python\n{ADD}\n```\n```python\nprint(0)\n```", 0),  # two programs
        (f"```python\n{ADD}", 0),  # no end
        ("print(3)", 0),  # the first test only
        ("import sys; sys.exit(0)", 0),
        ("import os; os._exit(0)", 0),
        ("raise SystemExit", 0),
        ("def (", 0),
        ("", 0),
        ("import socket; socket.socket(); " + ADD.replace("\n", "; "), 0),
        ("import os; os.system('true')\n" + ADD, 0),
        ("import subprocess; subprocess.run(['true'])\n" + ADD, 0),
        ("open('x', 'w').write('y')\n" + ADD, 0),
        ("open('/proc/self/environ').read()\n" + ADD, 0),
        ("import ctypes; ctypes.CDLL(None)\n" + ADD, 0),
    ],
)
def test_programs(program, right):
    assert grade(program, TESTS, "code") == right


READ = "print(sum(map(int, {}.split())))"


@pytest.mark.parametrize(
    "program",
    [
        READ.format("open(0).read()"),
        "import sys\n" + READ.format("sys.stdin.buffer.readline()"),
        "import sys\n" + READ.format("sys.stdin.read()"),
        "import os\n" + READ.format("os.read(0, 99)"),
        "import sys\nsys.stdout = open(1, 'w')\n" + ADD,
        "try:\n    open('input.txt')\nexcept FileNotFoundError:\n    " + ADD.replace("\n", "\n    "),
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 26)\n"
        f"def main():\n    {ADD.replace(chr(10), chr(10) + '    ')}\n"
        "thread = threading.Thread(target=main)\nthread.start()\nthread.join()",
        "import asyncio, concurrent.futures, decimal, heapq, random, statistics, zoneinfo\n" + ADD,
    ],
)
def test_programs_may_read_their_input_in_any_way(program):
    assert grade(program, TESTS, "code") == 1


REFUSED = {
    "a process": "import _posixsubprocess, os\n_posixsubprocess.fork_exec([b'x'], [b'/bin/true'], True, (), None, "
    "None, -1, -1, -1, -1, -1, -1, *os.pipe(), False, False, -1, None, None, None, -1, None)",
    "a signal by descriptor": "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(os.getpid()), 0)",
    "cutting a file": "import os\nos.truncate({path!r}, 0)",
    "its times": "import os\nos.utime({path!r}, (0, 0))",
    "a pipe": "import os\nos.mkfifo({path!r} + '2')",
    "a database": "import sqlite3\nsqlite3.connect({path!r} + '3').execute('create table t(a)')",
    "another's file": "open({path!r}).read()",
    "a relative path": "import os\nopen('../' * 9 + {path!r}[1:]).read()",
    "another folder": "import os\nos.chdir('/')\nopen('proc/self/status').read()",
    "bytes": "open(b'/proc/self/status').read()",
    "two slashes": "open('//proc/self/status').read()",
    "the hook's cells": "import gc\nfor f in gc.get_objects():\n    if getattr(f, '__name__', '') == 'hook':\n"
    "        f.__globals__['refused'] = ('-',)\nimport os\nos.system('true')",
    "the hook's names": "import __main__\n__main__.isinstance = lambda *a: False\n__main__.str = lambda a: ''\n"
    "open({path!r} + '4', 'w')",
    "a second module": "import sys\ndel sys.modules['posix']\nimport posix\nposix.pidfd_open(posix.getpid())",
    "a second interpreter": "import sys\nsys.modules.pop('_xxsubinterpreters')\nimport _xxsubinterpreters",
    "its limits": "import sys\nsys.modules.pop('resource')\nimport resource",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_program_may_not_do_ends_it(name, tmp_path):
    """Also where it catches every exception and goes on with the right program."""
    path = tmp_path / "other"
    path.write_text("kept")
    tried = "\n    ".join(REFUSED[name].format(path=str(path)).split("\n"))
    before = path.stat()
    assert grade(f"try:\n    {tried}\nexcept BaseException:\n    pass\n{ADD}", TESTS, "code") == 0
    assert path.read_text() == "kept" and path.stat().st_mtime == before.st_mtime
    assert [found.name for found in tmp_path.iterdir()] == ["other"]


def test_calls_are_compared_outside_of_the_process():
    tests = json.dumps([{"call": "f(2)", "returns": 4}, {"call": "f([1])", "returns": [1, 1]}])
    assert grade("def f(x): return 2 * x", tests, "code") == 1
    equal_to_all = "class E:\n def __eq__(self, other): return True\ndef f(x): return E()"
    assert grade(equal_to_all, tests, "code") == 0
    assert grade("import json\njson.dumps = lambda v: '4'\ndef f(x): return 0", tests, "code") == 0
    with pytest.raises(ValueError, match="tests as a JSON list"):
        grade("x", "assert f(2) == 4", "code")
    with pytest.raises(ValueError, match="at least one test"):
        grade("x", "[]", "code")


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "b = bytearray(1 << 30)",
        "print('x' * (1 << 21))",
        "f=lambda:f();f()",
    ],
)
def test_limits_end_a_program(program):
    assert run_program(program, limits=CodeLimits(seconds=1, memory=1 << 28)) == (False, "")
