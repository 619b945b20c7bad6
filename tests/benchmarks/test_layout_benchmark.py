"""Layouts over several devices: the arithmetic of their figures on hand-made traces, and the command over gloo."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import deepseek_arch as da
from benchmarks.core.report import Report
from benchmarks.core.tables import summary_table
from benchmarks.layouts import checks, contestants, figures, run, trace
from benchmarks.layouts.intervals import beyond, clipped, joined, length
from benchmarks.layouts.measure import PeakMemory
from benchmarks.layouts.sent_bytes import CountedCollectives
from benchmarks.layouts.stage_clock import Span
from benchmarks.layouts.training_run import StepResult, narrow_config, worst_error
from deepseek_arch.layout.parallel_layout import LayoutError, ParallelLayout
from support.ranks import run_ranks

# ------------------------------------------------------------------ intervals


def test_a_union_joins_what_touches_and_leaves_out_what_is_empty():
    assert joined([(5, 6), (0, 2), (1, 3), (3, 4), (7, 7)]) == [(0, 4), (5, 6)]
    assert joined([]) == []


def test_a_difference_is_cut_by_every_cover():
    assert beyond([(0, 10)], [(1, 2), (4, 6), (9, 12)]) == [(0, 1), (2, 4), (6, 9)]
    assert beyond([(0, 1), (5, 8)], [(0, 6)]) == [(6, 8)]
    assert beyond([(0, 1)], [(0, 1)]) == []
    assert length(beyond([(0, 4), (2, 6)], [(5, 5.5)])) == 5.5


def test_what_lies_outside_of_a_window_is_cut_off():
    assert clipped([(0, 3), (4, 5), (8, 9)], (2, 4.5)) == [(2, 3), (4, 4.5)]


# ------------------------------------------------------------------ traces


def event(name, cat, start, end, **args):
    return {"ph": "X", "name": name, "cat": cat, "ts": start * 1e6, "dur": (end - start) * 1e6, "args": args}


GPU = [
    event(trace.STEP, "user_annotation", 0, 20),
    event(trace.STEP, "gpu_user_annotation", 1, 19),  # on the device's clock: not the window
    event("void gemm<bf16>()", "kernel", 0, 4),
    event("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "kernel", 3, 7),
    event("Memcpy DtoD", "gpu_memcpy", 6, 8),
    event("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "kernel", 10, 13),
    event("ncclDevKernel_SendRecv(x)", "kernel", 12, 14, **{"Collective name": "send"}),
    event("ncclDevKernel_Generic(x)", "kernel", 15, 16, **{"Collective name": "_reduce_scatter_base"}),
    event("aten::mm", "cpu_op", 0, 20),  # the host's operators are no computing where there are kernels
    {"ph": "M", "name": "thread_name"},
]


def test_exposed_communication_of_kernels():
    got = trace.measure_overlap(trace.read_trace(GPU, "all_to_all"))
    assert got.step == 20 and got.computing == pytest.approx(6)
    assert got.communicating == pytest.approx(4 + 4 + 1)
    assert got.exposed == pytest.approx(2 + 4 + 1) and got.overlapped == pytest.approx(2)
    assert got.idle == pytest.approx(20 - 8 - 4 - 1)
    assert got.by_kind == pytest.approx({"all_reduce": 4, "all_to_all": 3, "send": 2, "reduce_scatter": 1})


def test_exposed_communication_of_gloo():
    events = [
        event(trace.STEP, "user_annotation", 10, 20),
        event("aten::mm", "cpu_op", 9, 12),
        event("aten::matmul", "cpu_op", 9, 12),
        event("deepseek_kernels::fused_moe", "cpu_op", 14, 15),
        event("c10d::allreduce_", "cpu_op", 12, 14),  # waits inside of it: no computing
        event("gloo:all_reduce", "user_annotation", 11, 14),
        event("gloo:all_reduce", "user_annotation", 12, 15),
        event("autograd::engine::evaluate_function: _SumOutBackward", "cpu_op", 10, 20),
    ]
    got = trace.measure_overlap(trace.read_trace(events))
    assert (got.step, got.computing, got.communicating) == pytest.approx((10, 3, 4))
    assert (got.exposed, got.overlapped, got.idle) == pytest.approx((2, 2, 5))
    assert got.by_kind["all_reduce"] == pytest.approx(4) and got.sums["all_reduce"] == pytest.approx(6)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_AllGather_RING_LL(x)", "all_gather"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(x)", "reduce_scatter"),
        ("ncclDevKernel_Broadcast_RING_LL(x)", "broadcast"),
        ("_allgather_base", "all_gather"),
        ("all_to_allv", "all_to_all"),
        ("gloo:recv", "send"),
        ("gemm", None),
    ],
)
def test_kinds_of_collectives_by_their_names(name, kind):
    assert trace.kind_of(name) == kind


def test_a_trace_without_the_step_is_refused():
    with pytest.raises(ValueError, match="expected a trace with an annotation"):
        trace.read_trace(GPU[1:])


# ------------------------------------------------------------------ figures


def test_flop_utilization_of_v3_as_it_was_trained():
    """arXiv 2505.09343, table 2: 250 GFLOP a token; 1,543 tokens/s a device are 386 TFLOP/s, 39 % of 989.5."""
    assert figures.mfu(250e9, 1543 * 2048, 2048, 989.5e12) == pytest.approx(0.39, abs=0.001)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", None),
        (None, None),
    ],
)
def test_devices_by_the_names_of_their_drivers(name, device):
    found = figures.device_named(name)
    assert (None if found is None else found.name) == device


def test_bandwidth_is_of_kinds_with_bytes_and_time():
    got = figures.bandwidth({"all_reduce": 6e9, "send": 0, "all_gather": 1e9}, {"all_reduce": 2.0, "send": 1.0})
    assert got == {"all_reduce": 3e9}


def test_a_bubble_is_the_time_without_a_stage():
    spans = [Span("F", 0, 0.0, 2.0), Span("F", 2, 1.0, 3.0), Span("B", 0, 6.0, 10.0)]
    assert figures.bubble_share(spans, 10.0) == pytest.approx(0.3)


def test_durations_are_medians_by_part_and_stage():
    spans = [Span("F", 0, 0, 1), Span("F", 0, 1, 3), Span("F", 0, 3, 12), Span("B", 0, 0, 4)]
    assert figures.stage_durations(spans) == {("F", 0): 2, ("B", 0): 4}


@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 4), (4, 8)])
def test_the_simulated_bubble_of_equal_stages_is_the_formula(pp, micro_batches):
    """1F1B: (pp - 1) (F + B) of a step of (micro_batches + pp - 1) (F + B)."""
    durations = {(kind, stage): {"F": 1.0, "B": 2.0}[kind] for kind in "FB" for stage in range(pp)}
    got = figures.simulated_bubble("1f1b", pp, micro_batches, 1, durations)
    assert got == pytest.approx((pp - 1) / (micro_batches + pp - 1))


def test_halves_of_backward_passes_stand_for_whole_ones_and_back():
    whole = {(kind, stage): 2.0 for kind in "FB" for stage in range(2)}
    halves = {("I", stage): 1.0 for stage in range(2)} | {("W", stage): 1.0 for stage in range(2)}
    forward = {("F", stage): 2.0 for stage in range(2)}
    assert figures.simulated_bubble("1f1b", 2, 4, 1, forward | halves) == pytest.approx(1 / 5)
    split = figures.simulated_bubble("zero_bubble", 2, 4, 1, whole)
    assert split == figures.simulated_bubble("zero_bubble", 2, 4, 1, forward | halves) < 1 / 5
    with pytest.raises(ValueError, match="expected times of part B of stage"):
        figures.simulated_bubble("1f1b", 2, 4, 1, forward)


# ------------------------------------------------------------------ layouts

V3 = da.DeepseekConfig.from_pretrained("deepseek-v3")
TINY = da.DeepseekConfig.from_pretrained("tiny").replace(quantization_config=None)


def test_layouts_that_fit_are_chosen_and_others_told():
    chosen, problems = contestants.contestants_of("tp=2,ep=4; pp=2 tp=3", ("1F1B", "GPipe"), V3, 8, 32, 1, 4096)
    assert [each.name for each in chosen] == ["dp_shard=4,tp=2,ep=4", "pp=2,dp_shard=4 1F1B", "pp=2,dp_shard=4 GPipe"]
    assert len(problems) == 1 and problems[0].startswith("tp=3: expected pp x dp_replicate x cp x tp = 3 to divide 8")
    chosen, problems = contestants.contestants_of("pp=2,cp=2", ("1F1B",), V3, 8, 32, 1, 4096)
    assert [each.name for each in chosen] == ["pp=2,dp_shard=2,cp=2 1F1B"] and problems == []
    default, silent = contestants.contestants_of("", ("1F1B",), V3, 8, 32, 1, 4096)
    assert len(default) > 4 and silent == []
    with pytest.raises(LayoutError, match="expected a layout that fits 8 devices"):
        contestants.contestants_of("tp=3", ("1F1B",), V3, 8, 32, 1, 4096)
    with pytest.raises(LayoutError, match="expected axes such as"):
        contestants.contestants_of("tp=two", ("1F1B",), V3, 8, 32, 1, 4096)


def test_layers_are_cut_to_what_fits_every_layout():
    chosen, _ = contestants.contestants_of("ep=8; tp=2,ep=8", (), V3, 8, 32, 1, 4096)
    setups = [contestants.training_setup(each, 32, 1, 4096, False, 2) for each in chosen]
    cut = contestants.config_within(V3, 0.9 * 80e9, chosen, setups)
    assert 3 < cut.num_hidden_layers < 61 and cut.first_k_dense_replace == 3

    def most(config):
        device = figures.device_named("h100")
        planned = [contestants.predicted_memory(config, *each, device) for each in zip(chosen, setups, strict=True)]
        return max(sum(rank.values()) for ranks in planned for rank in ranks)

    assert most(cut) <= 0.9 * 80e9 < most(contestants.cut_config(V3, cut.num_hidden_layers + 1))
    assert contestants.cut_config(V3, 2).first_k_dense_replace == 1
    with pytest.raises(LayoutError, match=r"expected layers that fit 0\.1 GB a device"):
        contestants.config_within(V3, 1e8, chosen, setups)


def test_a_schedule_that_the_planner_does_not_know_has_no_plan():
    layout = ParallelLayout(pp=2, dp_shard=1)
    assert contestants.training_setup(contestants.Contestant(layout, "GPipe"), 8, 1, 16, False, 4) is None
    assert (
        contestants.training_setup(contestants.Contestant(layout, "ZBVZeroBubble"), 8, 1, 16, False, 4).schedule
        == "zbv"
    )


def test_the_narrow_model_keeps_what_layouts_divide():
    narrow = narrow_config(V3)
    for name in ("num_hidden_layers", "num_attention_heads", "n_routed_experts", "n_group", "num_nextn_predict_layers"):
        assert getattr(narrow, name) == getattr(V3, name)
    ParallelLayout(pp=2, tp=8, ep=16, dp_shard=4).validate(narrow)
    assert narrow.hidden_size == 128 and narrow.vocab_size == 1024


# ------------------------------------------------------------------ on ranks


def counted(rank):
    x = torch.zeros(8, 4)
    with CountedCollectives() as counts:
        dist.all_reduce(x)
        dist.all_gather([torch.zeros(8, 4), torch.zeros(8, 4)], x)
        dist.reduce_scatter(torch.zeros(8, 4), [x, x])
        dist.all_to_all_single(torch.zeros(8, 4), x)
        dist.all_to_all_single(torch.zeros(8, 4), x, [2, 6] if rank else [6, 2], [2, 6] if rank else [6, 2])
        dist.broadcast(x, 0)
        work = [dist.P2POp(dist.isend, x, 1 - rank), dist.P2POp(dist.irecv, torch.zeros(8, 4), 1 - rank)]
        for each in dist.batch_isend_irecv(work):
            each.wait()
        torch.ops._c10d_functional.all_reduce(x, "sum", dist.group.WORLD.group_name)
    return dict(counts.nbytes), dict(counts.calls)


def test_a_gradient_that_no_rank_has_is_an_error():
    expected = {"a": torch.ones(2), "b": torch.ones(3), "unused": torch.zeros(2)}
    assert worst_error({"a": torch.ones(2)}, expected, {"a", "b"}) == (0.0, "a")
    assert worst_error({"a": torch.tensor([1.0, 1.1])}, expected, {"a", "b"})[0] == pytest.approx(0.1 / 2**0.5)
    assert worst_error({"a": torch.ones(2)}, expected, {"a"}) == (1.0, "b")


def test_sent_bytes_are_counted_by_kind():
    """128 bytes each; uneven parts of 6 and 2 rows of 16 bytes: 2 travel from rank 0, and 2 from rank 1."""
    for nbytes, calls in run_ranks(counted, 2):
        assert nbytes == {
            "all_reduce": 2 * 128,
            "all_gather": 128,
            "reduce_scatter": 128,
            "all_to_all": 64 + 2 * 16,
            "broadcast": 64,
            "send": 128,
        }
        assert calls == {kind: 2 if kind in ("all_reduce", "all_to_all") else 1 for kind in nbytes}


def test_peak_memory_is_what_was_added():
    peak = PeakMemory(torch.device("cpu"))
    x = torch.ones(32 * 2**20, dtype=torch.uint8)
    del x
    assert 30 * 2**20 < peak.beyond() < 64 * 2**20


SMALL = {"config": "tiny", "layers": 2, "batch": 4, "sequence": 16, "rounds": 1, "warmup": 0}
SMALL |= {"decode_prompt": 5, "decode_tokens": 3, "decode_batch": 1}


def measured(rank, out, options):
    report = run.measure(run.Settings(**SMALL | {"out": str(out)} | options), torch.device("cpu"))
    return summary_table(report).to_text(), report.facts


def test_two_layouts_are_checked_and_measured(tmp_path):
    """Experts apart, and a pipeline: every row of the report, with a column for each layout."""
    options = {"layout": "ep=2; pp=2", "schedule": ("1F1B",)}
    outcomes = run_ranks(measured, 2, tmp_path / "r.json", options, seconds=300)
    text, facts = outcomes[0]
    report = Report.load(tmp_path / "r.json")
    experts, stages = "dp_shard=2,ep=2", "pp=2 1F1B"
    assert list(facts["layouts"]) == [experts, stages]
    rows = {row.name: row for row in report.rows}
    for name in ("training step", "training, all devices", "communication exposed", "peak memory, planned"):
        assert set(rows[name].results) == {experts, stages} and rows[name].results[experts].median > 0
        assert name in text
    assert set(rows["pipeline bubble, mean of ranks"].results) == {stages}
    assert 0 < rows["pipeline bubble, mean of ranks"].results[stages].median < 100
    assert 0 < rows["pipeline bubble, simulated"].results[stages].median < 100
    for way in ("rows", "choices", "nodes"):
        assert set(rows[f"training step, dispatch by {way}"].results) == {experts}
    assert rows["decoding, all devices"].results[experts].median > 0
    assert rows["bandwidth of all_to_all"].results[experts].median > 0
    assert "model FLOP utilization" not in rows  # a CPU's peak is in no table
    losses = rows["loss of the first step"].results
    assert losses[experts].median == pytest.approx(losses[stages].median, rel=1e-5)
    for layout in facts["layouts"].values():
        assert layout["check"]["passed"] and layout["check"]["gradient_error"] < 1e-5
    _assert_bytes_add_up(facts["layouts"][experts]["measured"])
    json.dumps(facts)


def _assert_bytes_add_up(figures_of_experts):
    """All-to-all: what travels by purpose, and a count of int64 for the other rank in each of 2 x 2 exchanges."""
    for sent, purposes in zip(figures_of_experts["sent"], figures_of_experts["purposes"], strict=True):
        assert set(purposes) == {f"expert {way}{end}" for way in ("dispatch", "combine") for end in ("", " backward")}
        assert sent["all_to_all"] == sum(purposes.values()) + 8 * 2 * 2


def test_a_layout_that_is_wrong_is_told_and_not_measured(tmp_path, monkeypatch):
    """A gradient that is off on one rank is an error on all."""
    first = checks.LayoutRun.first_gradients

    def off(self):
        result, gradients = first(self)
        if self.model.meshes is not None and dist.get_rank() == 1:
            gradients["model.norm.weight"] = gradients["model.norm.weight"] * 1.01
        return result, gradients

    monkeypatch.setattr(checks.LayoutRun, "first_gradients", off)
    for text, facts in run_ranks(measured, 2, tmp_path / "r.json", {"layout": "tp=2", "batch": 2}, seconds=300):
        check = facts["layouts"]["tp=2"]["check"]
        assert not check["passed"] and check["parameter"] == "model.norm.weight"
        assert check["gradient_error"] == pytest.approx(0.01, rel=0.01)
        assert "measured" not in facts["layouts"]["tp=2"] and "training step" not in text


def test_losses_that_differ_are_an_error(tmp_path, monkeypatch):
    first = checks.LayoutRun.first_gradients

    def off(self):
        result, gradients = first(self)
        factor = 1.0 if self.model.meshes is None else 1.001
        return StepResult(result.loss * factor, result.norm), gradients

    monkeypatch.setattr(checks.LayoutRun, "first_gradients", off)
    for _, facts in run_ranks(measured, 2, tmp_path / "r.json", {"layout": "tp=2", "batch": 2}, seconds=300):
        assert facts["layouts"]["tp=2"]["check"]["loss_error"] == pytest.approx(1e-3, rel=0.01)
        assert not facts["layouts"]["tp=2"]["check"]["passed"]


# ------------------------------------------------------------------ the command


def test_it_says_how_to_be_started():
    command = [sys.executable, "-m", "benchmarks", "parallel"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "expected to be started by torchrun: torchrun --nproc-per-node" in done.stderr


@pytest.mark.parametrize(
    "wrong", [{"only": ("speed",)}, {"micro_batch": 0}, {"decode_tokens": 1}, {"layers": -1}, {"rounds": 0}]
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        run.Settings(**wrong)


@pytest.mark.parametrize(("given", "ep", "ranks"), [(0, 8, 8), (4, 8, 4), (3, 8, 2), (16, 4, 4)])
def test_nodes_have_a_divisor_of_the_experts_ranks(monkeypatch, given, ep, ranks):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert run._ranks_per_node(given, ep) == ranks
