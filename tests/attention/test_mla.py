"""Latent attention in both forms: TRAPS A4, A5, A13, B3 to B9."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from deepseek_arch.attention.mla import MultiHeadLatentAttention
from deepseek_arch.cache.latent_cache import LatentCache
from deepseek_arch.config.deepseek_config import DeepseekConfig
from deepseek_arch.layers.linear import Linear
from deepseek_arch.layers.rope import RotaryEmbedding
from deepseek_kernels.common.masks import causal_mask
from support.oracle import _norm as oracle_norm
from support.oracle import attention as oracle_attention
from support.oracle import rotate as oracle_rotate
from support.published import random_weights
from support.small_models import KINDS, YARN, config, error

EPS32 = torch.finfo(torch.float32).eps
# Five chained products of at most 44 terms and a softmax; their partial sums exceed the result a few times.
TOLERANCE = 256 * EPS32
FORMS = ["expanded", "absorbed"]
TOKENS = 12


def _attention(cfg, dtype=torch.float32):
    """The module of layer 0, its float64 weights (prefix `self_attn.`), and cosines and sines by positions."""
    prefix = "model.layers.0."
    weights = {k.removeprefix(prefix): v for k, v in random_weights(cfg).items() if k.startswith(prefix + "self_attn")}
    attention = MultiHeadLatentAttention.from_config(cfg, dtype=torch.float32)
    attention.load_state_dict({k.removeprefix("self_attn."): v for k, v in weights.items()})
    return attention.to(dtype).eval(), {k: v.to(dtype).double() for k, v in weights.items()}


def _force(attention, form, monkeypatch):
    monkeypatch.setattr(attention, "prefers_absorbed", lambda queries, keys: form == "absorbed")


def _rope(cfg, batch=1, tokens=TOKENS, start=0):
    return RotaryEmbedding.from_config(cfg)(torch.arange(start, start + tokens).expand(batch, -1))


def _inputs(cfg, batch=1, tokens=TOKENS, seed=1):
    return torch.randn(batch, tokens, cfg.hidden_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scaling", [None, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_equal_the_equations(kind, form, scaling, monkeypatch):
    cfg = config(kind, rope_scaling=scaling)
    attention, weights = _attention(cfg)
    _force(attention, form, monkeypatch)
    x = _inputs(cfg)
    expected = oracle_attention(cfg, weights, "self_attn.", x[0].double())
    assert error(attention(x, _rope(cfg))[0], expected) < TOLERANCE


def test_forms_agree_to_float64_rounding(monkeypatch):
    cfg = config("v3", rope_scaling=YARN)
    attention, _ = _attention(cfg, torch.float64)
    x, outputs = _inputs(cfg).double(), []
    for form in FORMS:
        _force(attention, form, monkeypatch)
        outputs.append(attention(x, _rope(cfg)))
    # Both rotate in float32 alike; everything else is float64.
    assert error(*outputs) < 256 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_as_good_as_its_roundings(form, monkeypatch):
    cfg = config("v3", rope_scaling=YARN)
    attention, weights = _attention(cfg, torch.bfloat16)
    _force(attention, form, monkeypatch)
    x = _inputs(cfg).to(torch.bfloat16)
    got = attention(x, _rope(cfg))
    assert got.dtype == torch.bfloat16
    # About eight roundings of intermediate results to bfloat16, half a unit each, and what a sharp softmax adds.
    assert error(got[0], oracle_attention(cfg, weights, "self_attn.", x[0].double())) < 8 * torch.finfo(got.dtype).eps


def _swap(rows, first):
    """Rows of each head with their two parts exchanged."""
    return torch.cat([rows[:, first:], rows[:, :first]], 1)


def _rope_first_in_queries(w, cfg):
    heads = w["self_attn.q_b_proj.weight"].unflatten(0, (cfg.num_attention_heads, -1))
    return {"self_attn.q_b_proj.weight": _swap(heads, cfg.qk_nope_head_dim).flatten(0, 1)}


def _rope_first_in_kv_a(w, cfg):
    rows = w["self_attn.kv_a_proj_with_mqa.weight"]
    return {"self_attn.kv_a_proj_with_mqa.weight": rows.roll(-cfg.kv_lora_rank, 0)}


def _values_first_in_kv_b(w, cfg):
    heads = w["self_attn.kv_b_proj.weight"].unflatten(0, (cfg.num_attention_heads, -1))
    return {"self_attn.kv_b_proj.weight": _swap(heads, cfg.qk_nope_head_dim).flatten(0, 1)}


def _keys_then_values_of_all_heads(w, cfg):
    rows, keys = w["self_attn.kv_b_proj.weight"], cfg.num_attention_heads * cfg.qk_nope_head_dim
    heads = [rows[:keys].unflatten(0, (cfg.num_attention_heads, -1)), rows[keys:].unflatten(0, (-1, cfg.v_head_dim))]
    return {"self_attn.kv_b_proj.weight": torch.cat(heads, 1).flatten(0, 1)}


def _latent_norm_skipped(w, cfg):
    return {"self_attn.kv_a_layernorm.weight": torch.ones_like(w["self_attn.kv_a_layernorm.weight"])}


READINGS = [
    _rope_first_in_queries,
    _rope_first_in_kv_a,
    _values_first_in_kv_b,
    _keys_then_values_of_all_heads,
    _latent_norm_skipped,
]


@pytest.mark.parametrize("reading", READINGS)
def test_other_readings_of_the_weights_are_visible(reading):
    """TRAPS A4 and B4: nope before rope, latent before the shared key, per head keys before values. Each other order
    changes the output far beyond the tolerance of the tests above."""
    cfg = config("v3")
    attention, weights = _attention(cfg)
    x = _inputs(cfg)
    wrong = oracle_attention(cfg, weights | reading(weights, cfg), "self_attn.", x[0].double())
    assert error(attention(x, _rope(cfg))[0], wrong) > 0.05


@pytest.mark.parametrize("form", FORMS)
def test_scale_is_of_the_query_head_in_both_forms(form, monkeypatch):
    """TRAPS A13: (nope + rope)^-0.5, not (latent + rope)^-0.5; A5: YaRN's factor squared."""
    cfg = config("v3", rope_scaling=YARN)
    attention, weights = _attention(cfg)
    _force(attention, form, monkeypatch)
    x = _inputs(cfg)
    expected = oracle_attention(cfg, weights, "self_attn.", x[0].double())
    right = attention.softmax_scale
    assert right == pytest.approx(20**-0.5 * 1.8738542070926265, rel=1e-12)
    for wrong in (20**-0.5, 20**-0.5 * 1.8738542070926265**0.5, right * (20 / 32) ** 0.5):
        attention.softmax_scale = wrong
        assert error(attention(x, _rope(cfg))[0], expected) > 0.01
    attention.softmax_scale = right
    assert error(attention(x, _rope(cfg))[0], expected) < TOLERANCE


