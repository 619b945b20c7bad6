"""The trunk and the language model against the float64 oracle, and the properties a user relies on."""

import copy
import io
import math

import pytest
import torch

from deepseek_arch.config.deepseek_config import DeepseekConfig, presets
from deepseek_arch.models.causal_lm import DeepseekLM
from support import oracle, published
from support.small_models import KINDS, YARN, config, error, model, tokens

EPS32 = torch.finfo(torch.float32).eps
# Three layers of about twenty products each, of at most 44 terms; a sharp softmax or a large routed scale (16 for V2)
# amplifies what came before a few times.
TOLERANCE = 256 * EPS32


@pytest.mark.parametrize("bias_mean", [0.0, -1.0])
@pytest.mark.parametrize("scaling", [None, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_equal_the_equations(kind, scaling, bias_mean):
    cfg = config(kind, rope_scaling=scaling)
    ids = tokens(cfg, 2, 20)
    expected = oracle.run_batch(cfg, published.random_weights(cfg, bias_mean=bias_mean), ids)
    out = model(cfg, bias_mean=bias_mean)(ids)
    assert error(out.logits, expected) < TOLERANCE
    assert out.loss is None and out.mtp_loss is None


@torch.no_grad()
def test_bfloat16_is_as_good_as_its_roundings():
    """Against the oracle on the same bfloat16 weights. Dense, since a rounded router input may choose other experts."""
    cfg = config("v3", n_routed_experts=None)
    lm, ids = model(cfg).to(torch.bfloat16), tokens(cfg, 2, 20)
    logits = lm(ids).logits
    assert logits.dtype == torch.bfloat16
    # About twenty roundings a layer, half a unit each, that add up like a random walk: sqrt(3 * 20) / 2 units.
    expected = oracle.run_batch(cfg, published.published_state(lm), ids)
    assert error(logits, expected) < 4 * torch.finfo(torch.bfloat16).eps


# ---------------------------------------------------------------- structure


@pytest.mark.parametrize(
    ("name", "count", "elements"),
    [
        ("deepseek-v3", 91_991 - 45_808, 684_489_845_504),  # of the published index, without the FP8 scales
        ("deepseek-v2", 29_102, 235_741_434_880),
        ("deepseek-v2-lite", 5_291, 15_706_484_224),
        ("glm-4.7-flash", 9_703, 31_221_488_576),
        ("kimi-k2-instruct", None, 1_026_408_232_448),
    ],
)
def test_the_expected_shapes_add_up_to_the_published_totals(name, count, elements):
    """The comparison of the tests below is itself right."""
    shapes = published.shapes(DeepseekConfig.from_pretrained(name))
    assert sum(math.prod(shape) for shape in shapes.values()) == elements
    assert count is None or len(shapes) == count


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_are_the_published_ones(kind):
    cfg = config(kind, num_nextn_predict_layers=2, first_k_dense_replace=2)
    state = published.published_state(DeepseekLM(cfg, device="meta"))
    assert {name: tuple(t.shape) for name, t in state.items()} == published.shapes(cfg, aliases=False)


@pytest.mark.parametrize("name", [n for n in presets() if not n.startswith("deepseek-v3.2")])
def test_every_preset_builds_on_the_meta_device_with_its_published_shapes(name):
    """The 671B and 1T models too: nothing is allocated, and no expert has a module of its own."""
    cfg = DeepseekConfig.from_pretrained(name)
    lm = DeepseekLM(cfg, device="meta")
    assert all(t.is_meta for t in lm.state_dict().values())
    state = published.published_state(lm)
    assert {key: tuple(t.shape) for key, t in state.items()} == published.shapes(cfg, aliases=False)


def test_v3_has_the_published_number_of_parameters():
    """The published counts to the last element, the correction biases counted."""
    lm = DeepseekLM(DeepseekConfig.from_pretrained("deepseek-v3"), device="meta")
    count = lambda module: sum(t.numel() for t in module.state_dict().values())  # noqa: E731
    assert count(lm.model) + count(lm.lm_head) == 671_026_419_200
    assert count(lm.mtp) == 11_610_068_224


@pytest.mark.parametrize("name", ["deepseek-v3.2", "deepseek-v3.2-exp"])
def test_v32_has_the_published_number_of_parameters(name):
    """The indexers of V3.2 are 851,524,864 of its main model, and one more is in its MTP module."""
    lm = DeepseekLM(DeepseekConfig.from_pretrained(name), device="meta")
    count = lambda module: sum(t.numel() for t in module.state_dict().values())  # noqa: E731
    assert count(lm.model) + count(lm.lm_head) == 671_026_419_200 + 851_524_864
    assert count(lm.mtp) == 11_610_068_224 + 851_524_864 // 61


def test_initialization():
    """Normal weights of the config's width, norms one, biases zero, and nothing left uninitialized."""
    cfg = config("v3", initializer_range=0.05, num_nextn_predict_layers=1)
    lm = DeepseekLM(cfg, dtype=torch.float32)
    for name, tensor in lm.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            assert torch.count_nonzero(tensor) == 0, name
        elif tensor.ndim == 1:
            assert (tensor == 1).all(), name
        else:
            # The standard deviation of n samples is itself known to 1 / sqrt(2 n); five of those.
            assert float(tensor.std()) == pytest.approx(0.05, rel=5 / math.sqrt(2 * tensor.numel())), name
    torch.manual_seed(1)
    first = DeepseekLM(cfg).state_dict()
    torch.manual_seed(1)
    second = DeepseekLM(cfg).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_device_and_dtype_as_torch_factories():
    cfg = config("v3", num_hidden_layers=2)
    assert DeepseekLM(cfg, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert DeepseekLM(cfg).dtype == torch.get_default_dtype()
    with torch.device("meta"):
        assert DeepseekLM(cfg).device.type == "meta"


def test_tied_embeddings_are_one_parameter():
    """TRAPS H1: off in every published model, honoured where a config has it."""
    cfg = config("v3", tie_word_embeddings=True)
    lm, ids = model(cfg), tokens(cfg, 1, 6)
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    assert error(lm(ids).logits, oracle.run_batch(cfg, published.random_weights(cfg), ids)) < TOLERANCE
    untied = model(config("v3"))
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert not DeepseekConfig.from_pretrained("deepseek-v3").tie_word_embeddings


def test_a_model_without_experts():
    cfg = config("v3", n_routed_experts=None, n_shared_experts=None)
    lm, ids = model(cfg), tokens(cfg, 1, 6)
    assert error(lm(ids).logits, oracle.run_batch(cfg, published.random_weights(cfg), ids)) < TOLERANCE


def test_correction_biases_stay_float32_in_a_whole_model():
    """TRAPS C2: casts, copies, pickles and state dicts."""
    lm = model(config("v3", num_nextn_predict_layers=1))
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    before = {k: v.clone() for k, v in lm.state_dict().items() if k.endswith("e_score_correction_bias")}
    assert len(before) == 3

    def kept(other):
        state = other.state_dict()
        return all(state[k].dtype == torch.float32 and torch.equal(state[k], v) for k, v in before.items())

    assert kept(lm.to(torch.bfloat16)) and kept(lm.half()) and kept(copy.deepcopy(lm)) and kept(lm.float())
    stream = io.BytesIO()
    torch.save(lm.bfloat16(), stream)
    stream.seek(0)
    assert kept(torch.load(stream, weights_only=False))
    other = DeepseekLM(lm.config, dtype=torch.bfloat16)
    other.load_state_dict(lm.state_dict())
    assert kept(other) and other.state_dict()[name].dtype == torch.float32


# ---------------------------------------------------------------- padding and packing


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(side):
    """TRAPS B9: padded rows equal the same rows alone, whatever the padding tokens are."""
    cfg = config("v3", rope_scaling=YARN)
    lm, ids = model(cfg), tokens(cfg, 3, 10)
    mask = torch.ones(3, 10, dtype=torch.long)
    for row, pad in ((1, 4), (2, 7)):
        mask[row, slice(None, pad) if side == "left" else slice(10 - pad, None)] = 0
    logits = lm(ids, attention_mask=mask).logits
    assert torch.isfinite(logits).all()
    for row in range(3):
        real = mask[row].bool()
        assert error(logits[row : row + 1, real], lm(ids[row : row + 1, real]).logits) < TOLERANCE
    other = torch.where(mask.bool(), ids, (ids + 17) % cfg.vocab_size)
    changed = lm(other, attention_mask=mask.bool()).logits
    assert error(changed[mask.bool()], logits[mask.bool()]) < TOLERANCE
    # Left padding without the mask moves every position and shows every pad: the wrong answer.
    if side == "left":
        assert error(lm(ids).logits[2, 7:], logits[2, 7:]) > 0.05


def test_padding_on_both_sides_and_its_gradient():
    cfg = config("v3")
    lm, ids = model(cfg), tokens(cfg, 2, 8)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    out = lm(ids, attention_mask=mask)
    expected = oracle.run_batch(cfg, published.random_weights(cfg), ids, mask)
    assert error(out.logits[mask.bool()], expected[mask.bool()]) < TOLERANCE
    out.logits[mask.bool()].square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in lm.parameters())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_predicts_nothing_and_is_not_predicted(side):
    """The first real token of a left-padded row has nothing before it: a loss that asked the padding for it would
    depend on which token pads. The row's loss is that of the row alone."""
    cfg = config("v3")
    lm, ids = model(cfg), tokens(cfg, 1, 8)
    real = slice(3, None) if side == "left" else slice(None, 5)
    mask = torch.zeros(1, 8, dtype=torch.long)
    mask[:, real] = 1
    labels = ids.masked_fill(mask == 0, -100)
    alone = lm(ids[:, real], labels=ids[:, real]).loss
    for padding in (0, 1):
        padded = ids.masked_fill(mask == 0, padding)
        assert error(lm(padded, attention_mask=mask, labels=labels).loss, alone) < TOLERANCE


@torch.no_grad()
def test_packed_documents_equal_separate_runs():
    """Attention and positions stop at document ends; position ids that start again mark them."""
    cfg = config("v3", rope_scaling=YARN)
    lm, ids, lengths = model(cfg), tokens(cfg, 2, 12), [5, 1, 6]
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    logits = lm(ids, position_ids=positions).logits
    expected = oracle.run_batch(cfg, published.random_weights(cfg), ids, documents=lengths)
    assert error(logits, expected) < TOLERANCE
    assert error(lm(ids).logits, expected) > 0.05  # one long document is something else


@torch.no_grad()
def test_rows_packed_differently_and_padded():
    cfg = config("v3")
    lm, ids = model(cfg), tokens(cfg, 2, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 0, 0, 1, 2, 0, 1, 2, 3]])
    mask = torch.tensor([[1] * 9, [0, 0, 1, 1, 1, 1, 1, 1, 1]])
    logits = lm(ids, attention_mask=mask, position_ids=positions).logits
    for row, start, end in ((0, 0, 4), (0, 4, 9), (1, 2, 5), (1, 5, 9)):
        alone = lm(ids[row : row + 1, start:end]).logits
        assert error(logits[row : row + 1, start:end], alone) < TOLERANCE, (row, start)


