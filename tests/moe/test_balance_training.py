"""Balancing while training: a task that collapses without it, accumulation, and losses that go together."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.training.skewed import chance_violation, train_skewed
from deepseek_arch.moe.balance_loss import BalanceLoss
from deepseek_arch.moe.expert_load import ExpertLoad, LoadHistory, draw_max_violation, read_loads
from deepseek_arch.moe.load_balancer import LoadBalancer, routers
from support.small_models import config, error, model, tokens

EPS32 = torch.finfo(torch.float32).eps

# ---------------------------------------------------------------- a skewed task

STEPS, LAST = 70, 30


@pytest.fixture(scope="module")
def runs():
    return {rate: train_skewed(rate, STEPS) for rate in (0.0, 1e-2)}


def _violations(history: LoadHistory) -> list[float]:
    """By layer, of the last steps together: what the biases' hunting back and forth leaves."""
    return [float(load.max() - 1) for load in history.mean(LAST).values()]


def test_experts_collapse_without_balancing_and_even_out_with_it(runs):
    """Three times what chance makes of even use (0.05 of 1,920 choices an expert) is the bound that is kept."""
    bound = 3 * chance_violation(LAST)
    assert 0.1 < bound < 0.2
    alone, balanced = (_violations(runs[rate][0]) for rate in (0.0, 1e-2))
    assert min(alone) > 0.5, "the task is not skewed"
    assert max(balanced) < bound
    for name in runs[0.0][0].shares:
        # Step by step too, where chance alone makes 0.29 of 64 choices an expert.
        steps = [sum(runs[rate][0].max_violation(name)[-LAST:]) / LAST for rate in (0.0, 1e-2)]
        assert steps[1] < 2 * chance_violation(1) < steps[0]


def test_both_runs_learn_and_balancing_costs_no_loss(runs):
    """The rest is the next token's entropy and more; a step's loss deviates by some 0.05, ten of them by 0.02."""
    ends = {rate: sum(losses[-10:]) / 10 for rate, (_, losses) in runs.items()}
    assert all(ends[rate] < losses[0] - 1 for rate, (_, losses) in runs.items())
    assert ends[1e-2] < ends[0.0] + 0.1


def test_the_picture_of_both_runs(runs, tmp_path):
    pytest.importorskip("matplotlib")
    histories = {"without balancing": runs[0.0][0], "with": runs[1e-2][0]}
    path = draw_max_violation(histories, tmp_path / "both.png", "Skewed")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000
    for nothing in ({}, {"empty": LoadHistory()}):
        with pytest.raises(ValueError, match="at least one step"):
            draw_max_violation(nothing, tmp_path / "none.png")


# ---------------------------------------------------------------- accumulation


def _accumulated(weigh, pieces: int, ids, mask=None):
    """One step of `pieces` calls -> gradients, biases, loads; weigh(out, rows) is what a call adds to the loss."""
    lm = model(config("v3", num_nextn_predict_layers=2)).train()
    lm.balance_loss = BalanceLoss(sequence=0.1)  # large enough to be seen in the gradients
    for rows in torch.arange(len(ids)).chunk(pieces):
        some = None if mask is None else mask[rows]
        weigh(lm(ids[rows], some, labels=ids[rows]), rows).backward()
    grads = {name: p.grad.clone() for name, p in lm.named_parameters()}
    loads = LoadBalancer(lm).step().loads
    return grads, {name: r.e_score_correction_bias.clone() for name, r in routers(lm).items()}, loads


def _difference(first, second) -> float:
    return max(error(grad, second[name]) for name, grad in first.items())


def test_four_batches_of_a_row_are_one_of_four_rows():
    """All losses together, each a mean over its call (TRAPS D7): a quarter of every call's, where calls are alike.

    Gradients of some thousand float32 products, summed in another order.
    """
    ids = tokens(config("v3"), 4, 9)
    whole = _accumulated(lambda out, rows: out.loss + 0.3 * out.mtp_loss, 1, ids)
    parts = _accumulated(lambda out, rows: (out.loss + 0.3 * out.mtp_loss) / 4, 4, ids)
    assert _difference(parts[0], whole[0]) < 200 * EPS32
    assert len(whole[2]) == 4  # two layers of the trunk and two prediction layers
    for name, load in whole[2].items():
        assert torch.equal(load, parts[2][name]) and torch.equal(whole[1][name], parts[1][name])