class _ListCache:
    """The smallest thing that attention accepts as a cache: it keeps what it is given."""

    def __init__(self):
        self.latent = self.key = None

    def update(self, latent, rotated_key, layer_idx):
        assert layer_idx == 0
        join = lambda old, new: new if old is None else torch.cat([old, new], 2)  # noqa: E731
        self.latent, self.key = join(self.latent, latent), join(self.key, rotated_key)
        return self.latent, self.key


def test_what_is_cached():
    """TRAPS B3: the latent after its norm, the shared key after its rotation and without a norm."""
    cfg = config("v3")
    attention, weights = _attention(cfg)
    x, cache = _inputs(cfg), _ListCache()
    attention(x, _rope(cfg), cache=cache)
    down = x[0].double() @ weights["self_attn.kv_a_proj_with_mqa.weight"].T
    latent = oracle_norm(down[:, :24], weights["self_attn.kv_a_layernorm.weight"], 1e-6)
    assert error(cache.latent[0, 0], latent) < TOLERANCE
    assert error(cache.key[0, 0], oracle_rotate(cfg, down[:, 24:], torch.arange(TOKENS))) < TOLERANCE


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunks", [[12], [5, 7], [1] * 12, [4, 1, 6, 1]], ids=str)
def test_chunks_equal_the_whole(chunks, form, monkeypatch):
    """TRAPS B8: from the second chunk on the causal mask is offset."""
    cfg = config("v3")
    attention, _ = _attention(cfg)
    x = _inputs(cfg, batch=2)
    whole = attention(x, _rope(cfg, 2))
    _force(attention, form, monkeypatch)
    cache, outputs, start = _ListCache(), [], 0
    for size in chunks:
        outputs.append(attention(x[:, start : start + size], _rope(cfg, 2, size, start), cache=cache))
        start += size
    assert error(torch.cat(outputs, 1), whole) < TOLERANCE


