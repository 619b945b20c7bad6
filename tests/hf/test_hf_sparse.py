"""V3.2 and GLM-5 in transformers against its own classes, on sequences beyond `index_topk` (TRAPS G4)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from twins import load_silently, native, ours, same_tensors

import deepseek_arch as da
import deepseek_arch.hf as dhf
from support import oracle, published, small_models
from support.small_models import SPARSE_KINDS, error, tokens

TOLERANCE = 1e-4
LENGTH = 17  # index_topk is 6


@pytest.fixture(params=SPARSE_KINDS)
def pair(request):
    model = ours(small_models.config(request.param))
    return model, native(model)


def left_padded(pad: list[int], length: int = LENGTH) -> torch.Tensor:
    return (torch.arange(length) >= torch.tensor(pad)[:, None]).long()


@st.composite
def configs(draw):
    kind = draw(st.sampled_from(list(SPARSE_KINDS)))
    types = {"indexer_types": draw(st.sampled_from([None, ("full", "shared"), ("full", "full")]))}
    return small_models.config(
        kind,
        **(types if kind == "glm-5" else {}),
        index_topk=draw(st.integers(1, 12)),
        index_n_heads=draw(st.sampled_from([16, 24])),
        index_head_dim=draw(st.sampled_from([8, 24])),
        num_attention_heads=draw(st.sampled_from([1, 4])),
        v_head_dim=draw(st.sampled_from([6, 24])),
        num_hidden_layers=2,
        first_k_dense_replace=draw(st.integers(0, 2)),
        rope_scaling=draw(st.sampled_from([None, small_models.YARN])),
    )


@settings(max_examples=12, phases=(Phase.generate,))
@given(configs(), st.integers(0, 99))
def test_logits_and_cached_steps_equal_for_random_configs(config, seed):
    model = ours(config, seed)
    twin, ids, mask = native(model), tokens(config, 2, LENGTH, seed=seed), left_padded([0, 3])
    with torch.no_grad():
        expected = twin(ids, attention_mask=mask).logits
        whole = model(ids, attention_mask=mask).logits
        cache, steps = DynamicCache(config=model.config), []
        for start, stop in ((0, 9), (9, 10), (10, LENGTH)):
            steps.append(model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits)
    real = mask.bool()
    assert error(whole[real], expected[real]) <= TOLERANCE
    assert error(torch.cat(steps, 1)[real], expected[real]) <= TOLERANCE


def test_static_cache(pair):
    model, twin = pair
    ids = tokens(model.config.to_core(), 2, LENGTH)
    cache = StaticCache(config=model.config, max_cache_len=24)
    with torch.no_grad():
        expected = twin(ids).logits
        got = [model(part, past_key_values=cache).logits for part in ids.split([10, 1, 6], dim=1)]
    assert error(torch.cat(got, 1), expected) <= TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_generate(pair, options):
    model, twin = pair
    core = model.config.to_core()
    rows = 1 if "prompt_lookup_num_tokens" in options else 2  # transformers assists one row
    ids, mask = tokens(core, rows, LENGTH), left_padded([2, 0][:rows])
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    got = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(got, twin.generate(ids, attention_mask=mask, **settings))


@pytest.mark.parametrize("kind", SPARSE_KINDS)
def test_generate_with_mtp_drafts(kind):
    model = ours(small_models.config(kind, num_nextn_predict_layers=1))
    ids = tokens(model.config.to_core(), 2, LENGTH)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings |= {"attention_mask": torch.ones_like(ids)}
    plain = model.generate(ids, **settings)
    for count in (1, 3):
        assert torch.equal(model.generate(ids, use_mtp=True, num_assistant_tokens=count, **settings), plain)


def test_assistant_model(pair):
    """Its cache is cropped where drafts are rejected."""
    model, twin = pair
    helper = ours(small_models.config("v3", num_hidden_layers=1), seed=5)
    ids = tokens(model.config.to_core(), 1, LENGTH)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    got = model.generate(ids, attention_mask=mask, assistant_model=helper, **settings)
    assert torch.equal(got, twin.generate(ids, attention_mask=mask, **settings))


def test_attention_weights(pair):
    model, _ = pair
    ids = tokens(model.config.to_core(), 2, LENGTH)
    with torch.no_grad():
        want = model(ids).logits
        model.set_attn_implementation("eager")
        out = model(ids, output_attentions=True)
    assert error(out.logits, want) <= TOLERANCE
    for weights in out.attentions:  # a query attends to index_topk keys
        assert (weights[:, :, 6:] > 0).sum(-1).eq(model.config.index_topk).all()


def test_packed_sequences(pair):
    model, _ = pair
    core = model.config.to_core()
    ids, positions = tokens(core, 1, LENGTH), torch.cat((torch.arange(8), torch.arange(LENGTH - 8)))[None]
    with torch.no_grad():
        got = model(ids, position_ids=positions).logits
    want = oracle.run_batch(core, published.random_weights(core), ids, documents=[8, LENGTH - 8])
    assert error(got, want) <= TOLERANCE


def test_finished_masks(pair):
    """Additive ones become visibility; one that weighs keys is refused."""
    model, twin = pair
    ids = tokens(model.config.to_core(), 1, LENGTH)
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    allowed[14, 1:3] = False
    additive = torch.zeros(LENGTH, LENGTH).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = twin(ids, attention_mask=allowed[None, None]).logits
        for mask in (allowed, additive):
            assert error(model(ids, attention_mask=mask[None, None]).logits, expected) <= TOLERANCE
        with pytest.raises(ValueError, match="got other values"):
            model(ids, attention_mask=(additive - torch.eye(LENGTH))[None, None])


def test_gradients_equal_but_for_the_indexer(pair):
    """Recomputed layers too, in both of torch's ways."""
    ids = tokens(pair[0].config.to_core(), 2, LENGTH)
    model, twin = pair
    for m in pair:
        m.train()
        m(ids, labels=ids).loss.backward()
    expected = {name: p.grad for name, p in twin.named_parameters()}
    for reentrant in (None, True, False):
        if reentrant is not None:
            model.zero_grad()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model(ids, labels=ids).loss.backward()
        for name, p in model.named_parameters():
            if ".indexer." in name:
                assert p.grad is None and expected[name] is None, name
            else:
                assert error(p.grad, expected[name]) <= TOLERANCE, name