def test_packed_loss_equals_the_documents_losses():
    """The first token of a document is no target of the document before."""
    cfg = config("v3")
    lm, ids = model(cfg), tokens(cfg, 1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    labels = ids.clone()
    labels[0, 4] = -100
    got = lm(ids, position_ids=positions, labels=labels).loss
    parts = [lm(part, labels=part).loss for part in (ids[:, :4], ids[:, 4:])]
    assert error(got, (3 * parts[0] + 4 * parts[1]) / 7) < TOLERANCE


# ---------------------------------------------------------------- arguments


@torch.no_grad()
def test_given_positions_are_used_and_only_differences_matter():
    cfg = config("v3", rope_scaling=YARN)
    lm, ids = model(cfg), tokens(cfg, 2, 7)
    plain = lm(ids).logits
    assert torch.equal(lm(ids, position_ids=torch.arange(7).expand(2, -1)).logits, plain)
    # Angles near 50 are rounded to 4e-6.
    assert error(lm(ids, position_ids=torch.arange(50, 57).expand(2, -1)).logits, plain) < 50 * TOLERANCE
    cache = lm.new_cache(2)
    lm(ids[:, :4], cache=cache)
    later = lm(ids[:, 4:], position_ids=torch.arange(14, 17).expand(2, -1), cache=cache).logits
    assert error(later, plain[:, 4:]) > 0.01


@torch.no_grad()
def test_inputs_embeds_instead_of_ids():
    cfg = config("v3")
    lm, ids = model(cfg), tokens(cfg, 2, 7)
    embeds = lm.model.embed_tokens(ids)
    assert torch.equal(lm(inputs_embeds=embeds).logits, lm(ids).logits)
    cache = lm.new_cache(2)
    lm(inputs_embeds=embeds[:, :4], cache=cache)
    assert error(lm(ids[:, 4:], cache=cache).logits, lm(ids).logits[:, 4:]) < TOLERANCE


@torch.no_grad()
def test_logits_to_keep():
    cfg = config("v3")
    lm, ids = model(cfg), tokens(cfg, 2, 7)
    whole = lm(ids)
    assert error(lm(ids, logits_to_keep=3).logits, whole.logits[:, 4:]) < TOLERANCE
    index = torch.tensor([5, 0])
    assert error(lm(ids, logits_to_keep=index).logits, whole.logits[:, [5, 0]]) < TOLERANCE
    last = lm(ids, logits_to_keep=1)
    assert last.logits.shape == (2, 1, cfg.vocab_size)
    assert last.hidden_states.shape == (2, 7, cfg.hidden_size)


@torch.no_grad()
def test_hidden_states_are_those_after_the_final_norm():
    cfg = config("v3")
    ids = tokens(cfg, 1, 7)
    expected = oracle.run(cfg, published.random_weights(cfg), ids[0].tolist()).hidden
    assert error(model(cfg)(ids).hidden_states[0], expected) < TOLERANCE


@torch.no_grad()
def test_later_tokens_and_other_rows_do_not_matter():
    cfg = config("v3")
    lm, ids = model(cfg), tokens(cfg, 3, 9)
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % cfg.vocab_size
    assert error(lm(changed).logits[:, :6], lm(ids).logits[:, :6]) < TOLERANCE
    assert error(lm(ids[1:2]).logits, lm(ids).logits[1:2]) < TOLERANCE


MISTAKES = {
    "id-too-large": (lambda ids: {"input_ids": ids.index_fill(1, torch.tensor(2), 61)}, "between 0 and 60, got 61"),
    "negative-id": (lambda ids: {"input_ids": ids.index_fill(1, torch.tensor(2), -1)}, "between 0 and 60, got -1"),
    "float-ids": (lambda ids: {"input_ids": ids.float()}, "integer input_ids, got torch.float32"),
    "one-dimension": (lambda ids: {"input_ids": ids[0]}, r"integer input_ids \[B, T\].*got \[5\]"),
    "no-tokens": (lambda ids: {"input_ids": ids[:, :0]}, r"T >= 1, got \[2, 0\]"),
    "nothing": (lambda ids: {}, "exactly one of input_ids and inputs_embeds"),
    "both": (lambda ids: {"input_ids": ids, "inputs_embeds": torch.zeros(2, 5, 32)}, "exactly one of"),
    "narrow-embeds": (lambda ids: {"inputs_embeds": torch.zeros(2, 5, 31)}, r"\[B, T, 32\], got \[2, 5, 31\]"),
    "mask-length": (lambda ids: {"input_ids": ids, "attention_mask": torch.ones(2, 6)}, r"\[2, 5\], got \[2, 6\]"),
    "mask-rows": (lambda ids: {"input_ids": ids, "attention_mask": torch.ones(3, 5)}, r"\[2, 5\], got \[3, 5\]"),
    "positions": (lambda ids: {"input_ids": ids, "position_ids": torch.arange(4)[None]}, r"\[2, 5\], got \[1, 4\]"),
    "labels": (lambda ids: {"input_ids": ids, "labels": ids[:, 1:]}, r"labels \[2, 5\], got \[2, 4\]"),
    "labels-and-few-logits": (lambda ids: {"input_ids": ids, "labels": ids, "logits_to_keep": 1}, "logits_to_keep 0"),
    "labels-and-some-logits": (
        lambda ids: {"input_ids": ids, "labels": ids, "logits_to_keep": torch.tensor([0, 2])},
        "logits_to_keep 0",
    ),
    "label-too-large": (lambda ids: {"input_ids": ids, "labels": ids + 61}, "between 0 and 60"),
    "position-rows": (
        lambda ids: {"input_ids": ids, "position_ids": torch.arange(5).expand(3, -1)},
        r"\[2, 5\], got \[3, 5\]",
    ),
    "negative-logits-to-keep": (lambda ids: {"input_ids": ids, "logits_to_keep": -2}, "logits_to_keep .*got -2"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(arguments, message):
    cfg = config("v3", num_hidden_layers=1)
    with pytest.raises(ValueError, match=message):
        DeepseekLM(cfg)(**arguments(tokens(cfg, 2, 5)))


def test_packed_documents_do_not_go_into_a_cache():
    cfg = config("v3", num_hidden_layers=1)
    lm = DeepseekLM(cfg)
    with pytest.raises(ValueError, match="one document a row with a cache"):
        lm(tokens(cfg, 1, 4), position_ids=torch.tensor([[0, 1, 0, 1]]), cache=lm.new_cache(1))
