"""Parity with transformers' own models: random configs of every family, padding, caches, gradients, drafts.

Weights are drawn under published names and go to both sides: here through `published.stack`, there by name (native
models stack experts alike) or through a checkpoint folder that the native loader reads.
"""

import json

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from deepseek_arch.attention.mla import MultiHeadLatentAttention
from deepseek_arch.generation.entry import generate
from support import oracle, published
from support.small_models import KINDS, YARN, config, error, model, tokens

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4  # of float32 logits; measured differences are near 1e-6
_NATIVE = {
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM"),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM"),
    "kimi_k2": ("DeepseekV3Config", "DeepseekV3ForCausalLM"),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM"),
}


def native(cfg, weights):
    """transformers' model of `cfg` with `weights`, the draft layers left out."""
    config_class, model_class = (getattr(transformers, name) for name in _NATIVE[cfg.model_type])
    data = {k: v for k, v in cfg.to_dict().items() if k not in ("model_type", "architectures")}
    lm = model_class(config_class(**data, attn_implementation="sdpa")).to(torch.float32)
    state = {k: v for k, v in published.stack(weights, cfg).items() if not k.startswith("mtp.")}
    report = lm.load_state_dict(state, strict=False)
    assert not report.missing_keys and not report.unexpected_keys, report
    return lm.eval()


