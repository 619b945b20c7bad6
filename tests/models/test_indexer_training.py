"""Both stages of the indexers' training: losses and gradients against the float64 oracle, and what they do."""

from __future__ import annotations

import pytest
import torch

import deepseek_arch as da
from deepseek_arch.attention import indexer_loss as module
from support import oracle, published, small_models
from support.small_models import SPARSE_KINDS, config, error, tokens

TOKENS = 19  # index_topk is 6


def make(kind: str, **changes):
    cfg = config(kind, **changes)
    weights = published.random_weights(cfg)
    return small_models.model(cfg, weights=weights), weights


def divergences(cfg, weights, ids: list[int], stage: str) -> dict[int, torch.Tensor]:
    """Returns each layer's loss of one document: the mean over its queries; of the dense stage with dense attention."""
    weights = {name: w if w.dtype == torch.float64 else w.double() for name, w in weights.items()}
    x, out, losses = weights["model.embed_tokens.weight"][ids], oracle.Output(*[torch.empty(0)] * 2), {}
    for layer in range(cfg.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        h = oracle._norm(x, weights[prefix + "input_layernorm.weight"], cfg.rms_norm_eps)
        keys = [list(range(t + 1)) for t in range(len(ids))]
        if stage == "sparse":
            own = oracle.has_indexer(cfg, layer)
            keys = oracle.select_keys(cfg, weights, prefix + "self_attn.", h) if own else out.selected[layer - 1]
        out.selected[layer], shown = keys, []
        attended = oracle.attention(cfg, weights, prefix + "self_attn.", h, selected=keys, shown=shown)
        if oracle.has_indexer(cfg, layer):
            mass = torch.stack(shown).sum(0).detach()
            mass = mass / mass.sum(-1, keepdim=True)
            constants = {n: w if ".indexer." in n else w.detach() for n, w in weights.items()}
            scores = oracle.index_scores(cfg, constants, prefix + "self_attn.", h.detach())
            terms = []
            for t, own_keys in enumerate(keys):
                p, logs = mass[t, own_keys], scores[t, own_keys].log_softmax(-1)
                terms.append((torch.special.xlogy(p, p) - p * logs).sum())
            losses[layer] = torch.stack(terms).mean()
        x = x + attended
        h = oracle._norm(x, weights[prefix + "post_attention_layernorm.weight"], cfg.rms_norm_eps)
        moe = oracle.is_moe(cfg, layer)
        x = x + (oracle.moe(cfg, weights, prefix + "mlp.", h)[0] if moe else oracle._mlp(weights, prefix + "mlp.", h))
    return losses


def run(lm, ids, stage, mask=None):
    selection = da.KeySelection(stage=stage)
    out = lm(ids, mask, selection=selection)
    return out, selection


@pytest.fixture(params=[False, True], ids=["", "blocks"])
def blocks(request, monkeypatch) -> None:
    if request.param:  # two queries at a time
        monkeypatch.setattr(module, "_TRIPLES", 2 * 16 * TOKENS)


@pytest.mark.parametrize("stage", ["dense", "sparse"])
@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_losses_and_gradients_equal_the_oracle(kind, stage, blocks):
    lm, weights = make(kind)
    ids = tokens(lm.config, 1, TOKENS)
    out, selection = run(lm, ids, stage)
    leaves = {name: w.double().requires_grad_() for name, w in weights.items()}
    want = divergences(lm.config, leaves, ids[0].tolist(), stage)
    assert selection.losses.keys() == want.keys()
    for layer, loss in want.items():
        assert error(selection.losses[layer], loss) < 1e-5
    torch.stack(list(want.values())).sum().backward()
    out.indexer_loss.backward()
    for name, grad in published.published_gradients(lm).items():
        if ".indexer." in name:
            assert error(grad, leaves[name].grad) < 1e-4, name
        else:
            assert grad is None, name  # the loss trains indexers alone


@pytest.mark.parametrize("stage", ["dense", "sparse"])
@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_padding_and_other_rows_do_not_count(kind, stage):
    lm, _ = make(kind)
    ids, mask = tokens(lm.config, 2, TOKENS), torch.ones(2, TOKENS, dtype=torch.long)
    mask[0, :5] = 0
    with torch.no_grad():
        out, _ = run(lm, ids, stage, mask)
        alone = [run(lm, ids[0:1, 5:], stage)[0].indexer_loss, run(lm, ids[1:2], stage)[0].indexer_loss]
    want = (alone[0] * (TOKENS - 5) + alone[1] * TOKENS) / (2 * TOKENS - 5)
    assert error(out.indexer_loss, want) < 1e-5


def test_the_warm_up_attends_to_all_keys():
    lm, weights = make("v32")
    dense = {"model_type": "deepseek_v3", "index_topk": None, "index_n_heads": None, "index_head_dim": None}
    plain = small_models.model(
        lm.config.replace(**dense), weights={n: w for n, w in weights.items() if ".indexer." not in n}
    )
    ids = tokens(lm.config, 2, TOKENS)
    with torch.no_grad():
        out, selection = run(lm, ids, "dense")
        assert torch.equal(out.logits, plain(ids).logits)
    for recall in selection.recall.values():
        assert 0.2 < float(recall) < 1  # random indexers


def test_stages_of_a_dense_model(tmp_path):
    """From V3 to V3.2: the same weights; the warm-up raises the recall, and sparse attention then loses little."""
    dense = small_models.model(config("v3", num_nextn_predict_layers=1))
    ids = tokens(dense.config, 4, 40)
    with torch.no_grad():
        before = dense(ids, labels=ids).loss
    state = {name: t.clone() for name, t in dense.state_dict().items()}
    lm = da.sparse_from_dense(dense, index_topk=6, index_n_heads=16, index_head_dim=16)
    assert lm.config.model_type == "deepseek_v32"
    parameters = da.train_only_indexers(lm)
    assert len(parameters) == 5 * 4  # three layers and an MTP module
    optimizer, losses, recalls = torch.optim.AdamW(parameters, lr=1e-2), [], []
    for _ in range(30):
        loss, selection = da.indexer_warm_up(lm, ids)
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in parameters)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        recalls.append(min(map(float, selection.recall.values())))
    assert set(selection.losses) == {0, 1, 2, 3}
    assert losses[-1] < 0.7 * losses[0] and recalls[-1] > recalls[0] + 0.05
    for name, tensor in lm.state_dict().items():
        if ".indexer." not in name:
            assert torch.equal(tensor, state[name]), name
    lm.requires_grad_(True)
    out = da.sparse_training(lm, ids, labels=ids)
    (out.loss + out.mtp_loss + out.indexer_loss).backward()
    assert float(out.loss) != float(before)
    da.save(lm, tmp_path)
    assert da.load(tmp_path).config.index_topk == 6


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "indexers"])
@pytest.mark.parametrize("stage", ["dense", "sparse"])
@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_recomputed_layers_give_the_same_losses_and_gradients(kind, stage, frozen):
    """Bit for bit: the same operations again. GLM-5's layers share what a layer before has selected."""
    depth = {} if kind == "glm-5" else {"num_nextn_predict_layers": 1}
    runs = []
    for recompute in (False, True):
        lm = make(kind, **depth)[0].train()
        lm.gradient_checkpointing_enable(recompute)
        if frozen:
            da.train_only_indexers(lm)
        ids, selection = tokens(lm.config, 2, TOKENS), da.KeySelection(stage=stage)
        out = lm(ids, labels=ids, selection=selection)
        (out.indexer_loss + (0.0 if frozen else out.loss)).backward()
        grads = {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}
        runs.append((out.indexer_loss, selection, grads))
    (loss, kept, expected), (again, found, grads) = runs
    assert torch.equal(again, loss) and grads.keys() == expected.keys()
    assert all(torch.equal(grads[name], grad) for name, grad in expected.items())
    assert {name for name in grads if ".indexer." in name}
    for name in ("losses", "recall"):
        before, after = getattr(kept, name), getattr(found, name)
        assert before.keys() == after.keys() and all(
            torch.equal(after[layer], value) for layer, value in before.items()
        )