def test_offset_causal_mask():
    """TRAPS B8: two new queries on three old keys see four and five keys, not one and two."""
    assert causal_mask(2, 5).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert causal_mask(3, 3).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize("queries", [1, 3, 40], ids=["decode", "folded", "many"])
@pytest.mark.parametrize("form", FORMS)
def test_masks_of_every_kind_mean_the_same(form, queries, monkeypatch):
    """None, bool, additive float, with and without the batch dimension."""
    cfg = config("v3")
    attention, _ = _attention(cfg)
    _force(attention, form, monkeypatch)
    x = _inputs(cfg, batch=2, tokens=queries + 7)
    outputs = []
    allowed = causal_mask(queries, queries + 7)
    zeros = torch.zeros(queries, queries + 7)
    additive = zeros.masked_fill(~allowed, torch.finfo(torch.float32).min)
    one_row = [allowed[None, None], additive[None, None]]
    for mask in (None, *one_row, *(mask.expand(2, -1, -1, -1) for mask in one_row)):
        cache = _ListCache()
        attention(x[:, :7], _rope(cfg, 2, 7), cache=cache)
        outputs.append(attention(x[:, 7:], _rope(cfg, 2, queries, 7), mask=mask, cache=cache))
    for other in outputs[1:]:
        assert error(other, outputs[0]) < TOLERANCE


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_may_leave_the_queries_to_broadcasting(form, monkeypatch):
    cfg = config("v3")
    attention, _ = _attention(cfg)
    _force(attention, form, monkeypatch)
    x, keys = _inputs(cfg, batch=2, tokens=3), torch.tensor([True, True, False])
    whole = attention(x, _rope(cfg, 2, 3), mask=keys.expand(1, 1, 3, 3))
    assert error(attention(x, _rope(cfg, 2, 3), mask=keys[None, None, None]), whole) < TOLERANCE


@pytest.mark.parametrize("form", FORMS)
def test_masked_keys_do_not_matter(form, monkeypatch):
    """TRAPS B9: whatever a masked key holds, other than NaN, its probability is exactly zero."""
    cfg = config("v3")
    attention, _ = _attention(cfg)
    _force(attention, form, monkeypatch)
    x = _inputs(cfg)
    mask = causal_mask(TOKENS, TOKENS).clone()
    mask[:, 3] = False
    mask[3, 3] = True
    changed = x.clone()
    changed[:, 3] = 100.0
    first, second = (attention(inputs, _rope(cfg), mask[None, None]) for inputs in (x, changed))
    others = [t for t in range(TOKENS) if t != 3]
    assert torch.equal(first[:, others], second[:, others])


@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_the_equations(form, monkeypatch):
    cfg = config("v3", rope_scaling=YARN)
    attention, weights = _attention(cfg)
    _force(attention, form, monkeypatch)
    x = _inputs(cfg).requires_grad_()
    direction = torch.randn(1, TOKENS, cfg.hidden_size, generator=torch.Generator().manual_seed(2))
    (attention(x, _rope(cfg)) * direction).sum().backward()

    leaves = {name: w.requires_grad_() for name, w in weights.items()}
    exact = x.detach().double().requires_grad_()
    (oracle_attention(cfg, leaves, "self_attn.", exact[0]) * direction[0]).sum().backward()
    assert error(x.grad, exact.grad) < 4 * TOLERANCE
    for name, parameter in attention.named_parameters():
        assert error(parameter.grad, leaves[f"self_attn.{name}"].grad) < 4 * TOLERANCE, name


