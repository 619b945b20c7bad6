"""The benchmark of whole models: contestants, isolated tasks and one small run. No test asserts a time."""

from __future__ import annotations

import io
import json
import queue
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import demo
from benchmarks.core import workers
from benchmarks.core.report import Report
from benchmarks.core.workers import environment, run_isolated
from benchmarks.models import contestants, limits, whole_model
from benchmarks.models.hot_spots import hot_spots

ROOT = Path(__file__).resolve().parents[2]
TASKS = "benchmarks.models.isolated_tasks"
SMALL = {"preset": "tiny", "layers": 2, "dtype": "fp32", "threads": 1, "loads": 1}
SMALL |= {"contexts": (8,), "prompts": (16,), "sequence": 16, "budget_s": 0.0, "ceiling_size": 64}
SMALL |= {"batches": (1, 2), "fp32_prompt": 16, "presets": ("tiny",), "small_batches": (1, 2), "new_tokens": 2}
SMALL |= {"compiled_batches": (1,)}

# A stand-in for llama-bench: two samples of so many nanoseconds for each token that it is asked for.
LLAMA = """#!{python}
import json, sys
asked = dict(zip(sys.argv[1::2], sys.argv[2::2]))
tokens = int(asked["-n"]) or int(asked["-p"])
print(json.dumps([{{"n_depth": int(asked.get("-d", 0)), "samples_ns": [1000 * tokens, 3000 * tokens]}}]))
"""


