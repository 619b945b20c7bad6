"""Models with sparse attention against the float64 oracle, in every way to run them; sequences beyond `index_topk`.

(TRAPS G4: up to `index_topk` tokens everything is selected, and no error in the indexer shows.)
"""

from __future__ import annotations

import pytest
import torch

import deepseek_arch as da
from deepseek_arch.attention.key_selection import KeySelection
from deepseek_arch.attention.sparse_attention import SparseLatentAttention
from support import oracle, published, small_models
from support.small_models import SPARSE_KINDS, YARN, config, error, tokens

TOKENS = 21  # index_topk is 6


def built(kind: str, **changes) -> tuple[da.DeepseekLM, dict[str, torch.Tensor]]:
    cfg = config(kind, **changes)
    weights = published.random_weights(cfg)
    return small_models.model(cfg, weights=weights), weights


@pytest.fixture(params=["gathered", "masked", "either"])
def form(request, monkeypatch) -> str:
    """Both forms of attention, whatever they cost, and the choice between them."""
    if request.param != "either":
        prefers = request.param == "gathered"
        monkeypatch.setattr(SparseLatentAttention, "prefers_gathered", lambda *_: prefers)
    return request.param


def selected(selection: KeySelection, layer: int, row: int) -> list[list[int]]:
    return [[s for s in keys if s >= 0] for keys in selection.ids[layer][row].tolist()]


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": YARN}], ids=["", "yarn"])
@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_logits_and_selections_equal_the_oracle(kind, changes, form):
    lm, weights = built(kind, **changes)
    ids, selection = tokens(lm.config, 2, TOKENS), KeySelection(record=True)
    with torch.no_grad():
        got = lm(ids, selection=selection).logits
    for row in range(2):
        want = oracle.run(lm.config, weights, ids[row].tolist())
        assert error(got[row], want.logits) < 1e-4
        for layer in range(lm.config.num_hidden_layers):
            assert selected(selection, layer, row) == want.selected[layer]


@pytest.mark.parametrize("types", ["FFSS", "FSFS"])
def test_a_selection_is_shared_from_the_nearest_layer_below(types, form):
    layers = {"num_hidden_layers": 4, "indexer_types": [{"F": "full", "S": "shared"}[kind] for kind in types]}
    lm, weights = built("glm-5", **layers)
    ids, selection = tokens(lm.config, 1, TOKENS), KeySelection(record=True)
    with torch.no_grad():
        got = lm(ids, selection=selection).logits
    want = oracle.run(lm.config, weights, ids[0].tolist())
    assert error(got[0], want.logits) < 1e-4
    assert [selected(selection, layer, 0) for layer in range(4)] == [want.selected[layer] for layer in range(4)]
    assert selected(selection, 3, 0) != selected(selection, 0, 0)


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_chunks_and_single_tokens_equal_the_whole(kind, form):
    lm, weights = built(kind)
    ids = tokens(lm.config, 2, TOKENS)
    want = oracle.run_batch(lm.config, weights, ids)
    for chunks in ([TOKENS], [1] * TOKENS, [4, 9, 1, 7], [12, 1, 1, 7]):
        cache, parts = lm.new_cache(2), []
        with torch.no_grad():
            for part in ids.split(chunks, dim=1):
                parts.append(lm(part, cache=cache).logits)
        assert error(torch.cat(parts, 1), want) < 1e-4, chunks


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_padding(kind, side, form):
    lm, weights = built(kind)
    ids, mask = tokens(lm.config, 3, TOKENS), torch.ones(3, TOKENS, dtype=torch.long)
    if side != "right":
        mask[0, :5] = mask[1, :1] = 0
    if side != "left":
        mask[1, -4:] = 0
    want = oracle.run_batch(lm.config, weights, ids, mask)
    real = mask.bool()
    with torch.no_grad():
        assert error(lm(ids, mask).logits[real], want[real]) < 1e-4
        cache = lm.new_cache(3)
        out = torch.cat([lm(ids[:, s], mask[:, s], cache=cache).logits for s in (slice(0, 9), slice(9, None))], 1)
        assert error(out[real], want[real]) < 1e-4
        # The rows have different lengths now; each goes on at its own.
        follow = tokens(lm.config, 3, 3, seed=1)
        out = torch.cat([lm(follow[:, t : t + 1], cache=cache).logits for t in range(3)], 1)
    for row in range(3):
        whole = torch.cat((ids[row][real[row]], follow[row]))
        assert error(out[row], oracle.run(lm.config, weights, whole.tolist()).logits[-3:]) < 1e-4


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_packed_documents(kind, form):
    lm, weights = built(kind)
    ids, lengths = tokens(lm.config, 2, TOKENS), [9, 12]
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    with torch.no_grad():
        got = lm(ids, position_ids=positions).logits
    assert error(got, oracle.run_batch(lm.config, weights, ids, documents=lengths)) < 1e-4


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_queries_in_blocks_equal_all_at_once(kind, form, monkeypatch):
    from deepseek_arch.attention import lightning_indexer, sparse_attention

    lm, _ = built(kind)
    ids, mask = tokens(lm.config, 2, TOKENS), torch.ones(2, TOKENS, dtype=torch.long)
    padded = mask.clone()
    padded[0, :3] = 0
    with torch.no_grad():
        want = [lm(ids, m).logits for m in (mask, padded)]
        monkeypatch.setattr(lightning_indexer.query_blocks, "__defaults__", (2 * 2 * TOKENS,))  # two queries a block
        monkeypatch.setattr(sparse_attention, "_PAIRS", 2 * 2 * TOKENS)
        for m, expected in zip((mask, padded), want, strict=True):
            assert error(lm(ids, m).logits[m.bool()], expected[m.bool()]) < 1e-5


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_all_keys_selected_is_the_dense_model_bit_for_bit(kind):
    """The same weights without an indexer, in the same form."""
    lm, weights = built(kind, index_topk=TOKENS)
    dense = {"index_topk": None, "index_n_heads": None, "index_head_dim": None, "indexer_types": None}
    plain = small_models.model(
        lm.config.replace(**dense), weights={n: w for n, w in weights.items() if ".indexer." not in n}
    )
    ids = tokens(lm.config, 2, TOKENS)
    with torch.no_grad():
        assert torch.equal(lm(ids).logits, plain(ids).logits)
        caches = lm.new_cache(2), plain.new_cache(2)
        for part in ids.split([9, 1, 11], dim=1):
            got, want = (m(part, cache=cache).logits for m, cache in zip((lm, plain), caches, strict=True))
            assert torch.equal(got, want)
    # One key less, and they are two models.
    fewer = small_models.model(lm.config.replace(index_topk=TOKENS - 4), weights=weights)
    with torch.no_grad():
        assert error(fewer(ids).logits, plain(ids).logits) > 1e-3


