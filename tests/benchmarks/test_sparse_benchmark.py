"""The benchmark and the example of sparse attention, at sizes of seconds."""

from __future__ import annotations

import json

import pytest

from benchmarks.models.sparse_attention import DENSE, Settings, model_config, run
from benchmarks.training import sparse_stages


@pytest.mark.parametrize(
    ("part", "name"), [("decode", "decode at 40"), pytest.param("prompt", "prompt of 20", marks=pytest.mark.slow)]
)
def test_all_contestants_are_measured(part, name, tmp_path):
    pytest.importorskip("transformers")
    from support import small_models

    path = tmp_path / "config.json"
    path.write_text(json.dumps(small_models.config("v32").to_dict()))
    settings = Settings(
        preset=str(path), layers=1, contexts=(40,), prompts=(20,), only=(part,), dtype="fp32", threads=1, memory=64
    )
    assert model_config(settings).is_sparse_attention
    report = run(settings)
    units = ("", ", CPU time", ", memory beyond the weights")
    assert [row.name for row in report.rows] == [name + unit for unit in units]
    for row in report.rows:
        assert set(row.results) == {"ours", DENSE, "transformers"} and not row.note


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="positive sizes"):
        Settings(contexts=(0,))
    with pytest.raises(ValueError, match="expected only decode and prompt, got train"):
        Settings(only=("train",))
    with pytest.raises(ValueError, match="expected a model with sparse attention, got deepseek-v3"):
        model_config(Settings(preset="deepseek-v3"))
    with pytest.raises(ValueError, match="less selected keys than tokens"):
        sparse_stages.Settings(index_topk=128)


def test_the_example_runs_all_stages(tmp_path):
    settings = sparse_stages.Settings(steps=2, warm_up=3, sparse=1, batch=2, sequence=32, index_topk=4, threads=1)
    stages = sparse_stages.run(settings)
    assert len(stages.recall) == 4 and all(0 < recall <= 1 for recall in stages.recall)
    assert next(iter(stages.losses)) == "dense" and len(stages.losses) == 4
    pytest.importorskip("matplotlib")
    sparse_stages.draw_stages(stages, str(tmp_path / "stages.png"))
    assert (tmp_path / "stages.png").stat().st_size > 1000
