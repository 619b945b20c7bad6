"""transformers' Trainer on two processes, which have a published checkpoint's parameters half each (FSDP2)."""

from __future__ import annotations

import os

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import deepseek_arch as da
import deepseek_arch.hf as dhf
from deepseek_arch.checkpoint.synthetic import write_checkpoint
from support.ranks import run_ranks
from support.small_models import error, tokens

accelerate = pytest.importorskip("accelerate")

CONFIG = da.DeepseekConfig.from_pretrained("tiny").replace(num_hidden_layers=2, num_nextn_predict_layers=1)
ROWS = [{"input_ids": row, "labels": row} for row in tokens(CONFIG, 8, 10, seed=3)]
TOLERANCE = 1e-4
# What `accelerate launch --use_fsdp --fsdp_version 2` gives to its processes.
LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "ACCELERATE_TORCH_DEVICE": "cpu",
}
shards_at_loading = pytest.mark.skipif(
    not hasattr(PreTrainedModel, "is_distributed_loading_by_transformers"),
    reason="transformers whose Trainer takes no model that is cut already",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("trainer") / "bf16"
    write_checkpoint(path, CONFIG, "bf16", std=0.1, shards=2)
    return path


def trainer_of(folder, target, options, **loading):
    transformers.logging.set_verbosity_error()
    with dhf.registered():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, mtp_loss_weight=0.3, **loading)
    common = {"lr_scheduler_type": "constant", "logging_steps": 1, "report_to": [], "disable_tqdm": True, "seed": 1}
    return Trainer(model, TrainingArguments(str(target / "runs"), **common, **options), train_dataset=ROWS)


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(folder, target, rows, cpu=True, **loading):
    """Two steps on all rows from the files, and a checkpoint of the end; returns losses and parts of parameters."""
    steps = {"max_steps": 2, "per_device_train_batch_size": rows, "learning_rate": 0.05, "optim": "sgd"}
    trainer = trainer_of(folder, target, {"save_strategy": "no", "use_cpu": cpu, **steps}, **loading)
    model = trainer.model
    trainer.train()
    cut = {name: p.to_local().numel() / p.numel() for name, p in model.named_parameters() if hasattr(p, "to_local")}
    trainer.save_model(str(target / "saved"))
    return losses_of(trainer), cut


def cut_at_loading(rank, folder, target):
    from transformers.distributed import DistributedConfig

    os.environ["LOCAL_WORLD_SIZE"] = "2"  # which accelerate asks for where the processes are on CPUs
    return trained(folder, target, 2, distributed_config=DistributedConfig(fsdp_size=2))


def launch():
    """Makes of this rank a process of `accelerate launch`, which leaves FSDP out unless it finds an accelerator."""
    os.environ |= LAUNCHED
    kind = accelerate.utils.DistributedType.MULTI_GPU
    accelerate.PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", kind)


def cut_by_accelerate(rank, folder, target):
    launch()
    return trained(folder, target, 2, cpu=False)


@pytest.mark.parametrize("how", [pytest.param(cut_at_loading, marks=shards_at_loading), cut_by_accelerate])
def test_two_steps_and_the_saved_checkpoint_are_those_of_one_process(folder, tmp_path, how):
    losses, _ = trained(folder, tmp_path / "one", 4)
    assert len(losses) == 2
    for got, cut in run_ranks(how, 2, folder, tmp_path / "two"):
        assert got == pytest.approx(losses, rel=TOLERANCE)
        assert cut["model.layers.1.mlp.experts.gate_up_proj"] == cut["mtp.0.eh_proj.weight"] == 0.5
    before = da.load(folder, dtype=torch.float32).state_dict()
    expected, loaded = (da.load(tmp_path / name / "saved").state_dict() for name in ("one", "two"))
    assert loaded.keys() == expected.keys() == before.keys()
    moved = [name for name in expected if not torch.equal(expected[name], before[name])]
    assert len(moved) > len(expected) / 2
    worst = max(expected, key=lambda name: error(loaded[name], expected[name]))
    assert error(loaded[worst], expected[worst]) < TOLERANCE, worst
    with dhf.registered():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "saved").state_dict()
    assert again.keys() == loaded.keys() and all(torch.equal(again[name], loaded[name]) for name in loaded)


def resumed(rank, folder, target, checkpoint):
    launch()
    options = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "optim": "adamw_torch"}
    trainer = trainer_of(folder, target, {"save_strategy": "steps", "save_steps": 1, **options})
    trainer.train(resume_from_checkpoint=checkpoint)
    return losses_of(trainer)


def test_a_run_goes_on_from_its_checkpoint(folder, tmp_path):
    """With the weights and the moments of AdamW: the third loss depends on both."""
    first, second = run_ranks(resumed, 2, folder, tmp_path / "a", None)
    assert first == second and len(first) == 3
    assert da.load(tmp_path / "a" / "runs" / "checkpoint-1").load_report.loaded > 0
    for losses in run_ranks(resumed, 2, folder, tmp_path / "b", str(tmp_path / "a" / "runs" / "checkpoint-1")):
        assert losses == pytest.approx(first, rel=1e-6)
