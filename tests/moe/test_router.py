"""The three published routings: TRAPS C1 to C8, C13 and C14."""

import copy
import pickle

import pytest
import torch

from deepseek_arch.moe.moe import Router
from support.oracle import route as oracle_route
from support.small_models import KINDS, config, error

EPS32 = torch.finfo(torch.float32).eps
# A logit is a sum of 32 float32 products; a weight is one of up to 8 shares of a sum: tens of roundings in all.
TOLERANCE = 64 * EPS32


def _router(cfg, seed=0, bias_mean=0.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    router = Router.from_config(cfg, dtype=dtype)
    router.weight.data.copy_(torch.randn(router.weight.shape, generator=generator) * 2 * cfg.hidden_size**-0.5)
    if router.e_score_correction_bias is not None:
        noise = torch.randn(cfg.n_routed_experts, generator=generator)
        router.e_score_correction_bias.copy_(bias_mean + 0.2 * noise)
    return router


def _expected(cfg, router, x):
    """Expert ids [T, K] and weights [T, K] of the oracle, token by token."""
    bias = router.e_score_correction_bias
    bias = None if bias is None else bias.double()
    rows = [oracle_route(cfg, token, router.weight.detach().double(), bias) for token in x.detach().double()]
    return torch.tensor([ids for ids, _ in rows]), torch.stack([torch.stack(gates) for _, gates in rows])


def _inputs(cfg, tokens=200, seed=1):
    return torch.randn(tokens, cfg.hidden_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias_mean", [-2.0, -0.5, 0.0, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_equations(kind, bias_mean):
    """TRAPS C3 to C7: who is chosen, in which order, and with which weight; released biases average about 5."""
    cfg = config(kind)
    router, x = _router(cfg, bias_mean=bias_mean), _inputs(cfg)
    logits, weights, ids = router(x)
    expected_ids, expected = _expected(cfg, router, x)
    assert error(logits, x.double() @ router.weight.double().T) < TOLERANCE
    assert torch.equal(ids, expected_ids)
    assert error(weights, expected) < TOLERANCE


@pytest.mark.parametrize(("groups", "kept", "top_k"), [(2, 1, 4), (8, 3, 6), (4, 4, 5), (1, 1, 16), (2, 2, 1)])
@pytest.mark.parametrize("kind", ["v3", "v2"])
def test_every_group_count(kind, groups, kept, top_k):
    cfg = config(kind, n_routed_experts=16, n_group=groups, topk_group=kept, num_experts_per_tok=top_k)
    router, x = _router(cfg, bias_mean=-1.0), _inputs(cfg)
    _, weights, ids = router(x)
    expected_ids, expected = _expected(cfg, router, x)
    assert torch.equal(ids, expected_ids) and error(weights, expected) < TOLERANCE
    assert (torch.div(ids, 16 // groups, rounding_mode="floor").sort(-1).values.diff(dim=-1) > 0).sum(-1).max() < kept


@pytest.mark.parametrize(
    ("kind", "normalize", "total"),
    [("v3", True, 2.5), ("glm", True, 1.8), ("v2", True, 1.0), ("v2", False, None), ("v3", False, None)],
)
def test_normalization_and_scaling(kind, normalize, total):
    """TRAPS C7 and C8: V3 normalizes, then scales, once; V2's code does either."""
    cfg = config(kind, norm_topk_prob=normalize)
    router, x = _router(cfg), _inputs(cfg)
    logits, weights, ids = router(x)
    sums = weights.sum(-1)
    if total is not None:
        assert torch.allclose(sums, torch.full_like(sums, total), rtol=8 * EPS32)
    else:
        scores = logits.sigmoid() if kind == "v3" else logits.softmax(-1)
        assert torch.equal(weights, scores.gather(-1, ids) * cfg.routed_scaling_factor)


def test_a_single_expert_is_normalized_like_several():
    """As transformers and DeepSeek's inference code do; only V2's published code asks for more than one expert."""
    router, x = _router(config("v3", num_experts_per_tok=1)), _inputs(config("v3"))
    assert torch.allclose(router(x)[1], torch.tensor(2.5), rtol=8 * EPS32)
    router = _router(config("v2", num_experts_per_tok=1, norm_topk_prob=True))
    logits, weights, ids = router(x)
    assert torch.equal(weights, logits.softmax(-1).gather(-1, ids) * router.routed_scaling_factor)


def test_masked_groups_are_minus_infinity_not_zero():
    """TRAPS C4: with negative biased scores a fill of 0.0 would choose from the groups that were masked."""
    cfg = config("v3", num_experts_per_tok=4)
    router, x = _router(cfg, bias_mean=-2.0), _inputs(cfg)
    logits, _, ids = router(x)
    choice = (logits.sigmoid() + router.e_score_correction_bias).unflatten(-1, (4, 2))
    kept = choice.sum(-1).topk(2).indices
    mask = torch.zeros(len(x), 4).scatter(1, kept, 1.0).bool()
    filled_with_zero = choice.masked_fill(~mask[..., None], 0.0).flatten(1).topk(4).indices
    group_of = lambda experts: torch.div(experts, 2, rounding_mode="floor")  # noqa: E731
    assert mask.gather(1, group_of(ids)).all()
    assert not mask.gather(1, group_of(filled_with_zero)).any()  # the wrong answer


def test_group_scores_sum_two_best_in_v3_and_take_the_best_in_v2():
    """TRAPS C5: expert 0 is the best of all, experts 2 and 3 the best pair."""
    logits = torch.tensor([[3.0, -3.0, 2.0, 2.0]])
    sizes = {"topk_method": "noaux_tc", "n_group": 2, "topk_group": 1, "norm_topk_prob": False}
    _, v3 = Router(8, 4, 2, **sizes).route(logits)
    _, v2 = Router(8, 4, 2, **sizes | {"topk_method": "group_limited_greedy"}).route(logits)
    assert v3.tolist() == [[2, 3]] and v2.tolist() == [[0, 1]]


def test_greedy_ignores_groups():
    """TRAPS C6: V2-Lite's file leaves the groups null; a stray number must not limit the choice."""
    logits = torch.tensor([[3.0, -3.0, 2.0, 1.0]])
    router = Router(8, 4, 2, topk_method="greedy", n_group=2, topk_group=1, norm_topk_prob=False)
    assert router.route(logits)[1].tolist() == [[0, 2]]


def test_weights_come_from_unbiased_scores():
    """TRAPS C3: (1e-8 + 12) - 12 is 0 in float32, so a weight recovered by subtraction would vanish."""
    router = Router(4, 4, 2, norm_topk_prob=False, routed_scaling_factor=1.0)
    router.e_score_correction_bias.copy_(torch.tensor([12.0, 11.0, 0.0, 0.0]))
    logits = torch.tensor([[-18.42, -18.42, 5.0, 5.0]])
    weights, ids = router.route(logits)
    assert ids.tolist() == [[0, 1]]
    assert torch.allclose(weights, logits.sigmoid()[:, :2], rtol=4 * EPS32) and (weights > 0).all()
    assert float(logits.sigmoid()[0, 0] + 12 - 12) == 0  # the wrong answer


def test_logits_are_float32_in_a_bfloat16_model():
    """TRAPS C1: bfloat16 logits would send some tokens elsewhere."""
    cfg = config("v3", n_routed_experts=256, num_experts_per_tok=8)
    router = _router(cfg, dtype=torch.bfloat16)
    x = _inputs(cfg, tokens=300).to(torch.bfloat16)
    logits, weights, ids = router(x)
    assert logits.dtype == weights.dtype == torch.float32
    expected_ids, expected = _expected(cfg, router, x)
    assert torch.equal(ids, expected_ids) and error(weights, expected) < TOLERANCE
    _, rounded = router.route((x @ router.weight.T).float())
    assert (rounded.sort(-1).values != ids.sort(-1).values).any(-1).any()  # the wrong answer


def test_autocast_does_not_reach_the_router():
    """TRAPS C1: mixed precision would take the product of the scores down to bfloat16."""
    cfg = config("v3", n_routed_experts=256, num_experts_per_tok=8)
    router, x = _router(cfg), _inputs(cfg)
    plain = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(router(x), plain, strict=True))
        assert not torch.equal(torch.nn.functional.linear(x, router.weight).float(), plain[0])  # the wrong answer


CASTS = {
    "to-bfloat16": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to-device-and-dtype": lambda m: m.to("cpu", torch.float16),
    "there-and-back": lambda m: m.to(torch.bfloat16).float(),
    "inside-another-module": lambda m: torch.nn.Sequential(torch.nn.Sequential(m)).to(torch.bfloat16)[0][0],
    "deepcopy": lambda m: copy.deepcopy(m.to(torch.bfloat16)),
    "pickle": lambda m: pickle.loads(pickle.dumps(m.to(torch.bfloat16))),
    "cast-of-a-copy": lambda m: copy.deepcopy(m).to(torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_bias_keeps_its_bits_under_any_cast(cast):
    """TRAPS C2: 0.1 rounded to bfloat16 and back would be 0.10009765625."""
    router = _router(config("v3"))
    before = router.e_score_correction_bias.clone()
    after = cast(router)
    assert after.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(after.e_score_correction_bias, before)
    assert "e_score_correction_bias" in dict(after.named_buffers())  # still moves and saves with the module
    # ... and a loaded value reaches the buffer that is used
    after.load_state_dict({**after.state_dict(), "e_score_correction_bias": torch.full((8,), 3.0)})
    assert torch.equal(after.e_score_correction_bias, torch.full((8,), 3.0))


def test_bias_is_float32_whatever_a_state_dict_assigns():
    """TRAPS C2: `assign=True` replaces tensors instead of copying into them."""
    router = _router(config("v3"))
    state = {name: tensor.to(torch.bfloat16) for name, tensor in router.state_dict().items()}
    router.load_state_dict(state, assign=True)
    assert router.weight.dtype == torch.bfloat16 and router.e_score_correction_bias.dtype == torch.float32


def test_bias_is_float32_in_a_model_built_in_bfloat16():
    router = Router.from_config(config("v3"), dtype=torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16 and router.e_score_correction_bias.dtype == torch.float32


def test_bias_is_a_saved_buffer_for_every_hidden_size_and_no_parameter():
    """TRAPS C2 and C13: official code has it for hidden size 7168 only; an optimizer must not find it."""
    for size in (8, 7168):
        router = Router(size, 4, 2)
        assert "e_score_correction_bias" in router.state_dict()
        assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert set(Router(8, 4, 2, topk_method="greedy").state_dict()) == {"weight"}


def test_the_choice_has_no_gradient_and_the_weights_have_the_right_one():
    cfg = config("v3")
    router, x = _router(cfg), _inputs(cfg, tokens=20).requires_grad_()
    direction = torch.randn(20, 3, generator=torch.Generator().manual_seed(2))
    _, weights, _ = router(x)
    (weights * direction).sum().backward()

    weight, exact_x = router.weight.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    bias = router.e_score_correction_bias.double()
    rows = [torch.stack(oracle_route(cfg, token, weight, bias)[1]) for token in exact_x]
    (torch.stack(rows) * direction).sum().backward()
    # Normalized weights differentiate to differences of nearly equal terms: up to ten times the forward's error.
    assert error(router.weight.grad, weight.grad) < 10 * TOLERANCE
    assert error(x.grad, exact_x.grad) < 10 * TOLERANCE


@pytest.mark.parametrize("kind", ["v3", "v2", "v2-lite"])
def test_equal_scores_go_to_the_smaller_id(kind):
    """TRAPS C14: of experts and of groups."""
    cfg = config(kind, n_routed_experts=64, num_experts_per_tok=6)
    router = Router.from_config(cfg)
    _, ids = router.route(torch.zeros(50, 64))
    assert torch.equal(ids, torch.arange(6).expand(50, 6))


def test_ties_between_some_experts():
    router = Router(8, 6, 4, norm_topk_prob=False)
    _, ids = router.route(torch.tensor([[0.0, 1.0, 0.0, 1.0, 2.0, 0.0]]))
    assert ids.tolist() == [[4, 1, 3, 0]]


def test_any_leading_shape_and_no_tokens():
    cfg = config("v3")
    router, x = _router(cfg), _inputs(cfg, tokens=12)
    flat = router(x)
    folded = router(x.view(3, 4, -1))
    assert all(torch.equal(a, b) for a, b in zip(flat, folded, strict=True))
    logits, weights, ids = router(x[:0])
    assert logits.shape == (0, 8) and weights.shape == ids.shape == (0, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topk_method": "best"}, "expected topk_method .* got 'best'"),
        ({"n_group": 3}, "groups that divide 8 experts"),
        ({"n_group": 4, "topk_group": 5}, "got 5 of 4 groups"),
        ({"n_group": 4, "topk_group": 1, "top_k": 3}, "expected 1 <= top_k <= 2"),
        ({"top_k": 9}, "expected 1 <= top_k <= 8"),
    ],
)
def test_impossible_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Router(16, 8, **{"top_k": 2} | arguments)
