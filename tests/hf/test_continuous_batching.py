"""`generate_batch` of transformers: the tokens of `generate`, in a bounded cache, or an error before anything runs."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from twins import ours

from deepseek_arch.hf import continuous_batching
from deepseek_arch.hf.continuous_batching import PagedLatents
from support import small_models
from support.small_models import tokens

needs_pages = pytest.mark.skipif(
    not continuous_batching._pages_take_halves(), reason="this version's paged cache fits no latents"
)
LENGTHS = (7, 1, 19, 4, 33)


def prompts(config, lengths=LENGTHS):
    return [tokens(config, 1, length, seed=i)[0].tolist() for i, length in enumerate(lengths)]


def greedy(model, inputs, settings):
    """Returns what `generate` makes of each prompt alone."""
    made = []
    for ids in inputs:
        given = torch.tensor([ids])
        row = model.generate(given, attention_mask=torch.ones_like(given), generation_config=settings)
        made.append(row[0, len(ids) :].tolist())
    return made


@needs_pages
@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("kind", ["v3", "v2-lite", "glm"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_tokens_are_those_of_generate(kind, odd, attention):
    """Prompts of different length, split over steps and pages of four tokens, of which the third ends early."""
    config = small_models.config(kind, **({"kv_lora_rank": 25} if odd else {}))
    model, inputs = ours(config), prompts(config)
    model.set_attn_implementation(attention)
    settings = GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=-1, pad_token_id=0)
    settings.eos_token_id = greedy(model, inputs, settings)[2][3]
    expected = greedy(model, inputs, settings)
    assert len(expected[2]) < 9
    batching = ContinuousBatchingConfig(page_size=4, max_batch_tokens=16, num_blocks=40)
    before = model.config.to_dict()
    results = model.generate_batch(inputs, generation_config=settings, continuous_batching_config=batching)
    assert [result.generated_tokens for result in results.values()] == expected
    assert model.config.to_dict() == before and model.config._attn_implementation == attention


@needs_pages
def test_prompts_that_begin_alike_share_pages_and_copies_branch():
    config = small_models.config("v3")
    model, shared = ours(config), tokens(config, 1, 20)[0].tolist()
    inputs = [[*shared, i, 2 * i] for i in range(4)] + [shared]
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    expected = greedy(model, inputs, settings)
    several = copy.deepcopy(settings)
    several.num_return_sequences = 2
    batching = ContinuousBatchingConfig(page_size=4, num_blocks=30)
    for given, copies in ((settings, 1), (several, 2)):
        results = model.generate_batch(inputs, generation_config=given, continuous_batching_config=batching)
        assert [result.generated_tokens for result in results.values()] == [
            row for row in expected for _ in range(copies)
        ]


@needs_pages
def test_the_cache_is_bounded_and_as_wide_as_a_latent():
    config = small_models.config("v3")
    model = ours(config)
    manager = model.init_continuous_batching(GenerationConfig(eos_token_id=-1))
    try:
        cache = manager.batch_processor.cache
        token_bytes = 4 * config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)
        assert 2**15 * token_bytes <= cache.cache_tensor.numel() <= 2**15 * token_bytes * 1.05
        assert cache.max_batch_tokens == 2**11
    finally:
        manager.destroy()
    kept = []
    create = type(manager)._create_batch_processor

    def creating(self):
        kept.append(create(self))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(manager), "_create_batch_processor", creating)
        model.generate_batch(prompts(config), max_new_tokens=3)
    assert kept[0].cache.cache_tensor.numel() < 3 * len(LENGTHS) * 256 * token_bytes


@needs_pages
def test_a_request_that_fails_raises():
    """Natively it is logged, and comes back without tokens."""
    config = small_models.config("v3")
    model = ours(config)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"layers\.1\.self_attn\.o_proj\.weight is not finite"):
        model.generate_batch(prompts(config), max_new_tokens=3)


@needs_pages
def test_a_cache_that_does_not_fit_raises_before_anything_runs():
    model = ours(small_models.config("v3"))
    with pytest.raises(MemoryError):
        model.generate_batch(
            [[5, 6, 7]], continuous_batching_config=ContinuousBatchingConfig(num_blocks=10**9), max_new_tokens=3
        )


def test_pages_hold_latents_and_keys_side_by_side():
    class Pages:
        def update(self, keys, values, layer_idx, kwargs):
            assert keys.shape == values.shape == (1, 1, 3, 17) and layer_idx == 2
            kwargs.clear()
            return keys, values

    step = {"read_index": []}
    latent, key = torch.randn(1, 1, 3, 25), torch.randn(1, 1, 3, 8)
    held = PagedLatents(Pages(), step).update(latent, key, 2)
    assert torch.equal(held[0], latent) and torch.equal(held[1], key) and step


@pytest.mark.parametrize("why", ["sparse attention", "a version of transformers", "2 ranks", "use_mtp"])
def test_what_cannot_work_is_refused_before_anything_runs(why, monkeypatch):
    """Natively errors are only logged, and empty texts come back."""
    model = ours(small_models.config("v32" if why == "sparse attention" else "v3"))
    calls, settings = [], None
    model.model.register_forward_hook(lambda *args: calls.append(1))
    monkeypatch.setattr(continuous_batching, "_pages_take_halves", lambda: why != "a version of transformers")
    if why == "2 ranks":
        model._tp_size = 2
    if why == "use_mtp":
        settings = GenerationConfig()
        settings.use_mtp = True
    for start in (model.generate_batch, model.init_continuous_batching, model.continuous_batching_context_manager):
        inputs = ([[5, 6, 7]],) if start == model.generate_batch else ()
        with pytest.raises(ValueError, match=f"got continuous batching with .*{why}"):
            start(*inputs, generation_config=settings)
    assert not calls
