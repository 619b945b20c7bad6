"""Statistics, interleaved timing, reports and their comparison. No test asserts a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.cli.commands import main
from benchmarks.core import timing
from benchmarks.core.compare import compare, machines_differ, show_changes
from benchmarks.core.machine import describe_machine, machine_line
from benchmarks.core.report import Report, Row, Samples, quantile
from benchmarks.core.tables import summary_table
from benchmarks.core.timing import interleave
from deepseek_kernels import dispatch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def row(name: str = "decode at 512", ours: float = 10.0, theirs: float | None = 20.0, better: str = "lower") -> Row:
    results = {"ours": Samples((ours,))} | ({} if theirs is None else {"transformers": Samples((theirs,))})
    return Row(name, "ms", better, results, baseline="transformers", goal=1.5, note="a note")


def report(*rows: Row, **changes) -> Report:
    return Report("model", {"layers": 4}, rows, ("a remark",), **changes)


# ------------------------------------------------------------------ statistics and timing


def test_quantiles_interpolate_between_order_statistics():
    values = [4.0, 1.0, 3.0, 2.0]
    assert [quantile(values, q) for q in (0, 0.5, 1)] == [1.0, 2.5, 4.0]
    assert quantile(values, 0.1) == pytest.approx(1.3)
    assert quantile([7.0], 0.9) == 7.0
    torch.testing.assert_close(
        torch.tensor([quantile(values, q / 10) for q in range(11)]),
        torch.quantile(torch.tensor(values), torch.arange(11) / 10),
    )


@pytest.mark.parametrize(("values", "q"), [([], 0.5), ([1.0], 1.1), ([1.0], -0.1)])
def test_quantiles_refuse_what_has_none(values, q):
    with pytest.raises(ValueError, match="expected values"):
        quantile(values, q)


@pytest.mark.parametrize("values", [(), (1.0, float("nan")), (float("inf"),)])
def test_samples_are_finite_and_at_least_one(values):
    with pytest.raises(ValueError, match="finite"):
        Samples(values)


def test_actions_alternate_after_their_warm_up():
    calls = []
    actions = {name: (lambda name=name: calls.append(name)) for name in "AB"}
    seconds = interleave(actions, rounds=3, warmup=1)
    assert calls == list("ABABABAB")
    assert {name: len(samples.values) for name, samples in seconds.items()} == {"A": 3, "B": 3}


def test_an_action_out_of_time_still_has_one_counted_run():
    calls = []
    seconds = interleave({"A": lambda: calls.append(1)}, rounds=5, warmup=2, budget_s=0)
    assert len(calls) == 3
    assert len(seconds["A"].values) == 1


def test_a_slow_warm_up_counts(monkeypatch):
    monkeypatch.setattr(timing, "SLOW", 0.0)
    calls = []
    seconds = interleave({"A": lambda: calls.append(1)}, rounds=2, warmup=3)
    assert len(seconds["A"].values) == len(calls) == 2


# ------------------------------------------------------------------ reports


def test_a_report_survives_its_file(tmp_path):
    before = report(row(), row("prefill 2048", 300, None, "higher"))
    before.save(tmp_path / "new folder" / "report.json")
    after = Report.load(tmp_path / "new folder" / "report.json")
    assert after == before
    assert set(after.machine) >= {"cpu", "threads", "torch", "transformers"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{"name": 1}]}'])
def test_a_file_that_is_no_report_is_named(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json"):
        Report.load(path)


def test_ratios_say_how_many_times_better():
    assert row(ours=10, theirs=20).ratio() == 2
    assert row(ours=10, theirs=20, better="higher").ratio() == 0.5
    assert row(theirs=None).ratio() is None


def test_the_markdown_table_has_every_contestant_and_the_command():
    text = summary_table(report(row(), row("loading", theirs=None), command="python -m benchmarks model")).to_markdown()
    assert "`python -m benchmarks model`" in text
    assert "| decode at 512 (ms) | 10 | 20 | 2.00x | 1.5x |" in text
    assert "| loading (ms) | 10 | - |" in text
    assert text.endswith("- decode at 512: a note\n- loading: a note\n- a remark\n")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_still_load_and_compare(path, capsys):
    """Files of earlier versions have fewer facts about the machine, and other settings."""
    old = Report.load(path)
    assert old.rows
    assert main(["compare", str(path), str(path)]) == 0
    text = capsys.readouterr().out
    assert "0 regressed" in text
    measured = [row for row in old.rows if "ours" in row.results]
    assert f"{len(measured)} compared" in text


def test_the_machine_line_says_whether_the_cpu_multiplies_16_bit_floats(monkeypatch):
    for native, words in ((True, "native 16-bit products"), (False, "no native 16-bit products")):
        monkeypatch.setattr(dispatch, "native_half_matmul", lambda native=native: native)
        facts = describe_machine() | {"cpu": "a CPU", "cpu_capability": "AVX", "gpu": None, "threads": 3}
        assert facts["native_half_matmul"] is native
        assert machine_line(facts).startswith(f"a CPU (AVX, {words}), 3 threads; ")


def test_the_machine_line_of_a_gpu_has_its_own_capability_and_not_the_cpu_s():
    facts = {
        "gpu": "a GPU",
        "capability": "9.0",
        "cpu": "a CPU",
        "cpu_capability": "AVX512",
        "threads": 3,
        "torch": "2.0",
    }
    assert machine_line(facts) == "a GPU (compute capability 9.0); torch 2.0"
    del facts["capability"]  # of an older report
    assert machine_line(facts) == "a GPU; torch 2.0"


def test_machines_with_other_instructions_are_different_machines():
    old, new = ({"cpu": "a CPU", "cpu_capability": kind, "gpu": None, "threads": 1} for kind in ("AVX2", "AVX512"))
    assert machines_differ(report(machine=old), report(machine=new)) == ["different cpu_capability: AVX2 and AVX512"]


# ------------------------------------------------------------------ comparison


def compared(tmp_path, capsys, new: Row, *options: str) -> tuple[int, str]:
    """Runs `python -m benchmarks compare` on an old row of 10 against 20 ms -> exit status, output."""
    report(row()).save(tmp_path / "old.json")
    report(new).save(tmp_path / "new.json")
    status = main(["compare", str(tmp_path / "old.json"), str(tmp_path / "new.json"), *options])
    return status, "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("ours", "theirs", "options", "status"),
    [
        (10.9, 20, (), 0),
        (11.1, 20, (), 1),
        (11.1, 20, ("--tolerance", "0.2"), 0),
        (5, 20, (), 0),
        (20, 40, ("--by", "ratio"), 0),  # a machine half as fast
        (20, 20, ("--by", "ratio"), 1),
    ],
)
def test_a_regression_beyond_the_tolerance_exits_with_1(tmp_path, capsys, ours, theirs, options, status):
    exit_status, text = compared(tmp_path, capsys, row(ours=ours, theirs=theirs), *options)
    assert exit_status == status
    assert ("REGRESSION" in text) == bool(status)


@pytest.mark.parametrize(
    ("new", "options"),
    [(row("another row"), ()), (row(), ("--by", "mean")), (row(theirs=None), ("--by", "ratio"))],
    ids=["nothing in common", "unknown measure", "no ratios"],
)
def test_reports_that_cannot_be_compared_exit_with_2(tmp_path, capsys, new, options):
    status, text = compared(tmp_path, capsys, new, *options)
    assert status == 2
    assert "error: expected" in text


def test_failed_rows_and_lost_rows_with_a_goal_are_regressions_and_new_rows_are_not():
    free = Row("no goal", "ms", "lower", {"ours": Samples((1.0,))})
    broken = Row("broken", "ms", "lower", {}, details={"error": "Mismatch: no"})
    others_only = Row("others only", "ms", "lower", {"transformers": Samples((1.0,))})
    old = report(row(), row("gone"), free, row("broken"), row("others only"), row("absent before", theirs=None))
    new = report(row(), broken, others_only, row("new"))
    changes = {change.name: (change.gain, change.regressed) for change in compare(old, new)}
    assert changes == {
        "decode at 512": (1.0, False),
        "broken": (0.0, True),
        "others only": (None, True),
        "new": (None, False),
        "gone": (None, True),
        "no goal": (None, False),
        "absent before": (None, True),
    }


def test_two_machines_are_compared_by_ratios_and_one_by_medians(capsys):
    slow, other = report(row(ours=20, theirs=40)), {"cpu": "another", "gpu": None, "threads": 1, "torch": "1.0"}
    assert show_changes(report(row()), slow) == 1
    assert show_changes(report(row(), machine=other), slow) == 0
    text = capsys.readouterr().out
    assert "different cpu: another and " in text
    assert "different torch: 1.0 and " in text
    assert "  1.00x  decode at 512\n1 compared, 0 regressed" in text
    # A GPU decides alone, and a median may still be asked for.
    gpu = {"cpu": "another", "gpu": "a GPU", "threads": 1}
    assert machines_differ(report(machine=gpu), report(machine=gpu | {"cpu": "a third", "threads": 2})) == []
    assert show_changes(report(row(), machine=other), slow, by="median") == 1


def test_throughput_regresses_downwards():
    old, faster, slower = (report(row(ours=value, better="higher")) for value in (100, 120, 80))
    assert [change.regressed for change in compare(old, faster)] == [False]
    assert [change.regressed for change in compare(old, slower)] == [True]
