"""Multi-token prediction: TRAPS F1 to F8."""

import pytest
import torch

from deepseek_arch.config.deepseek_config import DeepseekConfig
from deepseek_arch.models.mtp_loss import mtp_weight, shift_labels, shift_left
from support import oracle, published
from support.small_models import KINDS, YARN, config, error, model, tokens

# As for the trunk (test_model), with one or two layers more.
TOLERANCE = 512 * torch.finfo(torch.float32).eps


CHAINS = {"head_norm": "post_norm", "block": "pre_norm"}  # the oracle's words


def _drafts(lm, ids):
    """Logits of every depth, [B, T - k, V] for depth k, and the trunk's output."""
    trunk = lm.model(ids)
    hidden, out = lm.mtp_hidden(trunk), []
    for depth in range(len(lm.mtp)):
        next_ids = shift_left(ids, depth + 1)
        logits, hidden = lm.mtp_forward(hidden, next_ids, depth, rope=trunk.rope, mask=trunk.mask)
        out.append(logits[:, : ids.shape[1] - depth - 1])
    return out, trunk


def _expected(cfg, weights, ids):
    rows = [oracle.run(cfg, weights, row.tolist(), mtp_chain=CHAINS[cfg.mtp_chain]).mtp for row in ids]
    return [torch.stack(depth) for depth in zip(*rows, strict=True)]


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("which", ["post_norm", "pre_norm"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_equal_the_equations(kind, which, chain):
    """TRAPS F1 to F3: embedding first, the hidden state the config names; two depths, the second on the first."""
    cfg = config(kind, num_nextn_predict_layers=2, mtp_input=which, mtp_chain=chain, rope_scaling=YARN)
    ids = tokens(cfg, 2, 14)
    got, _ = _drafts(model(cfg), ids)
    expected = _expected(cfg, published.random_weights(cfg), ids)
    assert [error(g, e) < TOLERANCE for g, e in zip(got, expected, strict=True)] == [True, True]


def test_the_default_input_is_after_the_final_norm():
    """TRAPS F2: the released weights' reading by every serving engine."""
    assert DeepseekConfig.from_pretrained("deepseek-v3").mtp_input == "post_norm"


def test_the_default_chain_is_after_the_head_norm():
    """TRAPS F3: transformers, torchtitan, Megatron, SGLang, TensorRT-LLM and vLLM; the file need not say so."""
    default = DeepseekConfig.from_pretrained("deepseek-v3")
    assert default.mtp_chain == "head_norm" and "mtp_chain" not in default.to_dict()
    block = default.replace(mtp_chain="block")
    assert DeepseekConfig.from_dict(block.to_dict()).mtp_chain == "block"


@torch.no_grad()
def test_other_readings_are_visible():
    """TRAPS F1, F2, F5 and F6: each other reading changes the logits far beyond the tolerance above."""
    cfg = config("v3", num_nextn_predict_layers=1)
    lm, ids = model(cfg), tokens(cfg, 1, 10)
    weights = published.random_weights(cfg)
    (got,), _ = _drafts(lm, ids)
    draft = "model.layers.3."
    hidden_first = {draft + "eh_proj.weight": weights[draft + "eh_proj.weight"].roll(cfg.hidden_size, 1)}
    trunk_norm = {draft + "shared_head.norm.weight": weights["model.norm.weight"]}
    for reading in (hidden_first, trunk_norm):
        (wrong,) = _expected(cfg, weights | reading, ids)
        assert error(wrong, got) > 0.05
    (wrong,) = _expected(cfg.replace(mtp_input="pre_norm"), weights, ids)
    assert error(wrong, got) > 0.05
    # The embedding at position 0 is not zeroed.
    trunk = lm.model(ids)
    embeds = lm.model.embed_tokens(shift_left(ids, 1))
    embeds[:, 0] = 0
    _, zeroed = lm.mtp[0](trunk.hidden_states, embeds, trunk.rope)
    assert error(lm.lm_head(zeroed)[:, :9], got) > 0.05


@torch.no_grad()
def test_positions_may_be_counted_from_the_state_or_from_the_token():
    """TRAPS F4: rows keep the position of h_i; transformers counts one further, which rotary scores cannot tell."""
    cfg = config("v3", num_nextn_predict_layers=1)
    lm, ids = model(cfg), tokens(cfg, 1, 10)
    (got,), trunk = _drafts(lm, ids)
    shifted = lm.model.rope(torch.arange(1, 11)[None])
    logits, _ = lm.mtp_forward(trunk.hidden_states, shift_left(ids, 1), rope=shifted)
    assert error(logits[:, :9], got) < 4 * TOLERANCE


def test_embedding_and_head_are_the_trunks():
    """TRAPS F6: no copies among the parameters; the norm before the head is the module's own."""
    cfg = config("v3", num_nextn_predict_layers=2)
    lm = model(cfg)
    names = {name for name, _ in lm.named_parameters() if name.startswith("mtp.")}
    assert not any("embed_tokens" in name or "head.weight" in name or "lm_head" in name for name in names)
    for depth in range(2):
        assert lm.mtp[depth].shared_head.norm is not lm.model.norm
        assert f"mtp.{depth}.shared_head.norm.weight" in names


def test_layers_are_numbered_after_the_trunk():
    """TRAPS F7: `num_hidden_layers + k`, never 61; with experts even where the trunk's pattern would have none."""
    cfg = config("v3", num_hidden_layers=5, num_nextn_predict_layers=2, moe_layer_freq=2)
    lm = model(cfg)
    assert [layer.layer_idx for layer in lm.mtp] == [5, 6]
    assert all(hasattr(layer.mlp, "gate") for layer in lm.mtp)
    drafts = {name.split(".")[2] for name in published.published_state(lm) if "eh_proj" in name}
    assert drafts == {"5", "6"}


def _oracle_loss(cfg, weights, ids, labels, mask=None, documents=None):
    """Mean over depths; each depth averages over its own targets, none beyond its row or document (TRAPS F8)."""
    terms = [[] for _ in range(cfg.num_nextn_predict_layers)]
    for row in range(ids.shape[0]):
        kept = [t for t in range(ids.shape[1]) if mask is None or mask[row, t]]
        start = 0
        for size in documents or [len(kept)]:
            where = kept[start : start + size]
            out = oracle.run(cfg, weights, ids[row, where].tolist())
            for k, logits in enumerate(out.mtp, 1):
                for i in range(size - k - 1):
                    target = labels[row, where[i + k + 1]]
                    if target != -100:
                        terms[k - 1].append(-torch.log_softmax(logits[i], -1)[target])
            start += size
    return torch.stack([torch.stack(depth).mean() for depth in terms]).mean()


def _cases():
    ids = torch.arange(20).view(2, 10)
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[0, :4], right[0, 7:] = 0, 0
    ignored = ids.clone()
    ignored[0, 4:6] = -100
    packed = torch.cat([torch.arange(4), torch.arange(6)]).expand(2, -1)
    return {
        "plain": {},
        "ignored": {"labels": ignored},
        "left-padding": {"mask": left},
        "right-padding": {"mask": right},
        "packed": {"documents": [4, 6], "positions": packed},
    }


@pytest.mark.parametrize("case", _cases().values(), ids=_cases())
def test_loss_and_gradients_equal_the_equations(case):
    """TRAPS F8: masked at row ends, document ends and padding; also where nobody ignored the padding's labels."""
    cfg = config("v3", num_nextn_predict_layers=2)
    ids = torch.arange(20).view(2, 10)
    labels, mask = case.get("labels", ids), case.get("mask")
    lm = model(cfg)
    out = lm(ids, attention_mask=mask, position_ids=case.get("positions"), labels=labels)
    out.mtp_loss.backward()
    weights = {name: w.double().requires_grad_() for name, w in published.random_weights(cfg).items()}
    expected = _oracle_loss(cfg, weights, ids, labels, mask, case.get("documents"))
    expected.backward()
    assert error(out.mtp_loss, expected) < TOLERANCE
    gradients = published.published_gradients(lm)
    for name, weight in weights.items():
        if weight.grad is not None:
            assert error(gradients[name], weight.grad) < 4 * TOLERANCE, name
    for name in ("model.layers.3.eh_proj.weight", "model.layers.4.eh_proj.weight", "lm_head.weight"):
        assert weights[name].grad is not None and weights[name].grad.any()


def test_losses_and_accuracies_by_depth():
    cfg = config("v3", num_nextn_predict_layers=2)
    lm, ids = model(cfg), tokens(cfg, 2, 12)
    out = lm(ids, labels=ids)
    assert torch.equal(out.mtp_losses.mean(), out.mtp_loss)
    trunk = lm.model(ids)
    hidden = lm.mtp_hidden(trunk)
    for depth in range(2):
        logits, hidden = lm.mtp_forward(hidden, shift_left(ids, depth + 1), depth, rope=trunk.rope, mask=trunk.mask)
        guesses, targets = logits.argmax(-1)[:, : 10 - depth], ids[:, depth + 2 :]
        assert float(out.mtp_accuracy[depth]) == pytest.approx(float((guesses == targets).float().mean()), abs=1e-6)
    lm.lm_head.weight.data.zero_()  # every guess is token 0
    ids[:] = 0
    assert lm(ids, labels=ids).mtp_accuracy.tolist() == [1.0, 1.0]


def test_a_detached_loss_trains_the_prediction_layers_alone():
    """TRAPS F12: their gradients are the same, and trunk, embedding and head have none."""
    cfg = config("v3", num_nextn_predict_layers=2)
    ids, grads = tokens(cfg, 2, 12), []
    for detached in (False, True):
        lm = model(cfg)
        lm.mtp_detached = detached
        lm(ids, labels=ids).mtp_loss.backward()
        grads.append({name: p.grad for name, p in lm.named_parameters() if p.grad is not None})
    assert grads[1].keys() == {name for name in grads[0] if name.startswith("mtp.")}
    assert "model.embed_tokens.weight" in grads[0] and "lm_head.weight" in grads[0]
    assert all(torch.equal(grad, grads[0][name]) for name, grad in grads[1].items())


def test_the_weight_of_the_loss_follows_v3():
    assert [mtp_weight(t) for t in (0, 9.9e12, 10e12, 14.8e12)] == [0.3, 0.3, 0.1, 0.1]


def test_the_next_token_loss_does_not_contain_it():
    cfg = config("v3", num_nextn_predict_layers=1)
    ids = tokens(cfg, 2, 8)
    with_drafts, without = model(cfg), model(cfg.replace(num_nextn_predict_layers=0))
    assert torch.equal(with_drafts(ids, labels=ids).loss, without(ids, labels=ids).loss)
    assert without(ids, labels=ids).mtp_loss is None
    with pytest.raises(ValueError, match="num_nextn_predict_layers 0"):
        without.new_mtp_cache(1)


@pytest.mark.parametrize("chunks", [[9], [4, 5], [1] * 9, [5, 1, 3]], ids=str)
@torch.no_grad()
def test_own_cache(chunks):
    """Drafting step by step equals the whole row at once."""
    cfg = config("v3", num_nextn_predict_layers=2)
    lm, ids = model(cfg), tokens(cfg, 2, 9)
    trunk = lm.model(ids)
    cos, sin = trunk.rope
    caches, start = lm.new_mtp_cache(2), 0
    assert caches.num_layers == 2
    whole, _ = _drafts(lm, ids)
    parts = [[], []]
    for size in chunks:
        now, hidden = slice(start, start + size), trunk.hidden_states[:, start : start + size]
        for depth in range(2):
            next_ids = shift_left(ids, depth + 1)[:, now]
            logits, hidden = lm.mtp_forward(hidden, next_ids, depth, rope=(cos[:, now], sin[:, now]), cache=caches)
            parts[depth].append(logits)
        start += size
    for depth in range(2):
        assert error(torch.cat(parts[depth], 1)[:, : 8 - depth], whole[depth]) < TOLERANCE


def test_shifts():
    x = torch.tensor([[1, 2, 3, 4]])
    assert shift_left(x, 1).tolist() == [[2, 3, 4, 0]] and shift_left(x, 6, 9).tolist() == [[9] * 4]
    documents = torch.tensor([[0, 0, 0, 1]])
    assert shift_labels(x, 1).tolist() == [[2, 3, 4, -100]]
    assert shift_labels(x, 1, documents).tolist() == [[2, 3, -100, -100]]
    assert shift_labels(x, 2, documents).tolist() == [[3, -100, -100, -100]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_routers_of_modules_count_real_tokens_with_a_real_next_one(side):
    """The last padding before a prompt is followed by a real token, and is none."""
    lm = model(config("v3", num_nextn_predict_layers=2)).train()
    ids, mask = tokens(lm.config, 2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    mask = mask if side == "left" else mask.flip(1)
    lm(ids, mask, labels=ids)
    for depth, layer in enumerate(lm.mtp):
        counted = (5 - depth - 1) + (8 - depth - 1)
        assert int(layer.mlp.gate.load.sum()) == counted * lm.config.num_experts_per_tok, depth


@pytest.mark.parametrize("recompute", [False, True])
def test_modules_run_again_in_the_backward_pass_where_layers_do(recompute):
    lm = model(config("v3", num_nextn_predict_layers=1)).train()
    lm.gradient_checkpointing_enable(recompute)
    calls = []
    lm.mtp[0].self_attn.register_forward_hook(lambda *args: calls.append(1))
    ids = tokens(lm.config, 1, 8)
    out = lm(ids, labels=ids)
    assert len(calls) == 1
    out.mtp_loss.backward()
    assert len(calls) == 1 + recompute
