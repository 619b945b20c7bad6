"""The benchmark of conversions, on a checkpoint of one megabyte. No test asserts a time."""

from __future__ import annotations

import pytest
import torch

import deepseek_arch as da
from benchmarks.core.report import Report
from benchmarks.models import convert as benchmark


@pytest.fixture(autouse=True)
def same_number_of_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_direction_is_measured_and_nothing_is_left(tmp_path):
    seen = []
    settings = benchmark.Settings(preset="tiny", gigabytes=0.003, rounds=1, threads=1, folder=str(tmp_path))
    report = benchmark.run(settings, on_row=seen.append)
    assert list(tmp_path.iterdir()) == []
    assert list(report.rows) == seen and len(seen) == 6
    for row in report.rows:
        assert set(row.results) == {"ours", "copy", "copy and sync"} and row.ratio() > 0
        assert all(len(samples.values) == 1 for samples in row.results.values())
    assert "read, 0.00 GB written" in report.rows[0].note
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json").rows[0].name == "FP8 to BF16"


@pytest.mark.parametrize("gigabytes", [1.0, 10.0])
def test_the_checkpoint_has_the_size_asked_for(gigabytes):
    config = benchmark.Settings(gigabytes=gigabytes).config()
    assert da.weight_bytes(config, "bf16") == pytest.approx(gigabytes * 1e9, rel=0.1)


def test_impossible_settings_are_errors():
    for wrong in ({"gigabytes": 0}, {"rounds": 0}, {"threads": 0}):
        with pytest.raises(ValueError, match="expected positive sizes"):
            benchmark.Settings(**wrong)
