"""MTP modules and indexers that no loss reaches: they change nothing, on one process and on several."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.multiprocessing as mp
from data_parallel import CONFIG, batches, made, on_rank, steps

import deepseek_arch as da
from support.small_models import error, tokens

KINDS = (
    *("core", "core recomputing", "hf", "hf recomputing", "hf logits", "hf adapters", "hf adapters recomputing"),
    *("core sparse", "core sparse recomputing", "hf sparse", "hf sparse recomputing"),
)
SAME = 100 * torch.finfo(torch.float32).eps  # averaged over processes, or over rows: sums in another order


@pytest.mark.parametrize("kind", ["core", "hf", "hf recomputing", "hf logits"])
def test_they_get_no_gradient(kind):
    """None, so that no optimizer touches them."""
    model = made(kind)
    if kind == "core":
        model.balance_loss = da.BalanceLoss()  # which is part of the loss for their routers too
    ids = tokens(CONFIG, 2, 9)
    out = model(input_ids=ids, labels=None if "logits" in kind else ids)
    (out.logits.square().mean() if "logits" in kind else out.loss).backward()
    assert all(p.grad is None for p in model.mtp.parameters())
    assert all(p.grad is not None for n, p in model.named_parameters() if not n.startswith("mtp."))


@pytest.mark.parametrize("kind", ["core sparse", "hf sparse recomputing"])
def test_indexers_get_no_gradient_from_the_next_token(kind):
    model = made(kind)
    ids = tokens(CONFIG, 2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {name for name, _ in model.named_parameters() if ".indexer." in name or name.startswith("mtp.")}


def test_what_weighs_them_trains_them():
    model = made("core")
    ids = tokens(CONFIG, 2, 9)
    out = model(ids, labels=ids)
    (out.loss + 0.3 * out.mtp_loss).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.mtp.parameters())


def test_nothing_is_connected_in_evaluation_or_without_gradients():
    model = made("hf").eval()
    ids = tokens(CONFIG, 1, 5)
    assert "Connected" not in type(model(ids, output_hidden_states=True).logits.grad_fn).__name__
    with torch.no_grad():
        assert model.train()(ids).logits.grad_fn is None


def test_data_parallel_training_is_training_on_all_rows():
    """Without it: gradients of the first step that are not averaged, and an error in the second."""
    pytest.importorskip("peft")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(on_rank, (port, KINDS, results), nprocs=2)
        found = dict(results)
    for kind in KINDS:
        expected = steps(made(kind), kind, batches())
        for rank in (0, 1):
            got = found[rank][kind]
            assert got.keys() == expected.keys()
            for name, weight in expected.items():
                assert error(torch.tensor(got[name]), weight) < SAME, (kind, rank, name)