@st.composite
def configs(draw):
    """Any config of the families that transformers computes as published."""
    kind = draw(st.sampled_from(["v3", "v3", "v3", "v2", "v2-lite", "glm"]))
    groups = draw(st.sampled_from([1, 2, 4, 8])) if kind in ("v3", "v2") else 1
    per_group = draw(st.sampled_from([2, 3, 4]))
    experts = groups * per_group if groups > 1 else draw(st.sampled_from([4, 7, 8]))
    kept = draw(st.integers(1, groups))
    most = min(kept * per_group if groups > 1 else experts, 6)
    factor = draw(st.sampled_from([None, 4, 40.0]))
    scale = draw(st.sampled_from([{}, {"mscale": 1.0, "mscale_all_dim": 1.0}, {"mscale": 1, "mscale_all_dim": 0.707}]))
    changes = {
        "num_attention_heads": draw(st.sampled_from([1, 2, 4])),
        "n_routed_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, most)),
        "n_shared_experts": draw(st.sampled_from([1, 2])),
        "q_lora_rank": draw(st.sampled_from([None, 20])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        "rope_theta": draw(st.sampled_from([100.0, 10000.0, 1e6])),
        "rope_scaling": None if factor is None else {k: v for k, v in YARN.items() if "mscale" not in k} | scale,
        "num_hidden_layers": draw(st.integers(2, 3)),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if factor is not None:
        changes["rope_scaling"]["factor"] = factor
    if kind in ("v3", "v2"):
        changes |= {"n_group": groups, "topk_group": kept}
    if kind == "v3":
        changes |= {"norm_topk_prob": draw(st.booleans()), "first_k_dense_replace": draw(st.integers(0, 2))}
    return config(kind, **changes)


def _examples(count):
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def _left_padding(draw, batch, length):
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(1, batch):
        mask[row, : draw(st.integers(0, length - 1))] = 0
    return mask


def _routing_is_clear(cfg, weights, ids, mask, seed):
    """Returns True if a change of every weight by a few units in the last place leaves all experts as they are.

    Float32 and float64 may rightly disagree on a tie.
    """
    generator = torch.Generator().manual_seed(seed)
    nudged = {k: v * (1 + 1e-5 * torch.randn(v.shape, generator=generator)) for k, v in weights.items()}

    def routes(w, row):
        layers = oracle.run(cfg, w, row.tolist()).routes.values()
        return [sorted(experts) for layer in layers for experts in layer]

    rows = [row[m.bool()] for row, m in zip(ids, mask, strict=True)]
    return all(routes(weights, row) == routes(nudged, row) for row in rows)


@_examples(20)
@given(data=st.data())
def test_logits_cache_and_greedy_tokens(data):
    """A left-padded batch: whole, in chunks through each side's own cache, and continued greedily."""
    cfg = data.draw(configs())
    seed = data.draw(st.integers(0, 1000))
    weights = published.random_weights(cfg, seed, bias_mean=data.draw(st.sampled_from([-2.0, -0.5, 0.0, 5.0])))
    ids, mask = tokens(cfg, 3, 11, seed=seed), _left_padding(data.draw, 3, 11)
    assume(_routing_is_clear(cfg, weights, ids, mask, seed))
    theirs, ours = native(cfg, weights), model(cfg, weights=weights)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cut = data.draw(st.integers(1, 10))
    real = mask.bool()
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
        exact = oracle.run_batch(cfg, weights, ids, mask)
        assert error(ours(ids, attention_mask=mask).logits[real], expected[real]) < TOLERANCE
        assert error(expected[real], exact[real]) < TOLERANCE

        cache, past = ours.new_cache(3), transformers.DynamicCache(config=theirs.config)
        for part in (slice(0, cut), slice(cut, 11)):
            got = ours(ids[:, part], attention_mask=mask[:, part], cache=cache).logits
            wanted = theirs(
                ids[:, part], attention_mask=mask[:, : part.stop], position_ids=positions[:, part], past_key_values=past
            ).logits
            assert error(got[real[:, part]], wanted[real[:, part]]) < TOLERANCE

        greedy = theirs.generate(
            ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert torch.equal(generate(ours, ids, mask, max_new_tokens=4, eos_token_id=[]), greedy)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_every_gradient(kind):
    cfg = config(kind, rope_scaling=YARN, n_routed_experts=16)
    weights = published.random_weights(cfg, bias_mean=-0.5)
    theirs, ours = native(cfg, weights), model(cfg, weights=weights)
    ids = tokens(cfg, 2, 8)
    labels = ids.clone()
    labels[0, :3] = -100
    expected, got = theirs(ids, labels=labels).loss, ours(ids, labels=labels).loss
    assert error(got, expected) < TOLERANCE
    expected.backward(), got.backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        wanted = gradients[name].grad
        assert error(parameter.grad, wanted) < TOLERANCE, name


@torch.no_grad()
def test_packed_documents():
    cfg = config("v3")
    weights = published.random_weights(cfg)
    ids, positions = tokens(cfg, 2, 9), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, -1)
    expected = native(cfg, weights)(ids, position_ids=positions, use_cache=False).logits
    assert error(model(cfg, weights=weights)(ids, position_ids=positions).logits, expected) < TOLERANCE


@torch.no_grad()
def test_their_caches_work_in_our_attention():
    """Attention asks a cache for `update(latent, rotated_key, layer_idx)` and nothing more."""
    cfg = config("v3")
    attention = MultiHeadLatentAttention.from_config(cfg, dtype=torch.float32).eval()
    rope = model(cfg).model.rope
    x = torch.randn(2, 7, cfg.hidden_size)
    whole = attention(x, rope(torch.arange(7).expand(2, -1)))
    cache = transformers.DynamicCache()
    parts = [
        attention(x[:, part], rope(torch.arange(7)[part].expand(2, -1)), cache=cache)
        for part in (slice(0, 4), slice(4, 6), slice(6, 7))
    ]
    assert error(torch.cat(parts, 1), whole) < TOLERANCE


def _write(folder, cfg, weights):
    from safetensors.torch import save_file

    depth = cfg.num_hidden_layers
    copies = {
        f"model.layers.{depth + k}.{name}.weight": weights[source].clone()
        for k in range(cfg.num_nextn_predict_layers)
        for name, source in (("embed_tokens", "model.embed_tokens.weight"), ("shared_head.head", "lm_head.weight"))
    }
    save_file({k: v.contiguous() for k, v in {**weights, **copies}.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(cfg.to_dict()))


@pytest.mark.parametrize("depths", [1, 2])
@torch.no_grad()
def test_draft_logits(tmp_path, monkeypatch, depths):
    """Their MTP model, loaded by its own loader from the published layout. That loader finds draft layers by the class
    pattern `model.layers.61`, so the pattern is set for this depth. In both, the second depth reads the normed output
    of the first (TRAPS F3)."""
    modeling = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(modeling, "MtpModel"):
        pytest.skip("this transformers has no MTP model")
    cfg = config("v3", num_nextn_predict_layers=depths, rope_scaling=YARN)
    weights = published.random_weights(cfg)
    _write(tmp_path, cfg, weights)
    patterns = [rf"model\.layers\.{cfg.num_hidden_layers + k}\..*" for k in range(depths)]
    monkeypatch.setattr(transformers.DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", patterns)
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    drafts = modeling.MtpModel.from_pretrained(theirs).eval()

    ours, ids = model(cfg, weights=weights), tokens(cfg, 1, 12)
    hidden, positions = theirs.model(ids[:, :-1]).last_hidden_state, torch.arange(1, 12)[None]
    _, last_logits, _ = drafts(
        input_ids=ids[:, 1:],
        last_hidden_states=hidden,
        attention_mask=torch.ones(1, 11, dtype=torch.long),
        position_ids=positions,
        mtp_cache=transformers.cache_utils.MtpCache(config=theirs.config.get_mtp_config()),
    )
    main, next_ids = ours.model(ids[:, :-1]), ids[:, 1:]
    state = ours.mtp_hidden(main)
    for depth in range(depths):
        embeds = theirs.get_input_embeddings()(next_ids)
        angles = theirs.model.rotary_emb(embeds, position_ids=positions + depth)
        hidden = drafts.layers[depth](
            embeds, hidden, position_embeddings=angles, attention_mask=None, position_ids=None, past_key_values=None
        )
        got, state = ours.mtp_forward(state, next_ids, depth, rope=main.rope)
        assert error(got, theirs.lm_head(hidden)) < TOLERANCE  # every position
        assert error(got[:, -1], last_logits[:, depth]) < TOLERANCE  # what their drafting loop returns
        next_ids = torch.cat([next_ids[:, 1:], got[:, -1:].argmax(-1)], 1)


@torch.no_grad()
def test_folder_of_published_tensors_through_their_loader(tmp_path):
    """Their `from_pretrained` and ours agree on the files too, not only on tensors handed over by name."""
    cfg = config("v3", num_hidden_layers=2)
    weights = published.random_weights(cfg)
    _write(tmp_path, cfg, weights)
    theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = tokens(cfg, 2, 9)
    assert error(model(cfg, weights=weights)(ids).logits, theirs(ids).logits) < TOLERANCE


def test_where_transformers_differs_the_oracle_decides():
    """TRAPS C8: transformers 5.23 ignores V2's norm_topk_prob and always scales; the authors' code does either."""
    cfg = config("v2", norm_topk_prob=True)
    weights, ids = published.random_weights(cfg), tokens(cfg, 1, 9)
    exact = oracle.run_batch(cfg, weights, ids)
    with torch.no_grad():
        assert error(model(cfg, weights=weights)(ids).logits, exact) < TOLERANCE
        assert error(native(cfg, weights)(ids).logits, exact) > 0.05
