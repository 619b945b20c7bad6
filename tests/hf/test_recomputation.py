"""Recomputed layers and recorded outputs: records have gradients, and evaluation takes none of them for logits."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from test_mtp_training import CONFIG, SAME, gradients, weighted
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments
from twins import ours

from support.small_models import error, tokens


def recomputing(model, how):
    if how == "a function of the user's":
        # Trainers that bring a function of their own for it recompute as `use_reentrant=True` does.
        own = functools.wraps(checkpoint)(lambda *args: checkpoint(*args, use_reentrant=True))
        model._set_gradient_checkpointing(True, own)
    else:
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    model.enable_input_require_grads()


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "a function of the user's"])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_router_logits_have_gradients(weight, how):
    """Of the balance loss, the main model's and the MTP modules', and of a loss that the user makes of the logits."""
    ids, results = tokens(CONFIG, 2, 9), []
    for recompute in (False, True):
        model = weighted(weight, output_router_logits=True, router_aux_loss_coef=0.3)
        if recompute:
            recomputing(model, how)
        out = model(ids, labels=ids)
        (out.loss + sum(logits.square().mean() for logits in out.router_logits)).backward()
        results.append((out.aux_loss, gradients(model)))
    assert error(results[1][0], results[0][0]) < SAME
    assert results[0][1].keys() == results[1][1].keys()
    for name, grad in results[0][1].items():
        assert error(results[1][1][name], grad) < SAME, name


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
def test_mtp_modules_that_are_trained_alone_are_trained(how):
    """`use_reentrant=True` gives no gradients where no input asks for them."""
    ids, results = tokens(CONFIG, 2, 9), []
    for recompute in (False, True):
        model = weighted()
        model.mtp_detached = True
        if recompute:
            recomputing(model, how)
        model(ids, labels=ids).mtp_loss.backward()
        results.append({name: grad for name, grad in gradients(model).items() if name.startswith("mtp.")})
    assert results[0] and results[0].keys() == results[1].keys()
    for name, grad in results[0].items():
        assert error(results[1][name], grad) < SAME, name


def test_outputs_that_would_have_no_gradients_are_refused():
    model = ours(CONFIG).train()
    model.set_attn_implementation("eager")
    ids = tokens(CONFIG, 1, 5)
    recomputing(model, "reentrant")
    with pytest.raises(ValueError, match=r'"use_reentrant": False.*output_attentions'):
        model(ids, output_attentions=True)
    with torch.no_grad():
        assert len(model(ids, output_attentions=True).attentions) == CONFIG.num_hidden_layers
    hidden = []
    for how in ("not reentrant", None):
        model = ours(CONFIG).train()
        model.set_attn_implementation("eager")
        if how is not None:
            recomputing(model, how)
        out = model(ids, output_attentions=True, output_hidden_states=True)
        (out.hidden_states[1].square().sum() + out.attentions[1].square().sum()).backward()
        hidden.append(gradients(model))
    for name, grad in hidden[1].items():
        assert error(hidden[0][name], grad) < SAME, name


def test_evaluation_predicts_logits_whatever_else_is_returned(tmp_path, capsys):
    """Natively router logits and the balance loss come along, and metrics read the first as the predictions."""
    pytest.importorskip("accelerate")
    model = weighted(0.3, output_router_logits=True)
    ids = tokens(CONFIG, 3, 9)
    seen = []
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=2),
        eval_dataset=[{"input_ids": row, "labels": row} for row in ids],
        compute_metrics=lambda prediction: seen.append(prediction) or {},
    )
    trainer.evaluate()
    with torch.no_grad():
        expected = model.eval()(ids).logits
    assert isinstance(seen[0].predictions, np.ndarray) and seen[0].predictions.shape == tuple(expected.shape)
    assert error(torch.tensor(seen[0].predictions), expected) < SAME
