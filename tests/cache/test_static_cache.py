"""Decoding with a cache of fixed shape: the same numbers as with one that grows, and nothing compiled twice."""

import pytest
import torch

from deepseek_arch import DeepseekLM, generate
from deepseek_arch.cache.static_cache import StaticLatentCache
from deepseek_arch.generation import compiled_step as decoding
from deepseek_arch.generation.compiled_step import CompiledDecodeStep
from support.small_models import config, error

# Sums run over more (masked) terms, in another order: a few roundings in each of three layers' products of at most 44.
TOLERANCE = 512 * torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def model():
    return DeepseekLM(config("v3")).eval()


def _prompts(model):
    """Two rows, the first shorter by its padding on the left."""
    ids = torch.randint(0, model.config.vocab_size, (2, 6))
    return ids, torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])


@torch.no_grad()
def _caches(model, ids, mask, capacity, format=None):
    caches = [model.new_cache(len(ids), format=format) for _ in range(2)]
    for cache in caches:
        model(ids, mask, cache=cache)
    return caches[0], StaticLatentCache(caches[1], capacity)


@pytest.mark.parametrize("format", [None, "fp8"])
@torch.no_grad()
def test_steps_equal_those_of_a_growing_cache(model, format):
    growing, static = _caches(model, *_prompts(model), capacity=64, format=format)
    assert static.lengths == growing.lengths == (4, 6)
    for tokens in (1, 3, 1):
        ids = torch.randint(0, model.config.vocab_size, (2, tokens))
        assert error(model(ids, cache=static).logits, model(ids, cache=growing).logits) < TOLERANCE
    assert static.lengths == growing.lengths == (9, 11)


@torch.no_grad()
def test_rewinding_and_reordering(model):
    growing, static = _caches(model, *_prompts(model), capacity=64)
    for cache in (growing, static):
        cache.rewind(torch.tensor([3, 5]))
        cache.reorder(torch.tensor([1, 0, 1]))
    assert static.lengths == growing.lengths == (5, 3, 5)
    ids = torch.randint(0, model.config.vocab_size, (3, 2))
    assert error(model(ids, cache=static).logits, model(ids, cache=growing).logits) < TOLERANCE
    static.rewind(2)
    assert static.lengths == (2, 2, 2)


@pytest.mark.parametrize("format", [None, "fp8"])
def test_a_step_compiles_once_whatever_the_lengths(model, format, monkeypatch):
    """Graph capture with eager kernels, for two caches one after the other; a second compilation would raise."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend="eager", **options))
    for seed in range(2):
        growing, static = _caches(model, *_prompts(model), capacity=40, format=format)
        step, ids = CompiledDecodeStep(model, static), torch.tensor([seed, 7])
        for _ in range(4):
            with torch.no_grad():
                expected = model(ids[:, None], cache=growing).logits[:, -1]
            with torch._dynamo.config.patch(error_on_recompile=True):
                assert error(step(ids), expected) < TOLERANCE
            ids = expected.argmax(-1)


@pytest.fixture
def compilations(monkeypatch):
    """Functions that `torch.compile` was given; it captures graphs, and runs them with eager kernels."""
    made, real = [], torch.compile

    def capture(function, **options):
        made.append(function)
        return real(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", capture)
    return made


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.8, "seed": 3}])
def test_compiled_generation_gives_the_tokens_of_plain_decoding(model, compilations, sampling):
    ids, mask = _prompts(model)
    settings = {"attention_mask": mask, "max_new_tokens": 5, "pad_token_id": 0, **sampling}
    plain = generate(model, ids, **settings)
    assert not compilations
    assert torch.equal(generate(model, ids, compiled=True, **settings), plain)
    assert compilations
    end = int(plain[0, -3])  # the first row ends before the second
    assert torch.equal(
        generate(model, ids, compiled=True, eos_token_id=end, **settings),
        generate(model, ids, eos_token_id=end, **settings),
    )


def test_as_many_shapes_as_there_are(model, compilations, monkeypatch):
    """More than the compiler expects of one function (8); and prompts of some lengths share one."""
    monkeypatch.setattr(decoding, "_SLOTS", 4)
    for length in range(1, 42, 4):
        ids = torch.randint(0, model.config.vocab_size, (1, length))
        plain = generate(model, ids, max_new_tokens=2)
        assert torch.equal(generate(model, ids, max_new_tokens=2, compiled=True), plain)
    assert decoding.fixed_capacity(5) == decoding.fixed_capacity(8) == 8


@torch.no_grad()
def test_the_cache_that_was_taken_over_is_empty(model):
    _, static = _caches(model, *_prompts(model), capacity=16)
    again = StaticLatentCache(static, 20)
    assert again.lengths == (4, 6) and static.lengths == (0, 0)
    with pytest.raises(ValueError, match=r"lengths between 0 and those held \[4, 6\], got \[9, -3\]"):
        again.rewind(torch.tensor([9, -3]))
    with torch.inference_mode():
        again.reorder(torch.tensor([1, 0]))
    model(torch.tensor([[1], [2]]), cache=again)  # not in inference mode any more
    assert again.lengths == (7, 5)


def test_what_does_not_fit_is_refused(model):
    ids, mask = _prompts(model)
    cache = model.new_cache(2)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="expected a capacity of at least the 6 tokens held, got 5"):
        StaticLatentCache(cache, 5)
    static = StaticLatentCache(cache, 8)
    assert cache.lengths == (0, 0)
    with torch.no_grad(), pytest.raises(ValueError, match="expected at most 8 tokens a row, got 6 and 3 more"):
        model(ids[:, :3], cache=static)
    assert static.lengths == (6, 6)
    with pytest.raises(ValueError, match="expected tokens without padding for a static cache"):
        model(ids, mask, cache=static)
    with pytest.raises(ValueError, match="expected no gradient through a static cache"):
        model(ids[:, :1], cache=static)
    with pytest.raises(ValueError, match="expected a call within `append` for a static cache"):
        static.update(torch.zeros(2, 1, 1, static.kv_lora_rank), torch.zeros(2, 1, 1, static.qk_rope_head_dim), 0)
    assert static.lengths == (6, 6)
    with pytest.raises(ValueError, match="expected mtp_depth 0 with compiled=True, got 1"):
        generate(DeepseekLM(config("v3", num_nextn_predict_layers=1)), ids, mtp_depth=1, compiled=True)
