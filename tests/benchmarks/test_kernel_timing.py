"""Timing of operators on a GPU, operands of torch's products, and facts about the machine.

None needs a GPU: the tests check the calls to CUDA, cuBLAS and nvidia-smi.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.core import machine, timing
from benchmarks.operators import fp8_operands as fp8
from benchmarks.operators.operands import Random
from deepseek_kernels.common.fp8 import empty_codes, empty_scales

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# ------------------------------------------------------------------ copies of operands


def test_copies_keep_strides_and_values_and_share_nothing():
    codes, scales = empty_codes(5, 20, CPU), empty_scales(5, 2, CPU)
    codes.view(torch.uint8).fill_(3)
    scales.fill_(0.5)
    weight = torch.randn(3, requires_grad=True)
    first, second = timing.copies((codes, scales, weight, (1, 2)), 10, CPU, cold=20)
    assert first[0] is codes
    assert [one.stride() for one in second[:2]] == [codes.stride(), scales.stride()] == [(32, 1), (1, 8)]
    assert torch.equal(second[0].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(second[1], scales)
    assert torch.equal(second[2], weight)
    assert second[2].requires_grad
    assert second[2].is_leaf
    assert second[3] == (1, 2)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(first[:3], second[:3], strict=True))


@pytest.mark.parametrize(
    ("moved", "cold", "count"), [(10, 0, 1), (10, 10, 1), (10, 11, 2), (0, 100, 16), (1, 10**9, 16)]
)
def test_there_are_as_many_copies_as_the_cache_needs(moved, cold, count):
    assert len(timing.copies((torch.zeros(1),), moved, CPU, cold)) == count


def test_a_cpu_call_takes_the_next_operands_each_time():
    seen = []
    times = timing.time_calls({"ours": seen.append}, [(1,), (2,), (3,)], CPU, rounds=4)
    assert seen == [1, 2, 3, 1, 2]  # a warm-up and four rounds
    assert times["ours"].method == "clock"
    assert len(times["ours"].samples.values) == 4


# ------------------------------------------------------------------ CUDA


class Driver:
    """Counts the calls to CUDA. A captured call takes 2 ms when replayed, a plain call 1 ms, a flush no time."""

    def __init__(self, monkeypatch, *, waits: bool = False, captures: bool = True) -> None:
        self.waits, self.captures = waits, captures
        self.now, self.replays, self.flushes, self.calls = 0.0, 0, 0, 0
        self.capturing: list[int] | None = None
        self.debug = "default"
        for name in ("CUDAGraph", "graph", "Event", "synchronize", "set_sync_debug_mode"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, "make_" + name.lower()))
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, device=None, **more: self.buffer(empty(8)))

    def buffer(self, memory: Tensor) -> Tensor:
        driver = self

        class Buffer:
            def zero_(self) -> None:
                driver.flushes += 1

        return Buffer()

    def call(self, number: int) -> list[int]:
        if self.debug == "error" and self.waits:
            raise RuntimeError("called a synchronizing CUDA operation")
        self.calls += 1
        if self.capturing is not None:
            self.capturing.append(number)
        else:
            self.now += 1e-3
        return [number]

    def make_cudagraph(self):
        driver = self

        class Graph:
            def __init__(self) -> None:
                self.captured: list[int] = []

            def replay(self) -> None:
                driver.replays += 1
                driver.now += 2e-3 * len(self.captured)

        return Graph()

    @contextlib.contextmanager
    def make_graph(self, graph):
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.capturing = graph.captured
        try:
            yield
        finally:
            self.capturing = None

    def make_event(self, enable_timing: bool):
        driver = self

        class Event:
            def record(self) -> None:
                self.at = driver.now

            def elapsed_time(self, other) -> float:
                return (other.at - self.at) * 1e3

        assert enable_timing
        return Event()

    def make_synchronize(self) -> None:
        pass

    def make_set_sync_debug_mode(self, mode: str) -> None:
        self.debug = mode


def test_a_graph_holds_a_call_for_each_copy_and_its_time_is_shared_out(monkeypatch):
    driver = Driver(monkeypatch)
    times = timing.time_calls({"ours": driver.call}, [(1,), (2,), (3,)], CUDA, rounds=5)["ours"]
    assert times.method == "graph"
    assert times.samples.values == pytest.approx([2e-3] * 5)  # per call, not per replay
    assert driver.calls == 1 + 3  # one to see whether it waits, three captured
    assert driver.debug == "default"
    assert driver.flushes == 0


def test_a_call_too_short_for_events_is_replayed_until_it_is_not(monkeypatch):
    driver = Driver(monkeypatch)
    monkeypatch.setattr(timing, "_REPLAY_S", 0.1)
    timing.time_calls({"ours": driver.call}, [(1,)], CUDA, rounds=1)
    assert driver.replays == 1 + 1 + 50  # a warm-up, a look at how long it takes, 0.1 s of 2 ms


@pytest.mark.parametrize("trouble", [{"waits": True}, {"captures": False}], ids=["waits", "is not captured"])
def test_calls_that_no_graph_can_hold_are_timed_after_a_flush(monkeypatch, trouble):
    driver = Driver(monkeypatch, **trouble)
    times = timing.time_calls({"ours": driver.call}, [(1,), (2,)], CUDA, rounds=4)["ours"]
    assert times.method == "events"
    assert times.samples.values == pytest.approx([1e-3] * 4)
    assert driver.flushes == 4
    assert driver.debug == "default"


def test_an_error_that_is_no_wait_is_not_hidden(monkeypatch):
    Driver(monkeypatch)

    def fail():
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        timing.time_calls({"ours": fail}, [()], CUDA, rounds=1)


def test_contestants_take_turns_and_a_slow_one_stops_at_its_budget(monkeypatch):
    driver = Driver(monkeypatch)
    clock = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))  # every sample takes a second
    times = timing.time_calls({"a": driver.call, "b": driver.call}, [(1,)], CUDA, rounds=5, budget_s=1.5)
    assert {name: len(timed.samples.values) for name, timed in times.items()} == {"a": 2, "b": 2}


# ------------------------------------------------------------------ torch's block-scaled product


def cublas(a: Tensor, b: Tensor, a_scale, a_recipe, b_scale, b_recipe, *, output_dtype) -> Tensor:
    """Checks the operands as torch's product on Hopper does (ScaledBlas.cpp in torch), and computes its result."""
    (m, k), n, groups = a.shape, b.shape[1], -(-a.shape[1] // 128)
    assert a.stride() == (k, 1)
    assert b.stride() == (1, k)
    assert a_recipe == F.ScalingType.BlockWise1x128
    assert a_scale.shape == (m, groups)
    assert a_scale.stride() == (1, m) or groups == 1
    if b_recipe == F.ScalingType.BlockWise1x128:
        assert b_scale.shape == (n, groups)
        assert b_scale.stride() == (1, n) or groups == 1
        rows = b_scale
    else:
        assert b_recipe == F.ScalingType.BlockWise128x128
        padded = -(-groups // 4) * 4
        assert b_scale.shape == (padded, -(-n // 128))
        assert b_scale.stride() == (1, padded)
        rows = b_scale[:groups].T
    return (fp8.wide(a, a_scale) @ fp8.wide(b.T, rows).T).to(output_dtype)


@pytest.mark.parametrize(("m", "n", "k"), [(16, 256, 512), (20, 144, 640), (8, 16, 128), (9, 32, 256)])
@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "rows"])
def test_operands_are_laid_out_as_cublas_requires(monkeypatch, m, n, k, blocks):
    random = Random(CPU)
    a = fp8.activations(random, m, k)
    b = fp8.weights(random, n, k) if blocks else fp8.activations(random, n, k)
    monkeypatch.setattr(F, "scaled_mm", cublas)
    right = fp8.wide(*a) @ fp8.wide(*b).T
    torch.testing.assert_close(fp8.scaled_mm(*a, *b, torch.float32), right, rtol=1e-6, atol=1e-4)
    # A part of the rows of a larger matrix, as an expert's.
    half = fp8.scaled_mm(a[0][:8], a[1][:8], *b, torch.float32)
    torch.testing.assert_close(half, right[:8], rtol=1e-6, atol=1e-4)


def test_weights_of_two_parts_have_two_grids():
    codes, scale = fp8.weights(Random(CPU), 3, 130 * 2, 200, parts=2)
    assert codes.shape == (3, 260, 200)
    assert scale.shape == (3, 4, 2)


def test_experts_get_multiples_of_16_rows_where_there_are_enough():
    assert all(end % 16 == 0 for end in Random(CPU).ends(320, 4).tolist())
    few = Random(CPU).ends(7, 4).tolist()
    assert few == sorted(few)
    assert few[-1] == 7


# ------------------------------------------------------------------ the machine


def nvidia_smi(folder: Path, monkeypatch, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_clocks_power_and_temperature_are_read(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, monkeypatch, 'echo "$2" >"$0.asked"; echo "1980, 3201, 512.25, 61, 0x0000000000000004"')
    assert machine.gpu_state() == {
        "sm_mhz": 1980.0,
        "memory_mhz": 3201.0,
        "watts": 512.25,
        "celsius": 61.0,
        "throttled": "0x0000000000000004",
    }
    assert (tmp_path / "nvidia-smi.asked").read_text().startswith("--query-gpu=clocks.sm,")


@pytest.mark.parametrize("script", ["exit 9", "echo 1980", "echo"], ids=["fails", "says too little", "says nothing"])
def test_a_machine_that_does_not_report_it_has_no_state(tmp_path, monkeypatch, script):
    nvidia_smi(tmp_path, monkeypatch, script)
    assert machine.gpu_state() is None


def test_a_machine_without_nvidia_smi_has_no_state(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine.gpu_state() is None


def test_a_gpu_machine_has_the_facts_that_a_reader_needs(tmp_path, monkeypatch):
    properties = SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, total_memory=150_000_000_000, L2_cache_size=62_914_560
    )
    for name, value in (("is_available", True), ("current_device", 0), ("get_device_name", "NVIDIA H200")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setenv("TRITON_PTXAS_PATH", "another/ptxas")
    nvidia_smi(tmp_path, monkeypatch, 'case "$2" in *driver*) echo 580.0;; *) exit 1;; esac')
    facts = machine.describe_machine()
    expected = {"gpu": "NVIDIA H200", "capability": "9.0", "multiprocessors": 132, "l2_cache": 62_914_560}
    assert facts.items() >= (expected | {"driver": "580.0", "state": None}).items()
    assert facts["environment"]["TRITON_PTXAS_PATH"] == "another/ptxas"
    assert facts["torch"]
