"""`save_sharded` and `load_sharded`: any layout to any other, bit for bit, optimizer included."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import deepseek_arch as da
from deepseek_arch.layout.parallel_layout import ParallelLayout
from support import small_models
from support.cut_models import whole
from support.ranks import RankError, run_ranks

CONFIG = small_models.config("v3", num_attention_heads=4, vocab_size=64, num_nextn_predict_layers=1)
IDS = small_models.tokens(CONFIG, 4, 9)


def contents(model, optimizer):
    """Every value of both, gathered, by name."""
    found = {name: whole(tensor).clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            found[f"{name} {key}"] = whole(value).clone()
    return found


def made(axes, seed):
    model = small_models.model(CONFIG, seed=seed).train()
    if axes is not None:
        model = da.parallelize(model, ParallelLayout(**axes))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def step(model, optimizer):
    rank = 0 if model.meshes is None else dist.get_rank(model.meshes.data)
    ids = IDS if model.meshes is None else IDS.chunk(dist.get_world_size(model.meshes.data))[rank]
    out = model(ids, labels=ids, return_logits=False)
    (out.loss + 0.3 * out.mtp_loss).backward()
    optimizer.step()
    optimizer.zero_grad()


def saved(rank, axes, folder):
    model, optimizer = made(axes, seed=0)
    step(model, optimizer)
    da.LoadBalancer(model, 0.25).step()
    da.save_sharded(model, folder, optimizer)
    return contents(model, optimizer)


def loaded(rank, axes, folder, target=None):
    """A model of other weights that reads it, steps once (its own state is there), and may write it again."""
    model, optimizer = made(axes, seed=1)
    da.load_sharded(model, folder, optimizer)
    found = contents(model, optimizer)
    if target is not None:
        da.save_sharded(model, target, optimizer)
    step(model, optimizer)
    return found


def test_any_layout_to_any_other(tmp_path):
    """EP 2 -> TP 2 x EP 2 over FSDP -> TP 2 -> one process."""
    first, other = run_ranks(saved, 2, {"dp_shard": 2, "ep": 2}, tmp_path / "a")
    assert all(torch.equal(tensor, other[name]) for name, tensor in first.items())
    assert any(name.endswith("exp_avg_sq") for name in first)
    chain = [
        ({"dp_shard": 2, "tp": 2, "ep": 2}, 4, "a", "b"),
        ({"tp": 2}, 2, "b", "c"),
    ]
    for axes, world, source, target in chain:
        for found in run_ranks(loaded, world, axes, tmp_path / source, tmp_path / target):
            assert found.keys() == first.keys()
            assert [name for name in first if not torch.equal(found[name], first[name])] == []
    found = loaded(0, None, tmp_path / "c")
    assert [name for name in first if not torch.equal(found[name], first[name])] == []


def test_one_process_writes_for_ranks(tmp_path):
    expected = saved(0, None, tmp_path / "one")
    for found in run_ranks(loaded, 2, {"dp_shard": 2, "ep": 2}, tmp_path / "one"):
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def fp8_bytes(model):
    return {name: tensor.view(torch.uint8) for name, tensor in model.state_dict().items()}


def in_fp8(rank, folder):
    model = da.keep_fp8(small_models.model(CONFIG))
    da.save_sharded(da.parallelize(model, ParallelLayout(dp_shard=2, ep=2)), folder)


def test_weights_in_fp8(tmp_path):
    run_ranks(in_fp8, 2, tmp_path / "fp8")
    expected = da.keep_fp8(small_models.model(CONFIG))
    model = da.keep_fp8(small_models.model(CONFIG, seed=1))
    da.load_sharded(model, tmp_path / "fp8")
    assert torch.equal(model.model.layers[1].mlp.experts.down_proj, expected.model.layers[1].mlp.experts.down_proj)
    found, wanted = fp8_bytes(model), fp8_bytes(expected)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def test_other_folders_are_refused_alike(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        da.save_sharded(small_models.model(CONFIG), tmp_path)
    with pytest.raises(RankError) as caught:
        run_ranks(loaded, 2, {"tp": 2}, tmp_path)
    assert str(caught.value).count("ValueError: expected a folder that save_sharded wrote") == 2


def read_damaged(rank, folder):
    model, _ = made({"dp_shard": 2}, seed=1)
    before = {name: whole(tensor).clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        da.load_sharded(model, folder)
    assert all(torch.equal(whole(tensor), before[name]) for name, tensor in model.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize("bytes_left", [None, 1000])
def test_a_short_or_missing_file_is_told_before_anything_is_read(tmp_path, bytes_left):
    run_ranks(saved, 2, {"dp_shard": 2}, tmp_path / "a")
    name = "__1_0.distcp"
    file = tmp_path / "a" / name
    if bytes_left is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:bytes_left])
    first, second = run_ranks(read_damaged, 2, tmp_path / "a")
    assert first == second and "expected whole files in" in first and name in first


def test_arguments_of_other_types_are_named(tmp_path):
    model = small_models.model(CONFIG)
    for call in (da.save_sharded, da.load_sharded):
        with pytest.raises(ValueError, match="expected path to be"):
            call(model, 3)
        with pytest.raises(ValueError, match="expected model to be"):
            call("model", tmp_path)
        with pytest.raises(ValueError, match="expected optimizer to be"):
            call(model, tmp_path, "adam")


def test_a_module_without_tensors_is_no_checkpoint(tmp_path):
    """PyTorch asked for a process group."""
    for call in (da.save_sharded, da.load_sharded):
        folder = tmp_path / call.__name__
        if call is da.load_sharded:
            da.save_sharded(torch.nn.Linear(2, 2), folder)
        with pytest.raises(ValueError, match="expected a model with parameters, got ReLU without any"):
            call(torch.nn.ReLU(), folder)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    da.save_sharded(torch.nn.Linear(2, 3), tmp_path / "linear")
    other = torch.nn.LayerNorm(4)
    before = other.weight.clone()
    for model in (other, torch.nn.Linear(2, 4), torch.nn.Bilinear(2, 2, 3)):
        with pytest.raises(ValueError, match=r"expected '.*linear' to hold every tensor of this .*, got on rank 0"):
            da.load_sharded(model, tmp_path / "linear")
    assert torch.equal(other.weight, before)
