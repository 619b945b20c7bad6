"""Goals, bytes, FLOPs and measured ceilings of the operators' benchmarks."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks.operators import declare as operators
from benchmarks.operators import goals
from benchmarks.operators.declare import Shape
from benchmarks.operators.goals import Goal
from benchmarks.operators.rooflines import Ceilings, measure_ceilings
from benchmarks.operators.scales import SCALES, scale

H200 = Ceilings(4.3e12, {"bf16": 790e12, "fp8": 1580e12})

# ------------------------------------------------------------------ goals, bytes and FLOPs


@pytest.mark.parametrize(
    ("must", "stretch", "seconds", "reached"),
    [
        ("48 us", "45 us", 44e-6, "stretch"),
        ("48 us", "45 us", 46e-6, "must"),
        ("48 us", "45 us", 49e-6, ""),
        ("1.5 ms", "", 1.5e-3, "must"),
        ("800 TF", "1000 TF", 1e-3, "must"),  # 0.9e12 FLOPs in a millisecond
        ("800 TF", "900 TF", 1e-3, "stretch"),
        ("3.2 TB/s", "", 1e-3, ""),  # 3e9 bytes in a millisecond
        ("2900 GB/s", "3.1 TB/s", 1e-3, "must"),
    ],
)
def test_a_goal_is_reached_in_its_own_unit(must, stretch, seconds, reached):
    assert Goal(must, stretch).reached(seconds, 0.9e12, 3e9) == reached


@pytest.mark.parametrize("text", ["", "48", "48us", "48 minutes", "fast", "0 us", "-1 us", "850 TF (1.13 ms)"])
def test_a_goal_without_number_and_unit_is_refused(text):
    with pytest.raises(ValueError, match="expected a goal"):
        Goal("1 us", text) if text else goals._parse(text)


# The goals for an H200: a label, the operator, the end of the shape's name, the least time at 4.3 TB/s, 790 TFLOP/s in
# BF16 and 1580 in FP8, and both goals.
GOALS = [
    ("1", "fp8_quantize.rows", "8192x7168", 41e-6, "48 us", "45 us"),
    ("1b", "swiglu_quantize", "8192x2x2048", 20e-6, "24 us", "22 us"),
    ("2, quantize", "fp8_quantize.blocks", "7168x18432", 92e-6, "107 us", "100 us"),
    ("2, dequantize", "fp8_quantize.dequantize", "7168x18432", 92e-6, "107 us", "100 us"),
    ("3a", "fp8_gemm.blocks", "4096x7168x16384", 609e-6, "850 TF", "1100 TF"),
    ("3b", "fp8_gemm.blocks", "4096x4096x7168", 152e-6, "800 TF", "1000 TF"),
    ("3c", "fp8_gemm.blocks", "64x7168x16384", 28e-6, "38 us", "34 us"),
    ("3d", "fp8_gemm.wgrad", "18432x7168x8192", 1.37e-3, "650 TF", "850 TF"),
    ("4a", "fp8_grouped_gemm.forward", "32768x4096x7168, 8 experts", 1.22e-3, "800 TF", "1050 TF"),
    ("4b", "grouped_gemm.forward", "32768x4096x7168, 8 experts", 2.44e-3, "560 TF", "640 TF"),
    ("4c", "fp8_grouped_gemm.wgrad", "7168x2048x32768, 8 experts", 0.61e-3, "450 TF", "650 TF"),
    ("4d, permute", "moe_permute.permute", "8192x7168, top-8", 246e-6, "290 us", ""),
    ("4d, unpermute", "moe_permute.unpermute", "8192x7168, top-8", 246e-6, "290 us", ""),
    ("5, batch", "topk_gate", "8192x256, top-8, 4 of 8 groups", 2.134e-6, "16 us", "12 us"),
    ("5, decode", "topk_gate", "64x256, top-8, 4 of 8 groups", 1.69e-8, "3.5 us", "2.5 us"),
    ("6a", "mla_decode.plain", "b=128 h=128 s=4096", 185e-6, "400 TF", "480 TF"),
    ("6b", "mla_decode.plain", "b=128 h=16 s=8192", 281e-6, "3.2 TB/s", "3.7 TB/s"),
    ("6c", "mla_decode.fp8", "b=128 h=16 s=8192", 160e-6, "2.2 TB/s", "2.8 TB/s"),
    ("7a", "mla_attention.forward", "16 heads, 8192 tokens", 435e-6, "450 TF", "520 TF"),
    ("7b", "mla_attention.backward", "16 heads, 8192 tokens", 1.13e-3, "300 TF", "380 TF"),
    ("8a", "rms_norm.forward", "8192x7168", 55e-6, "62 us", "59 us"),
    ("8b", "rms_norm.add_quantize", "8192x7168", 96e-6, "110 us", "104 us"),
    ("8c", "rope.in_place", "8192x128x64 of 192 columns", 62e-6, "72 us", ""),
    ("9a", "indexer_scores.fp8", "b=1 t=8192 s=8192, 64x128", 348e-6, "450 TF", "650 TF"),
    # Reading keys, 258 us, and writing scores.
    ("9b", "indexer_scores.fp8", "b=128 t=1 s=65536, 64x128", 265.6e-6, "340 us", "300 us"),
    # Reading scores, 31 us, and writing indices.
    ("9c", "topk_select", "b=1 t=8192 s=8192, top-2048", 46.8e-6, "300 us", "150 us"),
    ("9d", "sparse_mla.plain", "b=1 t=4096 h=128 s=8192, top-2048", 2.96e-3, "320 TF", "420 TF"),
    ("9e", "sparse_mla.fp8", "b=128 t=2 h=128 s=8192, top-2048", 185e-6, "220 TF", "250 TF"),
    ("10", "linear_cross_entropy.training", "8192x7168x129280", 57.7e-3, "620 TF", "680 TF"),
]


@pytest.mark.parametrize(
    ("name", "size", "floor", "must", "stretch"), [k[1:] for k in GOALS], ids=[k[0] for k in GOALS]
)
def test_bytes_and_flops_give_the_floors_of_the_goal_table(name, size, floor, must, stretch):
    (operator,) = (one for one in operators.operators() if one.name == name)
    (shape,) = (one for one in operator.shapes(scale("v3")) if one.name.endswith(size))
    seconds = H200.floor(operator.flops(shape), operator.bytes(shape), operator.product)
    assert seconds == pytest.approx(floor, rel=0.025)  # most are rounded to two digits
    assert shape.goal == Goal(must, stretch)


def test_goals_are_those_of_the_table_and_no_others():
    with_goal = {
        f"{o.name} {s.name}" for name in SCALES for o in operators.operators() for s in o.shapes(scale(name)) if s.goal
    }
    assert len(with_goal) == len(GOALS)
    assert all(" v3 " in name for name in with_goal)


@pytest.mark.parametrize(
    ("name", "sizes", "flops", "moved"),
    [
        # 3 rows of 200: 600 bytes in bfloat16 twice over, as codes once, and two groups a row.
        ("fp8_quantize.rows", {"M": 3, "K": 200}, 0, 1200 + 600 + 4 * 3 * 2),
        ("fp8_quantize.transposed", {"M": 3, "K": 200}, 0, 1200 + 600 + 4 * 200),
        ("fp8_quantize.both", {"M": 3, "K": 200}, 0, 1200 + 1200 + 24 + 800),
        ("fp8_quantize.blocks", {"M": 130, "K": 200}, 0, 52_000 + 26_000 + 4 * 4),
        ("swiglu_quantize", {"M": 3, "I": 200}, 0, 2400 + 600 + 24),
        ("fp8_gemm.blocks", {"M": 2, "N": 130, "K": 200}, 104_000, (400 + 16) + (26_000 + 16) + 2 * 260),
        ("fp8_gemm.wgrad", {"M": 2, "N": 130, "K": 200}, 104_000, (400 + 16) + (26_000 + 1040) + 4 * 260),
        ("fp8_gemm.transposed", {"R": 3, "C": 5}, 0, 30),
        # Gate and up of 65 rows each: two grids of one row of blocks; two experts, though there are three.
        (
            "fp8_grouped_gemm.forward",
            {"P": 2, "E": 3, "N": 130, "K": 200, "parts": 2},
            104_000,
            416 + 2 * 2 * (65 * 200 + 8) + 520,
        ),
        ("fp8_grouped_gemm.wgrad", {"P": 200, "E": 3, "N": 2, "K": 5}, 4000, 416 + (1000 + 40) + 4 * 30),
        ("grouped_gemm.forward", {"P": 4, "E": 3, "N": 5, "K": 7}, 280, 2 * (28 + 105 + 20)),
        ("grouped_gemm.training", {"P": 4, "E": 3, "N": 5, "K": 7}, 840, 6 * (28 + 105 + 20)),
        ("moe_permute.permute", {"T": 3, "topk": 2, "H": 10, "E": 4}, 0, 2 * 10 * (3 + 6) + 8 * 6),
        ("moe_permute.unpermute", {"T": 3, "topk": 2, "H": 10, "E": 4}, 0, 2 * 10 * (3 + 6) + 8 * 6 + 4 * 6),
        # 3 queries on 5 keys see 3, 4 and 5 of them; 132 bytes a key.
        ("indexer_scores.fp8", {"B": 1, "T": 3, "S": 5, "G": 2, "D": 128}, 6144, 3 * 2 * 132 + 5 * 132 + 4 * 12),
        ("indexer_scores.plain", {"B": 1, "T": 3, "S": 5, "G": 2, "D": 128}, 6144, 3 * 2 * 260 + 5 * 256 + 4 * 12),
        ("topk_select", {"B": 1, "T": 3, "S": 5, "K": 2}, 0, 4 * 12 + 4 * 6),
        ("hadamard_quantize.fp8", {"M": 3, "D": 128}, 0, 3 * (256 + 128 + 4)),
        ("fp8_weight_gemm", {"M": 2, "N": 130, "K": 200}, 104_000, 800 + 26_016 + 520),
    ],
)
def test_bytes_and_flops_by_hand(name, sizes, flops, moved):
    (operator,) = (one for one in operators.operators() if one.name == name)
    shape = Shape("by hand", sizes)
    assert (operator.flops(shape), operator.bytes(shape)) == (flops, moved)


# ------------------------------------------------------------------ ceilings


def test_the_floor_is_the_slower_of_bytes_and_products():
    ceilings = Ceilings(1e9, {"bf16": 1e12, "fp8": 2e12})
    assert ceilings.floor(0, 1e6, "bf16") == pytest.approx(1e-3)
    assert ceilings.floor(4e9, 1e6, "fp8") == pytest.approx(2e-3)
    assert ceilings.floor(4e9, 1e6, "bf16") == pytest.approx(4e-3)


def test_a_narrow_product_is_bounded_by_whatever_is_wide_enough():
    cpu = Ceilings(1e9, {"fp32": 4e10, "bf16": 1e9})
    assert cpu.product("fp8") == cpu.product("bf16") == cpu.product("fp32") == 4e10
    assert Ceilings(1e9, {"bf16": 2.0, "fp8": 4.0}).product("bf16") == 2.0
    assert Ceilings(1e9, {"bf16": 2.0}).product("fp32") == math.inf  # not measured: it bounds nothing


def test_ceilings_are_measured_and_survive_json():
    ceilings = measure_ceilings(torch.device("cpu"), size=32, copied=2**12, rounds=2)
    assert ceilings.copy > 0
    assert set(ceilings.products) == {"fp32", "bf16"}
    assert Ceilings.from_dict(json.loads(json.dumps(ceilings.to_dict()))) == ceilings


def test_a_product_that_is_not_there_is_named(monkeypatch):
    def refuse(size, device):
        raise RuntimeError("no such units\nmore of it")

    monkeypatch.setattr("benchmarks.operators.rooflines._CPU_PRODUCTS", {"fp32": refuse})
    ceilings = measure_ceilings(torch.device("cpu"), size=8, copied=64, rounds=1)
    assert ceilings.absent == {"fp32": "no such units"}
    assert "no fp32 product: no such units" in str(ceilings)