def test_auto_classes_and_saving(pair, folder_of, tmp_path):
    model, _ = pair
    core = model.config.to_core()
    folder = folder_of("v32" if core.model_type == "deepseek_v32" else "glm-5", num_nextn_predict_layers=1)
    with dhf.registered():
        loaded = load_silently(AutoModelForCausalLM, folder, dtype=torch.float32)
        assert type(loaded) is dhf.DeepseekForCausalLM
    assert loaded.config.to_core().indexer_types == core.indexer_types
    loaded.save_pretrained(tmp_path)
    assert same_tensors(da.load(tmp_path).state_dict(), da.load(folder).state_dict())
    ids = tokens(core, 1, LENGTH)
    with torch.no_grad():
        assert error(loaded(ids).logits, da.load(folder)(ids).logits) <= TOLERANCE


@pytest.mark.slow
def test_whole_graphs(pair):
    """Without breaks, where the compiler knows no values: prompts, padding, a step on a static cache."""
    model, _ = pair
    ids, mask = tokens(model.config.to_core(), 2, LENGTH), left_padded([3, 0])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    caches = [StaticCache(config=model.config, max_cache_len=24) for _ in range(2)]
    with torch.no_grad():
        for options in ({}, {"attention_mask": mask}):
            real = options.get("attention_mask", torch.ones_like(ids)).bool()
            assert error(compiled(ids, **options).logits[real], model(ids, **options).logits[real]) <= TOLERANCE
        for cache in caches:
            model(ids[:, :12], past_key_values=cache)
        steps = [m(ids[:, 12:13], past_key_values=c).logits for m, c in zip((compiled, model), caches, strict=True)]
    assert error(*steps) <= TOLERANCE
    torch._dynamo.reset()
