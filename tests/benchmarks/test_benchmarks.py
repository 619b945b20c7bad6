"""The benchmarks' harness, and one small run. Nothing here checks a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import demo
from benchmarks.__main__ import main
from benchmarks.core import isolated
from benchmarks.core import report as harness
from benchmarks.core.compare import compare, machines_differ, show_changes
from benchmarks.core.isolated import run_isolated
from benchmarks.core.report import Report, Row, Samples, interleave, quantile
from benchmarks.core.tables import to_markdown
from benchmarks.models import contestants
from benchmarks.models import whole_model as bench_model
from benchmarks.models.hot_spots import hot_spots

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"preset": "tiny", "layers": 2, "dtype": "fp32", "threads": 1, "loads": 1}
SMALL |= {"contexts": (8,), "prompts": (16,), "sequence": 16, "budget_s": 0.0}


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
    monkeypatch.setattr(harness, "SLOW", 0.0)
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
    text = to_markdown(report(row(), row("loading", theirs=None), command="python -m benchmarks model"))
    assert "`python -m benchmarks model`" in text
    assert "| decode at 512 (ms) | 10 | 20 | 2.00x | 1.5x |" in text
    assert "| loading (ms) | 10 | - |" in text
    assert text.endswith("- decode at 512: a note\n- loading: a note\n- a remark\n")


# ------------------------------------------------------------------ comparison


def compared(tmp_path, monkeypatch, capsys, new: Row, *options: str) -> tuple[int, str]:
    """Exit status and output of `python -m benchmarks compare` on an old row of 10 against 20 ms."""
    report(row()).save(tmp_path / "old.json")
    report(new).save(tmp_path / "new.json")
    files = [str(tmp_path / "old.json"), str(tmp_path / "new.json")]
    monkeypatch.setattr(sys, "argv", ["benchmarks", "compare", *files, *options])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0), "".join(capsys.readouterr())


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
def test_a_regression_beyond_the_tolerance_exits_with_1(tmp_path, monkeypatch, capsys, ours, theirs, options, status):
    found, text = compared(tmp_path, monkeypatch, capsys, row(ours=ours, theirs=theirs), *options)
    assert found == status
    assert ("REGRESSION" in text) == bool(status)


@pytest.mark.parametrize(
    ("new", "options"),
    [(row("another row"), ()), (row(), ("--by", "mean")), (row(theirs=None), ("--by", "ratio"))],
    ids=["nothing in common", "unknown measure", "no ratios"],
)
def test_reports_that_cannot_be_compared_exit_with_2(tmp_path, monkeypatch, capsys, new, options):
    status, text = compared(tmp_path, monkeypatch, capsys, new, *options)
    assert status == 2
    assert "error: expected" in text


def test_what_failed_or_is_gone_with_its_goal_is_a_regression_and_what_is_new_is_not():
    free = Row("no goal", "ms", "lower", {"ours": Samples((1.0,))})
    broken = Row("broken", "ms", "lower", {}, details={"error": "Mismatch: no"})
    others_only = Row("others only", "ms", "lower", {"transformers": Samples((1.0,))})
    old = report(row(), row("gone"), free, row("broken"), row("others only"), row("absent before", theirs=None))
    new = report(row(), broken, others_only, row("new"))
    found = {change.name: (change.gain, change.regressed) for change in compare(old, new)}
    assert found == {
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


# ------------------------------------------------------------------ the models


def test_the_native_model_shares_our_tensors_and_agrees():
    model = contestants.random_model(bench_model.Settings(**SMALL).config(), torch.float32)
    twin = contestants.native_twin(model)
    assert twin.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert contestants.check_same_logits(model, twin) <= contestants.PARITY


def test_different_computations_are_not_timed():
    model = contestants.random_model(bench_model.Settings(**SMALL).config(), torch.float32)
    twin = contestants.native_twin(model)
    twin.model.layers[0].input_layernorm.variance_epsilon = 1.0
    with pytest.raises(ValueError, match="refusing to time"):
        contestants.check_same_logits(model, twin)


@pytest.mark.slow
def test_a_small_run_of_the_model_benchmark(tmp_path):
    """The whole command: every part has its rows and every number its contestants."""
    options = ["--preset", "tiny", "--layers", "2", "--dtype", "fp32", "--threads", "1", "--budget", "0"]
    options += ["--contexts", "8", "--prompts", "16", "--sequence", "16", "--loads", "1"]
    command = [sys.executable, "-m", "benchmarks", "model", *options, "--out", str(tmp_path / "out.json")]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)])
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr
    found = Report.load(tmp_path / "out.json")
    contestants_of = {one.name: set(one.results) for one in found.rows}
    both = {"ours", "transformers"}
    assert contestants_of == {
        "decode at 8": both,
        "prefill 16": both,
        "training step 16": both,
        "training step 16, memory at peak": both,
        "training step 16, memory beyond the weights": both,
        "loading": both | {"plain read"},
        "loading, peak memory": both | {"plain read"},
    }
    assert "decode at 8 (ms/token)" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["command"].startswith("python -m benchmarks model --preset")


def test_unknown_parts_and_sizes_are_refused():
    with pytest.raises(ValueError, match="expected parts among decode"):
        bench_model.run(bench_model.Settings(**SMALL), ("decoding",))
    with pytest.raises(ValueError, match="expected dtype bf16 or fp32, got 'fp8'"):
        bench_model.Settings(**SMALL | {"dtype": "fp8"})
    with pytest.raises(ValueError, match="expected positive sizes"):
        bench_model.Settings(**SMALL | {"contexts": (0,)})


def test_hot_spots_names_the_operator_that_takes_the_time():
    a = torch.randn(300, 300)
    assert "aten::mm" in hot_spots(lambda: a @ a)


def test_a_task_can_be_stopped():
    config = bench_model.Settings(**SMALL).config().to_dict()
    found = run_isolated(
        "train", repeats=10**9, limit_s=1.0, threads=1, config=config, dtype="fp32", native=False, tokens=4
    )
    assert len(found) < 10**9
    assert isolated._results(b'{"seconds": 1.0}\nnoise\n{"seconds": 2.0}\n{"seco') == [
        {"seconds": 1.0},
        {"seconds": 2.0},
    ]


def test_a_failing_task_says_what_it_said():
    with pytest.raises(RuntimeError, match="no such task"):
        run_isolated("no such task", threads=1)


# ------------------------------------------------------------------ the demonstration


@pytest.mark.slow
@pytest.mark.parametrize(("allowed", "status"), [(demo.PARITY, 0), (-1.0, 1)], ids=["agrees", "disagrees"])
def test_the_demonstration_fails_where_the_models_disagree(monkeypatch, capsys, allowed, status):
    monkeypatch.setattr(demo, "CONTEXT", 64)
    monkeypatch.setattr(demo, "PARITY", allowed)
    import transformers

    verbosity = transformers.logging.get_verbosity()
    try:
        assert demo.main() == status
    finally:  # it is for the whole process
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
    assert ("NO" in capsys.readouterr().out) == bool(status)
