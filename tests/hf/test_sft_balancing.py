"""Balancing in other people's loops: accelerate's, on one process and on two, and TRL's SFTTrainer."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
import torch.multiprocessing as mp

import deepseek_arch.hf as dhf
from support import small_models
from support.balance_oracle import watched_balance
from support.small_models import tokens

accelerate = pytest.importorskip("accelerate")
from accelerated import CONFIG, RATE, accelerated, biases, on_rank  # noqa: E402


@pytest.fixture
def own_state():
    """accelerate keeps one state for the process; the trainers of other tests find none of ours."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def whole_steps(after: torch.Tensor, before: torch.Tensor) -> int:
    """The most updates that a bias has gone one way; that they are whole is checked, up to rounding."""
    steps = (after - before) / RATE
    assert (steps - steps.round()).abs().max() < 1e-5
    return int(steps.round().abs().max())


def test_accelerate_balances_once_per_optimizer_step(own_state):
    """Eight batches of two rows in steps of two batches are four of four: the same counts, the same biases."""
    rows = tokens(CONFIG, 16, 9)
    reports, moved = accelerated(rows, 2, 2)
    expected, same = accelerated(rows, 1, 4)
    assert len(reports) == len(expected) == 4
    for report, other in zip(reports, expected, strict=True):
        assert report.loads.keys() == other.loads.keys() and len(report.loads) == 3
        assert all(torch.equal(load, other.loads[name]) for name, load in report.loads.items())
    assert {int(load.sum()) for name, load in reports[0].loads.items() if "mtp" not in name} == {4 * 9 * 3}
    before = biases(small_models.model(CONFIG))
    for name, bias in moved.items():
        assert torch.equal(bias, same[name])
        assert 1 <= whole_steps(bias, before[name]) <= 4


def test_accelerate_on_two_processes_sums_their_counts(own_state, unused_port):
    """Two processes, two batches of two rows each, are one of eight rows: every process moves the same biases."""
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(on_rank, (unused_port, results), nprocs=2)
        (reports, moved), other = results[0], results[1]
    assert (reports, moved) == other and len(reports) == 2
    expected, same = accelerated(tokens(CONFIG, 16, 9), 1, 8)
    assert reports == [{name: load.tolist() for name, load in each.loads.items()} for each in expected]
    assert moved == {name: bias.tolist() for name, bias in same.items()}


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sft_with_biases_and_a_balance_loss(folder_of, tokenizer, tmp_path, accumulation, capsys):
    """Two steps of TRL's SFTTrainer: biases move once a step, losses are finite, and what is balanced is logged."""
    pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from trl import SFTConfig, SFTTrainer

    folder = tmp_path / "model"
    shutil.copytree(folder_of("v3", num_nextn_predict_layers=1), folder)
    tokenizer.save_pretrained(folder)
    texts = [" ".join(f"w{(7 * row + i) % 58}" for i in range(6 + row % 5)) for row in range(8)]
    callback = dhf.LoadBalancingCallback(rate=RATE)
    with dhf.registered():
        trainer = SFTTrainer(
            str(folder),
            args=SFTConfig(
                str(tmp_path / "out"),
                max_length=32,
                max_steps=2,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=accumulation,
                router_aux_loss_coef=0.01,
                learning_rate=1e-3,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
            ),
            train_dataset=datasets.Dataset.from_dict({"text": texts}),
            processing_class=tokenizer,
            callbacks=[callback],
        )
        before = biases(trainer.model)
        gates = [layer.mlp.gate for layer in trainer.model.model.layers[1:]]
        with watched_balance(trainer.model.model, gates, CONFIG.num_experts_per_tok) as balance:
            trainer.train()
    assert type(trainer.model) is dhf.DeepseekForCausalLM
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and len(balance) == 2 * accumulation
    for step, entry in enumerate(logs):
        assert math.isfinite(entry["loss"]) and entry["max_violation"] > 0
        expected = sum(balance[step * accumulation : (step + 1) * accumulation]) / accumulation
        assert entry["aux_loss"] == pytest.approx(expected, rel=2e-4)  # logged to four digits
    main = {name: bias for name, bias in biases(trainer.model).items() if not name.startswith("mtp.")}
    assert len(main) == 2 and all(len(steps) == 2 for steps in callback.history.shares.values())
    for name, bias in main.items():
        assert 1 <= whole_steps(bias, before[name]) <= 2
    # TRL computes its own loss from the main model: the MTP modules see no token.
    assert torch.equal(biases(trainer.model)["mtp.0.mlp.gate"], before["mtp.0.mlp.gate"])