def executable(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_the_native_model_shares_our_tensors_and_agrees():
    model = contestants.random_model(whole_model.Settings(**SMALL).config(), torch.float32)
    twin = contestants.native_twin(model)
    assert twin.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert contestants.check_same_logits(model, twin) <= contestants.PARITY


def test_different_computations_are_not_timed():
    model = contestants.random_model(whole_model.Settings(**SMALL).config(), torch.float32)
    twin = contestants.native_twin(model)
    twin.model.layers[0].input_layernorm.variance_epsilon = 1.0
    with pytest.raises(ValueError, match="refusing to time"):
        contestants.check_same_logits(model, twin)


@pytest.mark.slow
def test_a_small_run_of_the_model_benchmark(tmp_path):
    """The whole command: every part has its rows and every number its contestants."""
    options = ["--preset", "tiny", "--layers", "2", "--dtype", "bf16", "--threads", "1", "--budget", "0"]
    options += ["--contexts", "8", "--prompts", "16", "--sequence", "16", "--loads", "1", "--ceiling-size", "64"]
    options += ["--batches", "1,2", "--fp32-prompt", "16", "--presets", "tiny", "--small-batches", "2"]
    llama = executable(tmp_path / "llama-bench", LLAMA.format(python=sys.executable))
    options += [
        "--compiled-batches",
        "1",
        "--new-tokens",
        "2",
        "--llama-bench",
        llama,
        "--gguf",
        llama,
        "--llama-contexts",
        "8",
    ]
    command = [sys.executable, "-m", "benchmarks", "model", *options, "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    report = Report.load(tmp_path / "out.json")
    contestants_of = {one.name: set(one.results) - {"ours, reference"} for one in report.rows}
    both = {"ours", "transformers"}
    assert contestants_of.pop("FP8 kept, decode at 8") >= {"ours", "unquantized"}
    assert contestants_of == {
        "decode at 8": both | {"llama.cpp"},
        "prefill 16": both | {"llama.cpp"},
        "1 rows, 2 layers, decode at 8": both,
        "2 rows, 2 layers, decode at 8": both,
        "fp32, decode at 8": both,
        "fp32, prefill 16": both,
        "tiny generates, 2 prompts": both,
        "tiny generates compiled, 1 prompts": {"ours", "not compiled"},
        "training step 16": both,
        "training step 16, memory at peak": both,
        "training step 16, memory beyond the weights": both,
        "loading": both | {"plain read"},
        "loading, peak memory": both | {"plain read"},
    }
    first = report.rows[0]
    assert first.results["llama.cpp"].values == pytest.approx((0.001, 0.003))
    assert first.details["cpu_seconds"]["ours"] > 0
    assert set(first.details["columns"]) == {"ours, CPU", "ratio in CPU time", "to llama.cpp", "of the limit"}
    assert {"ceilings", "load_before", "load_after"} == set(report.facts)
    assert "decode at 8 (ms/token)" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["command"].startswith("python -m benchmarks model --preset")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_parts_are_left_out_and_fp32_is_no_part_of_its_own(dtype):
    settings = whole_model.Settings(**SMALL | {"dtype": dtype, "only": ("fp32", "batches")})
    names = [row.name for row in whole_model.run(settings).rows]
    batches = ["1 rows, 2 layers, decode at 8", "2 rows, 2 layers, decode at 8"]
    assert names == batches + (["fp32, decode at 8", "fp32, prefill 16"] if dtype == "bf16" else [])


def test_unknown_parts_and_sizes_are_refused():
    with pytest.raises(ValueError, match="expected parts among decode"):
        whole_model.Settings(**SMALL, only=("decoding",))
    with pytest.raises(ValueError, match="expected dtype bf16 or fp32, got 'fp8'"):
        whole_model.Settings(**SMALL | {"dtype": "fp8"})
    for wrong in ({"contexts": (0,)}, {"batches": (1, -1)}, {"contexts": ()}):
        with pytest.raises(ValueError, match="expected positive sizes"):
            whole_model.Settings(**SMALL | wrong)
    for wrong in ({"llama_bench": "llama-bench"}, {"gguf": "model.gguf"}):
        with pytest.raises(ValueError, match="expected --llama-bench with --gguf"):
            whole_model.Settings(**SMALL | wrong)


def test_the_work_of_a_step_is_that_of_the_weights_it_needs():
    """Counted again from the tensors of a model: all but the embedding, and as many experts as a token has."""
    config = whole_model.Settings(**SMALL).config()
    state = contestants.random_model(config, torch.float32).state_dict()
    share = config.num_experts_per_tok / config.n_routed_experts
    read = {name: t.numel() * (share if ".experts." in name else 1) for name, t in state.items() if "embed" not in name}
    cached = 8 * config.num_hidden_layers
    work = limits.decode_work(config, "fp32", 1, 8)
    assert work.moved == pytest.approx(4 * (sum(read.values()) + cached * config.latent_dim + config.hidden_size))
    products = sum(count for name, count in read.items() if state[name].ndim > 1)
    pairs = cached * config.num_attention_heads * (config.latent_dim + config.kv_lora_rank)
    assert work.flops == pytest.approx(2 * (products + pairs))
    # A head for one token only, and each pair of a query and a key that it sees.
    prompt = limits.prefill_work(config, "fp32", 16)
    head = state["lm_head.weight"].numel()
    seen = 16 * 17 / 2 * config.num_hidden_layers * config.num_attention_heads
    expected = 2 * (16 * (products - head) + head + seen * (config.qk_head_dim + config.v_head_dim))
    assert prompt.flops == pytest.approx(expected)
    whole = limits.training_work(config, "fp32", 16)
    assert whole.flops == pytest.approx(3 * (prompt.flops + 2 * 15 * head))


def test_fp8_halves_the_bytes_of_projections_and_batches_read_more_experts():
    config = whole_model.Settings(**SMALL).config()
    one, kept = (limits.decode_work(config, "bf16", 1, 8, fp8=fp8) for fp8 in (False, True))
    assert kept.flops == one.flops
    assert 0.5 * one.moved < kept.moved < one.moved
    rows = [limits.decode_work(config, "bf16", batch, 1).moved for batch in (1, 2, 64)]
    assert rows == sorted(rows)
    assert rows[2] < 64 * rows[0]


def test_ceilings_bound_a_step_by_bytes_or_by_products():
    ceilings = limits.ModelCeilings(read=100.0, products={"bf16": 50.0, "fp32": 10.0})
    assert ceilings.seconds(limits.Work(moved=1000, flops=100), "bf16") == 10
    assert ceilings.seconds(limits.Work(moved=1000, flops=1000), "bf16") == 20
    assert ceilings.seconds(limits.Work(moved=1000, flops=1000), "fp32") == 100
    measured = limits.measure_model_ceilings(32)
    assert min(measured.read, *measured.products.values()) > 0


def test_hot_spots_names_the_operator_that_takes_the_time():
    a = torch.randn(300, 300)
    assert "aten::mm" in hot_spots(lambda: a @ a)


def test_a_task_can_be_stopped():
    config = whole_model.Settings(**SMALL).config().to_dict()
    task = {"task": "train", "repeats": 10**9, "threads": 1, "config": config, "dtype": "fp32", "native": False}
    steps = run_isolated(TASKS, task | {"tokens": 4}, limit_s=1.0)
    assert len(steps) < 10**9


def test_a_line_that_the_end_of_a_process_cut_is_dropped():
    lines = queue.Queue()
    workers._forward(io.StringIO('{"seconds": 1.0}\n{"seconds": 2.0}\n{"seco'), lines)
    assert [lines.get() for _ in range(3)] == ['{"seconds": 1.0}\n', '{"seconds": 2.0}\n', None]


def test_each_repetition_of_an_isolated_task_is_a_result(tmp_path):
    (tmp_path / "one.safetensors").write_bytes(bytes(2**20))
    steps = run_isolated(TASKS, {"task": "read", "repeats": 3, "threads": 1, "folder": str(tmp_path)})
    assert len(steps) == 3
    for step in steps:
        assert step["seconds"] > 0
        assert step["peak"] >= step["before"] > 0


def test_a_failing_task_says_what_it_said():
    with pytest.raises(RuntimeError, match="no such task"):
        run_isolated(TASKS, {"task": "no such task", "threads": 1})


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