def test_without_a_query_latent():
    """TRAPS B5: one q_proj, no norm."""
    names = set(_attention(config("v2-lite"))[0].state_dict())
    assert "q_proj.weight" in names and not any(name.startswith(("q_a", "q_b")) for name in names)
    assert "q_proj.weight" not in _attention(config("v3"))[0].state_dict()


def test_head_sizes_come_from_their_own_fields():
    """TRAPS B6: never hidden_size / heads, whatever `head_dim` says; V3's shapes are those of its files."""
    data = DeepseekConfig.from_pretrained("deepseek-v3").to_dict() | {"head_dim": 56}
    cfg = DeepseekConfig.from_dict(data)
    attention = MultiHeadLatentAttention.from_config(cfg, device="meta")
    shapes = {name: tuple(p.shape) for name, p in attention.named_parameters()}
    assert shapes == {
        "q_a_proj.weight": (1536, 7168),
        "q_a_layernorm.weight": (1536,),
        "q_b_proj.weight": (24576, 1536),
        "kv_a_proj_with_mqa.weight": (576, 7168),
        "kv_a_layernorm.weight": (512,),
        "kv_b_proj.weight": (32768, 512),
        "o_proj.weight": (7168, 16384),
    }


@pytest.mark.parametrize("form", FORMS)
def test_attention_bias(form, monkeypatch):
    cfg = config("v3", attention_bias=True)
    attention = MultiHeadLatentAttention.from_config(cfg, dtype=torch.float32)
    _, weights = _attention(cfg.replace(attention_bias=False))
    generator = torch.Generator().manual_seed(3)
    for name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj"):
        size = getattr(attention, name).out_features
        weights[f"self_attn.{name}.bias"] = torch.randn(size, generator=generator).float().double()
    attention.load_state_dict({k.removeprefix("self_attn."): v.float() for k, v in weights.items()})
    _force(attention, form, monkeypatch)
    x = _inputs(cfg)
    expected = oracle_attention(cfg, weights, "self_attn.", x[0].double())
    assert error(attention(x, _rope(cfg))[0], expected) < TOLERANCE


class _Doubled(torch.nn.Module):
    """Stands for an adapter or a quantized layer: its `weight` is not what it multiplies by."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.out_features = linear.weight, linear.out_features

    def forward(self, x):
        return 2 * torch.nn.functional.linear(x, self.weight)


@pytest.mark.parametrize("how", ["module", "subclass", "hook"])
def test_absorbed_form_uses_what_kv_b_proj_computes(how, monkeypatch):
    """Reading `kv_b_proj.weight` would skip adapters, quantization and hooks."""
    cfg = config("v3")
    attention, weights = _attention(cfg)
    if how == "module":
        attention.kv_b_proj = _Doubled(attention.kv_b_proj)
    elif how == "subclass":

        class Twice(Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        attention.kv_b_proj.__class__ = Twice
    else:
        attention.kv_b_proj.register_forward_hook(lambda module, args, output: 2 * output)
    doubled = weights | {"self_attn.kv_b_proj.weight": 2 * weights["self_attn.kv_b_proj.weight"]}
    x = _inputs(cfg)
    expected = oracle_attention(cfg, doubled, "self_attn.", x[0].double())
    for form in FORMS:
        _force(attention, form, monkeypatch)
        assert error(attention(x, _rope(cfg))[0], expected) < TOLERANCE, form


class _Shifted(torch.nn.Linear):
    """Adds a bias, as an adapter trained with biases does."""


@pytest.mark.parametrize("form", FORMS)
def test_a_bias_of_kv_b_proj_reaches_the_values(form, monkeypatch):
    """Those of a query's keys cancel in the softmax; those of the values add up to themselves."""
    cfg = config("v3")
    attention, weights = _attention(cfg)
    linear = attention.kv_b_proj
    attention.kv_b_proj = _Shifted(linear.in_features, linear.out_features).requires_grad_(False)
    attention.kv_b_proj.weight.copy_(linear.weight)
    bias = torch.randn(linear.out_features, generator=torch.Generator().manual_seed(5))
    attention.kv_b_proj.bias.copy_(bias)
    _force(attention, form, monkeypatch)
    x = _inputs(cfg)
    of_values = bias.double().view(cfg.num_attention_heads, -1)[:, cfg.qk_nope_head_dim :].flatten()
    shift = weights["self_attn.o_proj.weight"] @ of_values
    expected = oracle_attention(cfg, weights, "self_attn.", x[0].double()) + shift
    assert error(attention(x, _rope(cfg))[0], expected) < TOLERANCE


