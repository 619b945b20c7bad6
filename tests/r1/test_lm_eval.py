"""Tasks of the lm-eval library on one of our checkpoints, here a task of two rows from a file."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("datasets")

from deepseek_arch.r1.pipeline.single import evaluate_with_lm_eval

TASK = """task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_a_task_from_a_file_runs_on_a_checkpoint(policy_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"w{i} w3", "a": " w4"}) + "\n" for i in range(2)))
    (tmp_path / "tiny.yaml").write_text(TASK.format(rows=rows))
    found = evaluate_with_lm_eval(policy_folder(), [str(tmp_path / "tiny.yaml")])
    assert found["tiny"]["sample_len"] == 2 and found["tiny"]["acc,none"] in (0.0, 0.5, 1.0)
