"""Declarations and measurements of `python -m benchmarks kernels`. No test asserts a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.cli.commands import run as run_command
from benchmarks.core.compare import compare
from benchmarks.core.report import Report, Row, Samples
from benchmarks.operators import declare as operators
from benchmarks.operators import measuring
from benchmarks.operators import run as kernels
from benchmarks.operators.declare import Operator, Provider, Shape
from benchmarks.operators.goals import Goal
from benchmarks.operators.rooflines import Ceilings
from benchmarks.operators.scales import SCALES, scale
from benchmarks.operators.tables import kernel_table, lines, remarks
from benchmarks.operators.verify import Mismatch, require_close, require_equal
from deepseek_kernels import dispatch

CPU = torch.device("cpu")
QUICK = measuring.Options(rounds=1, budget_s=0.0, cold=0)
TINY = [(operator, shape) for operator in operators.operators() for shape in operator.shapes(scale("tiny"))]


def names(pairs) -> list[str]:
    return [f"{operator.name} {shape.name}" for operator, shape in pairs]


# ------------------------------------------------------------------ checks


def test_bits_are_compared_and_not_values():
    nan = torch.tensor([math.nan, 0.0])
    require_equal(nan, nan.clone())
    with pytest.raises(Mismatch, match="1 of 2 elements"):
        require_equal(nan, torch.tensor([math.nan, -0.0]))
    with pytest.raises(Mismatch, match="float32"):
        require_equal(nan, nan.double())


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1.02])
def test_an_error_beyond_the_tolerance_is_a_mismatch(wrong):
    right = torch.ones(5000, 2)
    require_close(right * 1.009, right, 0.01)
    with pytest.raises(Mismatch, match=r"within 0\.01"):
        require_close(right * wrong, right, 0.01)
    with pytest.raises(Mismatch, match="got"):
        require_close(right[1:], right, 0.01)
    one_nan = right.clone()
    one_nan[-1, -1] = math.nan
    with pytest.raises(Mismatch, match="nan"):
        require_close(one_nan, right, 0.01)


# ------------------------------------------------------------------ every operator, tiny


def test_names_are_unique_and_begin_with_their_scale():
    for name in SCALES:
        pairs = [(o, s) for o in operators.operators() for s in o.shapes(scale(name))]
        assert len(set(names(pairs))) == len(pairs)
        assert {shape.scale for _, shape in pairs} == {name}


@pytest.mark.parametrize(("operator", "shape"), TINY, ids=names(TINY))
def test_every_operator_is_right_and_has_a_time(operator, shape):
    row = measuring.measure(operator, shape, CPU, QUICK)
    assert "error" not in row.details
    assert row.results["ours"].median > 0
    assert not row.details["absent"]
    assert all(provider in row.results for provider in row.details["built_in"])


def test_operators_are_found_by_name_and_by_group():
    assert [o.name for o in operators.select(["fp8_quantize.rows"])] == ["fp8_quantize.rows"]
    group = [o.name for o in operators.select(["fp8_gemm"])]
    assert group == ["fp8_gemm.blocks", "fp8_gemm.transposed", "fp8_gemm.wgrad"]
    assert len(operators.select([])) == len(operators.operators())
    with pytest.raises(ValueError, match=r"expected operators among .*got 'fp8'"):
        operators.select(["fp8"])
    with pytest.raises(ValueError, match="expected a shape among v3"):
        scale("v4")


def test_the_most_important_shapes_of_the_first_scale_come_first():
    work = measuring.plan(operators.operators(), ["v3", "v2-lite"])
    assert [f"{o.name} {s.name}" for o, s in work[:3]] == [
        "fp8_gemm.blocks v3 o_proj 4096x7168x16384",
        "fp8_grouped_gemm.forward v3 gate_up 32768x4096x7168, 8 experts",
        "fp8_quantize.rows v3 tokens 8192x7168",
    ]
    ranks = [shape.scale for _, shape in work]
    assert ranks == sorted(ranks, reverse=True)  # all of v3, then all of v2-lite


# ------------------------------------------------------------------ one operator with faults


class Doubling(Operator):
    """2 x, with the other providers of a test."""

    name, op = "doubling", "dense_gemm"

    def __init__(self, ours=lambda x: x * 2, **others: Provider) -> None:
        self.ours, self.others = ours, others

    def shapes(self, scale):
        return [Shape("v3 eight", {"n": 8}, Goal("1 us"))]

    def inputs(self, shape, random):
        return (random.normal(shape["n"], 4),)

    def expected(self, x):
        return x * 2

    def providers(self, shape):
        return self.others

    def verify(self, got, expected, *, ours=True):
        require_equal(got, expected)

    def bytes(self, shape):
        return 16 * shape["n"]


def fail(x: Tensor) -> Tensor:
    raise RuntimeError("not on this\n machine")


def measured(operator: Operator, **options) -> Row:
    return measuring.measure(operator, operator.shapes(None)[0], CPU, measuring.Options(rounds=1, cold=0, **options))


@pytest.mark.parametrize(
    ("ours", "why"), [(lambda x: x * 3, "Mismatch: expected result bit by bit"), (fail, "not on this machine")]
)
def test_a_wrong_result_has_no_number(ours, why):
    row = measured(Doubling(ours, good=Provider(lambda x: x * 2)))
    assert row.results == {}
    assert why in row.details["error"]


def test_the_others_may_be_absent_and_the_fastest_built_in_is_the_baseline():
    def slow(x):
        for _ in range(2000):
            x = x * 1
        return x * 2

    row = measured(
        Doubling(
            slow=Provider(slow),
            fast=Provider(lambda x: x + x),
            wrong=Provider(lambda x: x * 3),
            missing=Provider(fail),
            simpler=Provider(lambda x: x, built_in=False, checked=False),
            elsewhere=Provider(lambda x: x * 2, devices=("cuda",)),
        )
    )
    assert set(row.results) == {"ours", "slow", "fast", "simpler"}
    assert row.details["absent"] == {
        "wrong": "Mismatch: expected result bit by bit, got 32 of 32 elements that differ",
        "missing": "RuntimeError: not on this machine",
    }
    assert row.baseline == "fast"
    assert row.details["method"]["ours"] == "clock"


@pytest.mark.parametrize(
    ("providers", "expected"),
    [
        (None, {"ours", "a"}),
        (("ours",), {"ours"}),
        (("torch",), {"a"}),
        (("ours", "torch"), {"ours", "a"}),
        (("b",), {"b"}),
    ],
)
def test_providers_are_chosen_by_name_or_all_that_are_torch(providers, expected):
    operator = Doubling(a=Provider(lambda x: x * 2), b=Provider(lambda x: x * 2, devices=()))
    assert set(measured(operator, providers=providers).results) == expected


# ------------------------------------------------------------------ reports


def report(*rows: Row, **changes) -> Report:
    facts = {"ceilings": Ceilings(1e9, {"fp32": 1e12}).to_dict()}
    return Report("kernels", {}, rows, ("a note",), facts=facts, **changes)


def row(ours: float = 2.0, **details) -> Row:
    every = {"op": "doubling", "shape": "v3 eight", "flops": 10**9, "bytes": 10**6, "product": "fp32", "runs": "triton"}
    results = {"ours": Samples((ours, ours + 1, ours - 1)), "mm": Samples((3.0,))}
    return Row("doubling v3 eight", "ms", "lower", results, "mm", details=every | details)


def test_a_table_explains_its_numbers():
    head, ours, other = lines(report(row(goal={"must": "0.4 TF", "stretch": "0.6 GB/s"}, first_call_s={"ours": 1.2})))
    assert head[3:] == ("ms (p10 - p90)", "first call s", "TFLOP/s", "GB/s", "% of roofline", "x built-in", "goal")
    # A gigaFLOP and a megabyte in 2 ms; both ceilings allow it in 1 ms.
    assert ours == (
        "doubling",
        "v3 eight",
        "ours (triton)",
        "2 (1.2 - 2.8)",
        "1.2",
        "0.5",
        "0.5",
        "50.0%",
        "1.50x",
        "MUST (0.4 TF, stretch 0.6 GB/s)",
    )
    assert other == ("", "", "mm", "3 (3 - 3)", "", "0.3333", "0.3333", "33.3%", "", "")


def test_a_report_of_kernels_survives_its_file_and_has_its_own_markdown(tmp_path):
    before = report(row(absent={"scaled_mm": "none here"}))
    before.save(tmp_path / "report.json")
    after = Report.load(tmp_path / "report.json")
    assert after == before
    text = kernel_table(after).to_markdown()
    assert "| doubling | v3 eight | ours (triton) | 2 (1.2 - 2.8) |" in text
    assert "- no scaled_mm: none here (1x, first doubling v3 eight)\n" in text
    assert kernel_table(after).to_text().splitlines()[2].startswith("doubling")


def test_a_report_names_what_failed():
    broken = Row(
        "doubling v3 eight", "ms", "lower", {}, details={"op": "doubling", "shape": "x", "error": "Mismatch: no"}
    )
    checks = [
        {"name": "one", "status": "passed", "seconds": 1.0, "message": ""},
        {"name": "two", "status": "failed", "seconds": 1.0, "message": "why"},
    ]
    text = remarks(Report("kernels", {}, (broken,), facts={"checks": checks}))
    assert text[:3] == ["checks: 1 passed, 1 failed", "FAILED two: why", "FAILED doubling v3 eight: Mismatch: no"]
    assert [change.regressed for change in compare(report(row()), report(broken))] == [True]


def test_the_command_checks_times_and_saves(tmp_path, capsys, monkeypatch):
    arguments = ["--op", "moe_permute", "--shape", "tiny", "--rounds", "1", "--budget", "0", "--device", "cpu"]
    monkeypatch.setattr(measuring, "measure_ceilings", lambda *_, **__: Ceilings(1e9, {"fp32": 1e12}))
    assert run_command("kernels", [*arguments, "--out", str(tmp_path / "out.json")]) == 0
    saved = Report.load(tmp_path / "out.json")
    names = ["moe_permute.permute", "moe_permute.training", "moe_permute.unpermute"]
    assert sorted(one.details["op"] for one in saved.rows) == names
    assert "moe_permute.permute" in capsys.readouterr().out
    monkeypatch.setattr("benchmarks.operators.cases.moe_permute.permute", fail)
    assert run_command("kernels", [*arguments, "--out", str(tmp_path / "out.json")]) == 1


def test_the_command_compares_only_the_rows_that_it_measures(tmp_path, capsys, monkeypatch):
    arguments = ["--op", "moe_permute.permute", "--shape", "tiny", "--rounds", "1", "--budget", "0", "--device", "cpu"]
    monkeypatch.setattr(measuring, "measure_ceilings", lambda *_, **__: Ceilings(1e9, {"fp32": 1e12}))
    time = {"ms": 0.0}
    monkeypatch.setattr(measuring, "measure", lambda operator, shape, *_: timed(operator.name, shape.name, **time))
    goal = {"must": "1 us", "stretch": ""}
    old = [timed("moe_permute.permute", "tiny 24x192, top-4", 2.0, goal=goal)]
    old += [timed("moe_permute.unpermute", "tiny 24x192, top-4", 2.0, goal=goal)]  # another operator
    old += [timed("moe_permute.permute", "v3 8192x7168, top-8", 2.0, goal=goal)]  # another scale
    Report("kernels", {"device": "cpu"}, tuple(old)).save(tmp_path / "old.json")
    arguments += ["--compare", str(tmp_path / "old.json"), "--out", str(tmp_path / "new.json")]
    for time["ms"], tolerance, status in ((2.1, "0.1", 0), (2.3, "0.1", 1), (2.3, "0.2", 0)):
        assert run_command("kernels", [*arguments, "--tolerance", tolerance]) == status
        text = capsys.readouterr().out
        assert ("REGRESSION" in text) == bool(status)
        assert "1 compared" in text
    old.append(timed("moe_permute.permute", "tiny 9x9, top-4", 2.0, goal=goal))
    Report("kernels", {"device": "cpu"}, tuple(old)).save(tmp_path / "old.json")
    time["ms"] = 2.0
    assert run_command("kernels", arguments) == 1
    assert "moe_permute.permute tiny 9x9, top-4: ERROR, a row with a goal is only in the old" in capsys.readouterr().out


def timed(op: str, shape: str, ms: float, **details) -> Row:
    every = {"op": op, "shape": shape, "flops": 0, "bytes": 1000, "product": "bf16", "runs": "reference"}
    return Row(f"{op} {shape}", "ms", "lower", {"ours": Samples((ms,))}, details=every | details)


def test_impossible_options_are_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "measure_all", fail)
    arguments = ["--op", "moe_permute", "--shape", "tiny", "--device", "cpu"]
    with pytest.raises(ValueError, match=r"expected providers among .*index_select.*, got cublas"):
        run_command("kernels", [*arguments, "--provider", "cublas"])
    with pytest.raises(ValueError, match="by median or ratio"):
        run_command("kernels", [*arguments, "--by", "mean"])
    with pytest.raises(ValueError, match=r"old\.json"):
        run_command("kernels", [*arguments, "--compare", str(tmp_path / "old.json")])
    report(row()).save(tmp_path / "old.json")
    with pytest.raises(ValueError, match="expected ours among the providers to compare, got torch"):
        run_command("kernels", [*arguments, "--provider", "torch", "--compare", str(tmp_path / "old.json")])
    monkeypatch.setattr("benchmarks.operators.plots.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="expected matplotlib"):
        run_command("kernels", [*arguments, "--plot", str(tmp_path)])


def test_the_command_lists_operators_and_refuses_unknown_ones(capsys):
    assert (
        run_command("kernels", ["--list", "--op", "fp8_gemm.blocks,moe_permute", "--shape", "v3,v2-lite", "tiny"]) == 0
    )
    text = capsys.readouterr().out.splitlines()
    assert text[0] == "fp8_gemm.blocks  (others: scaled_mm, bf16 mm, tensor-wise)"
    assert ["v3", "o_proj", "4096x7168x16384", "goal", "850", "TF,", "stretch", "1100", "TF"] in map(str.split, text)
    assert "  v2-lite o_proj 4096x2048x2048" in text
    assert "  v3 o_proj 7168x16384, sweep M = 1 ... 8192" in text
    assert not any("kimi" in line for line in text)
    assert [line.split()[0] for line in text if not line.startswith(" ")] == [
        "fp8_gemm.blocks",
        "moe_permute.permute",
        "moe_permute.training",
        "moe_permute.unpermute",
    ]
    with pytest.raises(ValueError, match="got 'nothing'"):
        run_command("kernels", ["--op", "nothing"])


# ------------------------------------------------------------------ sweeps


def test_a_sweep_is_every_power_of_two_between_its_ends():
    shapes = list(operators.swept("v3 head 8", {"H": 8}, "T", 3, 40))
    assert [shape["T"] for shape in shapes] == [4, 8, 16, 32]
    assert shapes[0] == Shape("v3 head 8, T=4", {"H": 8, "T": 4}, None, 9, "T")
    assert {shape.curve for shape in shapes} == {"v3 head 8"}
    assert [shape["T"] for shape in operators.swept("v3 x", {}, "T", 1, 2)] == [1, 2]
    assert list(operators.swept("v3 x", {}, "T", 5, 7)) == []


def test_sweeps_are_timed_when_asked_for_and_after_everything_else():
    chosen = operators.select(["fp8_gemm.blocks"])
    without, sweeping = measuring.plan(chosen, ["tiny"]), measuring.plan(chosen, ["tiny"], sweep=True)
    assert not any(shape.sweep for _, shape in without)
    assert [shape["M"] for _, shape in sweeping[len(without) :]] == [1, 2, 4, 8, 16]
    operator, shape = sweeping[-1]
    row = measuring.measure(operator, shape, CPU, QUICK)
    assert (row.details["sweep"], row.details["size"]) == ("M", 16)


@pytest.mark.parametrize("name", SCALES)
def test_sweeps_have_names_and_sizes_of_their_scale(name):
    for operator in operators.operators():
        shapes = list(operator.sweeps(scale(name)))
        assert len({shape.name for shape in shapes}) == len(shapes)
        for shape in shapes:
            assert shape.scale == name
            assert shape.name == f"{shape.curve}, {shape.sweep}={shape[shape.sweep]}"
            assert operator.bytes(shape) > 0


def test_the_reference_is_beside_an_operators_cpp(cpu_backend):
    operator, shape = next((o, s) for o, s in TINY if o.name == "dense_gemm" and s["M"] == 1)
    with dispatch.use_backend("cpu"):
        row = measuring.measure(operator, shape, CPU, QUICK)
    assert row.details["runs"] == "cpu" and {"ours", "reference", "linear"} <= set(row.results)
    assert "reference" not in measuring.measure(operator, shape, CPU, QUICK).results