@pytest.mark.parametrize("depths", [1, 2])
@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_prediction_modules_have_indexers_of_their_own(kind, depths, form):
    lm, weights = built(kind, num_nextn_predict_layers=depths)
    assert all(module.self_attn.indexer is not None for module in lm.mtp)
    ids = tokens(lm.config, 1, TOKENS)
    want = oracle.run(lm.config, weights, ids[0].tolist())
    with torch.no_grad():
        main = lm.model(ids)
        hidden = lm.mtp_hidden(main)
        for depth in range(depths):
            following = torch.nn.functional.pad(ids[:, depth + 1 :], (0, depth + 1))
            logits, hidden = lm.mtp_forward(hidden, following, depth, rope=main.rope, mask=main.mask)
            assert error(logits[0, : TOKENS - depth - 1], want.mtp[depth]) < 1e-4


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_gradients_equal_the_oracle(kind, form):
    """Through attention to the selected keys; none reaches an indexer."""
    lm, weights = built(kind)
    ids = tokens(lm.config, 1, TOKENS)
    lm.train()
    out = lm(ids, labels=ids)
    (out.loss - out.aux_loss).backward()
    leaves = {name: w.double().requires_grad_() for name, w in weights.items()}
    oracle.next_token_loss(oracle.run_batch(lm.config, leaves, ids), ids).backward()
    for name, grad in published.published_gradients(lm).items():
        if ".indexer." in name:
            assert grad is None, name
        elif leaves[name].grad is None:
            assert not grad.any(), name  # an expert that no token chose
        else:
            assert error(grad, leaves[name].grad) < 1e-4, name


def test_recomputed_layers_use_their_own_selection():
    """A layer that shares a selection runs again in the backward pass, after later layers made theirs."""
    lm, _ = built("glm-5")
    ids = tokens(lm.config, 2, TOKENS)
    grads = []
    for recompute in (False, True):
        lm.zero_grad()
        lm.train().gradient_checkpointing_enable(recompute)
        lm(ids, labels=ids).loss.backward()
        grads.append({n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert error(grads[1][name], grad) < 1e-5, name


def test_a_decoded_token_reads_index_topk_keys(monkeypatch):
    """Beyond `index_topk` keys only the indexer looks at all of them."""
    from deepseek_kernels.attention.sparse_mla import reference

    lm, _ = built("v32")
    seen, attend = [], reference.mla_decode

    def watched(q, states, *others):
        seen.append(states.shape[1])
        return attend(q, states, *others)

    monkeypatch.setattr(reference, "mla_decode", watched)
    for length in (20, 200):
        cache = lm.new_cache(1)
        with torch.no_grad():
            lm(tokens(lm.config, 1, length), cache=cache)
            seen.clear()
            lm(tokens(lm.config, 1, 1), cache=cache)
        assert seen == [lm.config.index_topk] * lm.config.num_hidden_layers


def test_mistakes_are_named():
    lm, _ = built("glm-5")
    ids = tokens(lm.config, 1, TOKENS)
    with pytest.raises(ValueError, match="expected stage None, 'dense' or 'sparse', got 'warm'"):
        KeySelection(stage="warm")
    dense = small_models.model(config("v3"))
    with pytest.raises(ValueError, match="expected no KeySelection for a model with dense attention"):
        dense(ids, selection=KeySelection())
    layer, x = lm.model.layers[1], torch.randn(1, TOKENS, lm.config.hidden_size)
    rope = lm.model.rope(torch.arange(TOKENS)[None])
    with pytest.raises(ValueError, match="expected a KeySelection with the keys that layer 0 selected"):
        layer(x, rope)
    with pytest.raises(ValueError, match="expected a selection of keys by layer 0"):
        layer(x, rope, selection=KeySelection())
    with pytest.raises(ValueError, match=r"spans or a bool mask with sparse attention, got torch\.float32"):
        lm.model.layers[0](x, rope, torch.zeros(1, 1, TOKENS, TOKENS))
    with pytest.raises(ValueError, match=r"index_head_dim\) \(3, 0, 24, 8, 16\), got \(3, 0, 24, 8, None\)"):
        lm(ids, cache=dense.new_cache(1))