def test_batches_of_different_length_are_weighed_by_what_their_means_are_over():
    """Targets for the next-token loss and each depth's, rows for the balance loss; a quarter each is another loss."""
    ids, lengths = tokens(config("v3"), 4, 9), torch.tensor([9, 4, 6, 5])
    mask = (torch.arange(9) < lengths[:, None]).long()

    def by_targets(out, rows):
        # Rows of n tokens have n - 1 next tokens and n - 2, n - 3 further ahead.
        share = [float((lengths[rows] - k).sum() / (lengths - k).sum()) for k in (1, 2, 3)]
        depths = out.mtp_losses @ torch.tensor(share[1:]) / 2 + out.mtp_aux_losses.mean() * len(rows) / 4
        return share[0] * (out.loss - out.aux_loss) + out.aux_loss * len(rows) / 4 + 0.3 * depths

    whole = _accumulated(lambda out, rows: out.loss + 0.3 * out.mtp_loss, 1, ids, mask)
    weighed = _accumulated(by_targets, 4, ids, mask)
    alike = _accumulated(lambda out, rows: (out.loss + 0.3 * out.mtp_loss) / 4, 4, ids, mask)
    assert _difference(weighed[0], whole[0]) < 200 * EPS32
    assert _difference(alike[0], whole[0]) > 1e-2
    for other in (weighed, alike):  # counts are integers: biases care for no weights
        assert all(torch.equal(bias, other[1][name]) for name, bias in whole[1].items())


# ---------------------------------------------------------------- saved loads


def test_loads_are_saved_and_read(tmp_path):
    reports = [ExpertLoad({"a": torch.tensor([step, 3 * step]), "b": torch.tensor([0, 4])}, 0.5) for step in (1, 2)]
    history = LoadHistory()
    for report in reports:
        history.add(report)
    reports[0].save(tmp_path / "step.json")
    history.save(tmp_path / "steps.json")
    assert torch.equal(read_loads(tmp_path / "step.json")["a"], torch.tensor([1.0, 3.0]))
    assert torch.equal(read_loads(tmp_path / "steps.json")["a"], torch.tensor([0.5, 1.5]))
    again = LoadHistory.load(tmp_path / "steps.json")
    assert again.max_violation("b") == [1.0, 1.0]
    assert all(torch.equal(a, b) for a, b in zip(again.shares["a"], history.shares["a"], strict=True))
    with pytest.raises(ValueError, match="saved LoadHistory"):
        LoadHistory.load(tmp_path / "step.json")


def test_means_over_the_last_steps():
    history = LoadHistory({"a": [torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0])]})
    assert history.mean()["a"].tolist() == [1.0, 1.0]
    assert history.mean(2)["a"].tolist() == [0.5, 1.5]
    assert history.mean(9)["a"].tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        history.mean(0)


@pytest.mark.parametrize(
    "text, what",
    [
        ("{", "no JSON"),
        ("[1, 2]", "neither loads nor shares"),
        ('{"loads": {}}', "neither loads nor shares"),
        ('{"loads": {"a": [1, -1]}}', "at least 0 for 'a'"),
        ('{"loads": {"a": [1, "x"]}}', "at least 0 for 'a'"),
        ('{"loads": {"a": [1, NaN]}}', "at least 0 for 'a'"),
        ('{"shares": {"a": [[1, 1], [1]]}}', "at least 0 for 'a'"),
        ('{"shares": {"a": []}}', "at least 0 for 'a'"),
    ],
)
def test_files_that_hold_no_loads(tmp_path, text, what):
    (tmp_path / "loads.json").write_text(text)
    with pytest.raises(ValueError, match=what):
        read_loads(tmp_path / "loads.json")


@pytest.mark.parametrize("number", ["1e400", "1" + "0" * 400, "1e308", "-1", "NaN"])
def test_numbers_that_no_load_can_be(tmp_path, number):
    (tmp_path / "loads.json").write_text(f'{{"loads": {{"a": [1, {number}]}}}}')
    with pytest.raises(ValueError, match="numbers of at least 0"):
        read_loads(tmp_path / "loads.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_loads_are_read_from_files_alone(tmp_path):
    """A FIFO would be waited for."""
    os.mkfifo(tmp_path / "loads.json")
    with pytest.raises(OSError, match="expected a regular file, got a FIFO"):
        LoadHistory.load(tmp_path / "loads.json")


def test_a_rate_leaves_biases_finite():
    lm = model(config("v3"))
    for rate in (1e31, 1e308):
        with pytest.raises(ValueError, match="expected a finite rate >= 0, got"):
            LoadBalancer(lm, rate=rate)
        with pytest.raises(ValueError, match="expected a finite rate >= 0, got"):
            LoadBalancer(lm, rate=lambda step, rate=rate: rate).step()