class Kept:
    """Bytes that the graph keeps for the backward pass, of arguments of checkpoints too."""

    def __init__(self, monkeypatch) -> None:
        self.largest = 0
        real = module.checkpoint

        def watching(function, *operands, **kwargs):
            given = [t for t in operands if isinstance(t, torch.Tensor)]
            self.largest = max([self.largest, *(t.untyped_storage().nbytes() for t in given)])
            return real(function, *operands, **kwargs)

        monkeypatch.setattr(module, "checkpoint", watching)


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_nothing_as_large_as_queries_times_keys_is_kept(stage, monkeypatch):
    """Twice the tokens, twice the memory of the largest tensor; the mass of a block of all queries would take four."""
    lm, _ = make("v32")
    largest = []
    for length in (256, 512):
        with monkeypatch.context() as patched:
            kept = Kept(patched)
            run(lm, tokens(lm.config, 1, length), stage)
        largest.append(kept.largest)
    assert largest[1] == 2 * largest[0]


def test_the_mass_is_in_float32_under_autocast():
    torch.manual_seed(0)
    q, expanded, rotated = torch.randn(1, 4, 2, 24) * 3, torch.randn(1, 8, 2, 16) * 3, torch.randn(1, 8, 8) * 3
    seen = torch.ones(1, 4, 8, dtype=torch.bool)
    expected = module.attention_mass(q, expanded, rotated, seen, 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.attention_mass(q, expanded, rotated, seen, 0.2), expected)


def test_settings_of_a_dense_model_stay():
    dense = small_models.model(config("v3", num_nextn_predict_layers=1))
    dense.balance_loss, dense.mtp_detached = da.BalanceLoss(sequence=0.5), True
    dense.capacity, dense.generation_config = da.TokenDropping(1.5), {"eos_token_id": 3}
    dense.gradient_checkpointing_enable()
    lm = da.sparse_from_dense(dense, index_topk=6, index_n_heads=16, index_head_dim=16)
    for name in ("balance_loss", "mtp_detached", "capacity", "generation_config"):
        assert getattr(lm, name) == getattr(dense, name)
    assert lm.model.gradient_checkpointing


@pytest.mark.parametrize("recompute", [False, True])
def test_the_selection_of_an_mtp_module_is_recorded(recompute):
    lm, _ = make("v32", num_nextn_predict_layers=1)
    lm.train().gradient_checkpointing_enable(recompute)
    ids, selection = tokens(lm.config, 1, TOKENS), da.KeySelection(record=True)
    lm(ids, labels=ids, selection=selection)
    assert set(selection.ids) == set(range(lm.config.num_hidden_layers + 1))


def test_mistakes_are_named():
    dense = small_models.model(config("v3"))
    with pytest.raises(ValueError, match="expected no KeySelection"):
        da.indexer_warm_up(dense, tokens(dense.config, 1, 8))
    with pytest.raises(ValueError, match="got one without an indexer"):
        da.train_only_indexers(dense)
    with pytest.raises(ValueError, match="expected a deepseek_v3 with dense attention"):
        da.sparse_from_dense(small_models.model(config("v32")))
    lm, _ = make("v32")
    with pytest.raises(ValueError, match="expected no cache with the loss of the indexers"):
        lm(tokens(lm.config, 1, 8), cache=lm.new_cache(1), selection=da.KeySelection(stage="dense"))
