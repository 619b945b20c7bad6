"""Training: losses and every gradient against the float64 oracle, gradient checkpointing, a model that learns."""

import math

import pytest
import torch

from deepseek_arch.models.causal_lm import DeepseekLM
from support import oracle, published
from support.small_models import YARN, config, error, model, tokens

EPS32 = torch.finfo(torch.float32).eps
# As in test_model: about sixty chained products, amplified a few times.
TOLERANCE = 256 * EPS32
# Backward runs twice as many products, on top of the forward's errors.
GRADIENT_TOLERANCE = 4 * TOLERANCE


@pytest.mark.parametrize("kind", ["v3", "v2", "v2-lite"])
def test_loss_and_every_gradient_equal_the_equations(kind):
    """Experts that no token chose get zeros (TRAPS C15)."""
    cfg = config(kind, n_routed_experts=16, rope_scaling=YARN)
    ids = tokens(cfg, 2, 4)
    labels = ids.clone()
    labels[1, 3] = -100
    lm = model(cfg)
    loss = lm(ids, labels=labels).loss
    loss.backward()

    weights = {name: w.double().requires_grad_() for name, w in published.random_weights(cfg).items()}
    expected = oracle.next_token_loss(oracle.run_batch(cfg, weights, ids), labels)
    expected.backward()
    assert error(loss, expected) < TOLERANCE
    gradients = published.published_gradients(lm)
    unused = 0
    for name, weight in weights.items():
        if name.endswith("e_score_correction_bias"):
            assert weight.grad is None and name not in gradients
            continue
        assert gradients[name] is not None, f"{name} has no gradient"
        if weight.grad is None:
            unused += 1
            assert torch.count_nonzero(gradients[name]) == 0, name
        else:
            assert error(gradients[name], weight.grad) < GRADIENT_TOLERANCE, name
    assert unused >= 3, "the test needs experts that nobody chose"


def test_ids_and_labels_may_be_int32():
    cfg = config("v3", num_nextn_predict_layers=1)
    lm, ids = model(cfg), tokens(cfg, 2, 6)
    narrow, wide = lm(ids.int(), labels=ids.int()), lm(ids, labels=ids)
    assert torch.equal(narrow.loss, wide.loss) and torch.equal(narrow.mtp_loss, wide.mtp_loss)


def test_labels_that_are_all_ignored_give_zero():
    cfg = config("v3")
    lm, ids = model(cfg), tokens(cfg, 1, 5)
    loss = lm(ids, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss == 0 and all(torch.isfinite(p.grad).all() for p in lm.parameters())


def test_the_loss_is_float32_in_a_bfloat16_model():
    cfg = config("v3", num_hidden_layers=2)
    lm, ids = model(cfg).to(torch.bfloat16), tokens(cfg, 1, 9)
    out = lm(ids, labels=ids)
    assert out.loss.dtype == torch.float32
    assert error(out.loss, oracle.next_token_loss(out.logits.double(), ids)) < 16 * EPS32
    out.loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 and torch.isfinite(p.grad).all() for p in lm.parameters())


def test_gradient_checkpointing_gives_the_same_bits_and_recomputes():
    cfg = config("v3", num_nextn_predict_layers=1)
    ids, results = tokens(cfg, 2, 9), []
    for enabled in (False, True):
        lm = model(cfg).train()
        lm.gradient_checkpointing_enable(enabled)
        calls = []
        lm.model.layers[1].self_attn.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        out = lm(ids, labels=ids, attention_mask=torch.tensor([[0, 0] + [1] * 7, [1] * 9]))
        (out.loss + out.mtp_loss).backward()
        assert len(calls) == 1 + enabled
        results.append([out.loss.detach(), *(p.grad for p in lm.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_training_lowers_the_loss():
    """The whole is trainable from its own initialization: a tiny model learns one sequence by heart."""
    cfg = config("v3", num_nextn_predict_layers=1)
    torch.manual_seed(0)
    lm, ids = DeepseekLM(cfg, dtype=torch.float32).train(), tokens(cfg, 1, 16)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        out = lm(ids, labels=ids)
        (out.loss + 0.3 * out.mtp_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append((out.loss.item(), out.mtp_loss.item()))
    assert losses[0][0] == pytest.approx(math.log(cfg.vocab_size), rel=0.05)
    assert losses[-1][0] < 0.5 * losses[0][0] and losses[-1][1] < 0.5 * losses[0][1]
