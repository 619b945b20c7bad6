"""Packed sequences never see each other, also where transformers' mask helper lets them."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache
from twins import native, ours

from support import small_models
from support.small_models import error, tokens

LENGTHS = (5, 1, 4)
TOKENS = sum(LENGTHS)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
DOCUMENTS = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None].int()
ENDS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)]).int()
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model():
    return ours(small_models.config("v3", rope_scaling=small_models.YARN))


@pytest.fixture(scope="module")
def ids(model):
    return tokens(model.config.to_core(), 1, TOKENS, seed=5)


@pytest.fixture(scope="module")
def alone(model, ids):
    """transformers' own logits of each sequence by itself."""
    twin = native(model)
    with torch.no_grad():
        return torch.cat([twin(part).logits for part in ids.split(LENGTHS, dim=1)], 1)


WAYS = {
    "positions": {"position_ids": POSITIONS, "use_cache": False},
    "positions and a mask of ones": {"position_ids": POSITIONS, "attention_mask": torch.ones(1, TOKENS)},
    "positions and the default cache": {"position_ids": POSITIONS},
    "cu_seq_lens": {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS, "max_length_q": 5, "max_length_k": 5},
    "cu_seq_lens and positions": {"cu_seq_lens_q": ENDS, "position_ids": POSITIONS},
    "seq_idx": {"seq_idx": DOCUMENTS},
    "everything": {"seq_idx": DOCUMENTS, "cu_seq_lens_q": ENDS, "position_ids": POSITIONS, "use_cache": False},
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("way", WAYS)
def test_packed_logits_equal_those_of_the_sequences_alone(model, ids, alone, way, implementation):
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        assert error(model(ids, **WAYS[way]).logits, alone) <= TOLERANCE
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=14)])
def test_a_packed_cache_goes_on_with_its_last_sequence(model, ids, make):
    """The new tokens' positions limit how far back they attend."""
    cache = make(config=model.config)
    more = tokens(model.config.to_core(), 1, 3, seed=6)
    with torch.no_grad():
        model(ids, position_ids=POSITIONS, past_key_values=cache)
        got = [
            model(part, position_ids=torch.arange(start, start + part.shape[1])[None], past_key_values=cache).logits
            for part, start in zip(more.split([1, 2], dim=1), (4, 5), strict=True)
        ]
        expected = native(model)(torch.cat((ids[:, -4:], more), 1)).logits[:, 4:]
    assert error(torch.cat(got, 1), expected) <= TOLERANCE


def test_rows_may_be_packed_differently_and_padded(model, ids, alone):
    """Row 0 packed as above, row 1 its first sequence behind padding, whose queries see nothing."""
    padded = torch.cat((torch.zeros(1, TOKENS - 5, dtype=torch.long), ids[:, :5]), 1)
    positions = torch.cat((POSITIONS, torch.tensor([[0] * (TOKENS - 5) + [0, 1, 2, 3, 4]])))
    mask = torch.ones(2, TOKENS)
    mask[1, : TOKENS - 5] = 0
    with torch.no_grad():
        logits = model(torch.cat((ids, padded)), position_ids=positions, attention_mask=mask).logits
    assert error(logits[:1], alone) <= TOLERANCE
    assert error(logits[1:, -5:], alone[:, :5]) <= TOLERANCE
    assert logits.isfinite().all()


@pytest.mark.parametrize("fill", [0, 1])
def test_padding_in_the_middle_is_no_new_sequence(model, fill):
    """A shorter row that goes on after its padding, as in a batched conversation: positions count real tokens only."""
    config = model.config.to_core()
    first, second = tokens(config, 2, 4, seed=1), tokens(config, 2, 3, seed=2)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, fill)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(torch.cat((first, second), 1), attention_mask=mask, position_ids=positions).logits[:, -3:]
        model(first, attention_mask=mask[:, :4], position_ids=positions[:, :4], past_key_values=cache)
        got = model(second, attention_mask=mask, position_ids=positions[:, 4:], past_key_values=cache).logits
        twin = native(model)
        expected = [twin(torch.cat((first[row, :n], second[row]))[None]).logits[0, -3:] for row, n in ((0, 4), (1, 2))]
    assert error(got, torch.stack(expected)) <= TOLERANCE
    assert error(whole, torch.stack(expected)) <= TOLERANCE


def test_prompts_padded_on_the_right_are_no_packed_ones(model):
    """generate then counts on from the padding's position; the native models see the whole prompt, and so do ours."""
    ids = tokens(model.config.to_core(), 2, 6)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    prompt = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**prompt), native(model).generate(**prompt))


def test_gradients_stop_at_sequence_ends(model, ids):
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeds, position_ids=POSITIONS).logits[:, LENGTHS[0]].sum().backward()
    reached = embeds.grad.abs().sum(-1)[0] > 0
    assert reached.tolist() == [False] * 5 + [True] + [False] * 4
    model.zero_grad()


def test_sequence_numbers_cannot_describe_cached_tokens(model, ids):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="without cached tokens"):
            model(ids, seq_idx=DOCUMENTS, past_key_values=cache)


def test_bidirectional_attention_is_refused(model, ids):
    with pytest.raises(ValueError, match="causal"):
        model(ids, is_causal=False)
