"""`load(path, layout=)`: each rank reads its own part, and all raise alike."""

from __future__ import annotations

import json

import pytest
import torch

import deepseek_arch as da
from deepseek_arch.checkpoint.synthetic import write_checkpoint
from deepseek_arch.layout.parallel_layout import ParallelLayout
from support import small_models
from support.cut_models import FP8_SIZES
from support.ranks import RankError, run_ranks

CONFIG = small_models.config(
    "v3", **FP8_SIZES, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]}
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "checkpoint"
    write_checkpoint(path, CONFIG, "fp8", std=0.1, shards=3)
    return path


def loaded(rank, folder, axes, fp8, dtype):
    model = da.load(folder, dtype=dtype, fp8=fp8, layout=ParallelLayout(**axes))
    whole = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in as_bytes(model.state_dict()).items()}
    ids = small_models.tokens(CONFIG, 2, 9)
    with torch.no_grad():
        logits = model(ids).logits
    held = sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in model.parameters())
    return whole, logits, held, model.load_report


def as_bytes(state):
    """FP8 as bytes, which collectives of every back end take."""
    out = {}
    for name, tensor in state.items():
        if tensor.dtype == torch.float8_e4m3fn and hasattr(tensor, "to_local"):
            from torch.distributed.tensor import DTensor

            rest = {"run_check": False, "shape": tensor.shape, "stride": tensor.stride()}
            local = tensor.to_local().view(torch.uint8)
            tensor = DTensor.from_local(local, tensor.device_mesh, tensor.placements, **rest)
        elif tensor.dtype == torch.float8_e4m3fn:
            tensor = tensor.view(torch.uint8)
        out[name] = tensor
    return out


AXES = [({"tp": 2, "ep": 2}, 2), ({"dp_shard": 2, "ep": 2}, 2), ({"dp_shard": 2, "tp": 2, "ep": 2}, 4)]


@pytest.mark.parametrize("fp8", ["keep", "dequantize"])
@pytest.mark.parametrize(("axes", "world"), AXES, ids=str)
def test_parts_are_those_of_the_whole_model(folder, axes, world, fp8):
    """Bit for bit, and the logits with them; a rank reads little more than it keeps."""
    model = da.load(folder, dtype=torch.float32, fp8=fp8)
    state = as_bytes(model.state_dict())
    with torch.no_grad():
        expected = model(small_models.tokens(CONFIG, 2, 9)).logits
    stored = model.load_report.bytes_read
    for whole, logits, held, report in run_ranks(loaded, world, folder, axes, fp8, torch.float32):
        assert whole.keys() == state.keys()
        assert [name for name in state if not torch.equal(whole[name], state[name])] == []
        assert small_models.error(logits, expected) < 1e-5
        assert held < 0.75 * sum(p.nbytes for p in model.parameters())
        assert report.bytes_read < 0.8 * stored


def broken_on_one_rank(rank, folder):
    if rank == 1:  # a file that this rank alone sees otherwise
        from deepseek_arch.checkpoint import load_setup as loading

        real = loading.plan_load

        def missing(*args):
            plan = real(*args)
            plan.report(loading.ProblemKind.MISSING, "model.norm.weight")
            return plan

        loading.plan_load = missing
    da.load(folder, layout=ParallelLayout(tp=2))


def test_a_problem_of_one_rank_is_raised_on_all(folder):
    with pytest.raises(RankError) as caught:
        run_ranks(broken_on_one_rank, 2, folder, seconds=60)
    text = str(caught.value)
    assert text.count("CheckpointError: cannot use the checkpoint") == 2
    assert text.count("missing tensors (1): model.norm.weight") == 2


def without_memory(rank, folder):
    if rank == 1:
        from deepseek_arch.checkpoint import sharded_loading

        def full(*args):
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")

        sharded_loading.allocate_parts = full
    try:
        da.load(folder, layout=ParallelLayout(tp=2))
    except RuntimeError as error:
        return type(error).__name__, str(error)


def test_memory_that_runs_out_on_one_rank_is_told_to_all(folder):
    """TRAPS S4: an error that is no ValueError must not leave the others waiting."""
    first, second = run_ranks(without_memory, 2, folder, seconds=60)
    assert second == ("OutOfMemoryError", "tried to allocate 20 GiB")
    assert first == ("RuntimeError", "OutOfMemoryError: tried to allocate 20 GiB")


def with_layout(rank, folder, axes):
    da.load(folder, layout=ParallelLayout(**axes))


def test_a_truncated_shard_is_named_on_all_ranks(tmp_path):
    write_checkpoint(tmp_path / "bad", CONFIG, "bf16", shards=3)
    shard = sorted((tmp_path / "bad").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-64])
    with pytest.raises(RankError) as caught:
        run_ranks(with_layout, 2, tmp_path / "bad", {"tp": 2}, seconds=60)
    assert str(caught.value).count("truncated: its header promises") == 2


def test_a_layout_that_cuts_fp8_blocks_is_refused(tmp_path):
    narrow = CONFIG.replace(moe_intermediate_size=48)
    write_checkpoint(tmp_path / "narrow", narrow, "fp8")
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["moe_intermediate_size"] == 48
    with pytest.raises(RankError, match=r"(?s)LayoutError: expected tp = 2 to cut .* at borders of FP8 blocks of 16"):
        run_ranks(with_layout, 2, tmp_path / "narrow", {"tp": 2}, seconds=60)


def test_it_needs_a_process_group(folder):
    with pytest.raises(ValueError, match="expected a running process group"):
        da.load(folder, layout=ParallelLayout(tp=2))