def _multiplications(attention, heads, queries, keys, absorbed):
    """Per layer, counted from the shapes of each product, keys and values padded to one width."""
    rank, rope = attention.kv_lora_rank, attention.qk_rope_head_dim
    both = attention.qk_nope_head_dim + attention.v_head_dim
    if absorbed:
        return heads * (queries * rank * both + queries * keys * 2 * (rank + rope))
    width = max(attention.qk_nope_head_dim + rope, attention.v_head_dim)
    return heads * (keys * rank * both + queries * keys * 2 * width)


def test_the_cheaper_form_runs():
    cfg = DeepseekConfig.from_pretrained("deepseek-v3")
    attention = MultiHeadLatentAttention.from_config(cfg, device="meta").eval()
    for queries, keys in [(1, 1), (1, 2), (1, 4096), (2, 4096), (160, 10**6), (171, 10**6), (4096, 4096), (512, 4096)]:
        costs = [_multiplications(attention, 128, queries, keys, absorbed) for absorbed in (False, True)]
        assert attention.prefers_absorbed(queries, keys) == (costs[1] < costs[0]), (queries, keys)
    assert attention.prefers_absorbed(1, 4096) and not attention.prefers_absorbed(4096, 4096)


def test_dropout_only_in_training():
    cfg = config("v3", attention_dropout=0.5)
    attention, weights = _attention(cfg)
    x = _inputs(cfg)
    expected = oracle_attention(cfg, weights, "self_attn.", x[0].double())
    assert error(attention(x, _rope(cfg))[0], expected) < TOLERANCE
    attention.train()
    assert error(attention(x, _rope(cfg))[0], expected) > 0.05
    # A form without dropout must not be chosen by its cost.
    assert not attention.prefers_absorbed(1, 10**6)


def test_a_mask_per_head_is_refused_by_the_absorbed_form(monkeypatch):
    cfg = config("v3")
    attention, _ = _attention(cfg)
    _force(attention, "absorbed", monkeypatch)
    with pytest.raises(ValueError, match=r"mask for all heads, \[T, S\] or \[B, 1, T, S\], got \[1, 2, 12, 12\]"):
        attention(_inputs(cfg), _rope(cfg), mask=torch.ones(1, 2, 12, 12, dtype=torch.bool))


@torch.no_grad()
def test_forward_derivatives_pass_through_a_cache():
    """A write in place has none, so everything is computed as if a gradient were needed."""
    cfg = config("v3")
    attention, _ = _attention(cfg, torch.float64)
    x, tangent, rope = _inputs(cfg).double(), _inputs(cfg, seed=2).double(), _rope(cfg)

    def cached(x):
        return attention(x, rope, None, LatentCache(1, 1, cfg.kv_lora_rank, cfg.qk_rope_head_dim, dtype=x.dtype))

    with sdpa_kernel(SDPBackend.MATH):
        (_, expected), (_, got) = (torch.func.jvp(f, (x,), (tangent,)) for f in (lambda x: attention(x, rope), cached))
    assert error(got, expected) < 256 * torch.finfo(torch.float64).eps
