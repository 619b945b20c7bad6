"""Losses without logits: the same as through the logits, for every way of counting targets, and never all at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_arch.layers.linear import Linear
from deepseek_arch.models import losses
from deepseek_arch.models.global_loss import global_loss
from deepseek_arch.models.losses import head_losses, plain_weight
from deepseek_arch.models.outputs import CausalLMOutput, LossCounts
from deepseek_kernels.loss.linear_cross_entropy import reference
from support.small_models import config, error, model, tokens

EPS32 = torch.finfo(torch.float32).eps
# Two orders of the same sums: of 32 products for a logit, of 61 exponentials, of 61 or about 50 products for the
# gradients of the head. Behind it both run the same products, which amplify that as in test_training.
TOLERANCE = 64 * EPS32
GRADIENT_TOLERANCE = 1024 * EPS32


def _cases():
    ignored = torch.arange(20).view(2, 10)
    ignored[0, 4:6] = -100
    left, right = torch.ones(2, 10), torch.ones(2, 10)
    left[0, :4], right[1, 7:] = 0, 0
    packed = torch.cat([torch.arange(4), torch.arange(6)]).expand(2, -1)
    return {
        "plain": {},
        "ignored": {"labels": ignored},
        "left-padding": {"attention_mask": left},
        "right-padding": {"attention_mask": right},
        "documents": {"position_ids": packed},
        "all-ignored": {"labels": torch.full((2, 10), -100)},
    }


def _passes(cfg, arguments, *, detached=False, training=False):
    """Outputs and gradients through the logits, then with the operator for the prediction layers, then for all."""
    ids = torch.arange(20).view(2, 10)
    results = []
    for hooked, options in ((True, {}), (False, {}), (False, {"return_logits": False})):
        lm = model(cfg).train(training)
        lm.mtp_detached = detached
        if hooked:
            lm.lm_head.register_forward_hook(lambda module, inputs, output: None)
        out = lm(ids, **({"labels": ids} | arguments | options))
        loss = out.loss if out.mtp_loss is None else out.loss + 0.3 * out.mtp_loss
        loss.backward()
        results.append((out, {name: p.grad for name, p in lm.named_parameters()}))
    return results


def _assert_same(got, expected):
    (out, gradients), (wanted, wanted_gradients) = got, expected
    for name in ("loss", "mtp_loss", "mtp_losses"):
        mine, theirs = getattr(out, name), getattr(wanted, name)
        assert (mine is None) == (theirs is None)
        assert mine is None or (mine.dtype == torch.float32 and error(mine, theirs) < TOLERANCE), name
    assert wanted.mtp_accuracy is None or torch.equal(out.mtp_accuracy, wanted.mtp_accuracy)
    for name, gradient in wanted_gradients.items():
        assert (gradient is None) == (gradients[name] is None), name
        assert gradient is None or error(gradients[name], gradient) < GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("detached", [False, True], ids=["joint", "detached"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", _cases().values(), ids=_cases())
def test_losses_and_gradients_are_those_through_the_logits(case, tied, detached):
    cfg = config("v3", num_nextn_predict_layers=2, tie_word_embeddings=tied)
    through, drafts, without = _passes(cfg, case, detached=detached)
    assert without[0].logits is None and torch.equal(drafts[0].logits, through[0].logits)
    assert torch.equal(drafts[0].loss, through[0].loss)
    _assert_same(drafts, through)
    _assert_same(without, through)


def test_a_model_without_prediction_layers():
    through, _, without = _passes(config("v2-lite"), {})
    assert without[0].logits is None and without[0].mtp_losses is None
    _assert_same(without, through)


def test_balance_losses_are_added_as_ever():
    through, _, without = _passes(config("v3", num_nextn_predict_layers=1), {}, training=True)
    assert through[0].aux_loss is not None and torch.equal(through[0].aux_loss, without[0].aux_loss)
    _assert_same(without, through)


def test_all_prediction_layers_take_one_call(monkeypatch):
    """The next token's loss has its own: in one with the others, it would give their layers gradients of zero."""
    calls = []

    def recorded(*arguments, **options):
        calls.append(options["segments"])
        return operator(*arguments, **options)

    operator = losses.linear_cross_entropy
    monkeypatch.setattr(losses, "linear_cross_entropy", recorded)
    lm, ids = model(config("v3", num_nextn_predict_layers=2)), tokens(config("v3"), 2, 6)
    lm(ids, labels=ids, return_logits=False)
    lm(ids, labels=ids)
    assert calls == [[12], [12, 12], [12, 12]]


@torch.no_grad()
def test_without_labels_the_head_does_not_run():
    cfg = config("v3")
    lm, ids = model(cfg), tokens(cfg, 2, 6)
    lm.lm_head.register_forward_hook(lambda module, inputs, output: pytest.fail("the head ran"))
    out = lm(ids, return_logits=False)
    assert out.logits is None and out.loss is None and out.hidden_states.shape == (2, 6, cfg.hidden_size)


def test_with_a_cache_the_next_tokens_loss_alone():
    cfg = config("v3", num_nextn_predict_layers=1)
    lm, ids = model(cfg), tokens(cfg, 2, 6)
    expected = lm(ids, labels=ids, cache=lm.new_cache(2)).loss
    out = lm(ids, labels=ids, cache=lm.new_cache(2), return_logits=False)
    assert error(out.loss, expected) < TOLERANCE and out.mtp_losses is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_rounds_where_the_logits_do(dtype, autocast):
    """Logits are rounded to 16 bits either way: half an ulp more or less, where two orders of a sum differ."""
    cfg = config("v3", num_nextn_predict_layers=1)
    lm, ids = model(cfg), tokens(cfg, 2, 12)
    lm = lm if autocast else lm.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = lm(ids, labels=ids)
        without = lm(ids, labels=ids, return_logits=False)
    bound = torch.finfo(dtype).eps * float(out.logits.detach().abs().max())
    assert without.loss.dtype == torch.float32 and abs(float((without.loss - out.loss).detach())) <= bound
    (without.loss + without.mtp_loss).backward()
    assert all(p.grad.isfinite().all() for p in lm.parameters() if p.grad is not None)
    assert lm.lm_head.weight.grad.any()


def test_logits_never_exist_all_at_once(monkeypatch):
    cfg = config("v3", vocab_size=1500, num_nextn_predict_layers=1, num_hidden_layers=1)
    lm, ids = model(cfg), tokens(cfg, 2, 100)
    logits, chunk = 2 * 100 * 1500 * 4, 16 * 1500 * 4
    monkeypatch.setattr(reference, "CHUNK_BYTES", chunk)

    def largest(**options):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            out = lm(ids, labels=ids, **options)
            (out.loss + out.mtp_loss).backward()
        return max(event.self_cpu_memory_usage for event in profiler.events())

    # The weight's gradient, once for each of the two losses, is the largest that is left.
    assert largest(return_logits=False) <= 2 * lm.lm_head.weight.numel() * 4 < logits
    assert largest() >= logits


class _Doubled(Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _patched(head):
    head.forward = lambda x: 2 * Linear.forward(head, x)


def _biased(head):
    head.bias = nn.Parameter(torch.linspace(-1, 1, head.out_features))


def _parametrized(head):
    nn.utils.parametrizations.weight_norm(head)
    with torch.no_grad():
        head.parametrizations.weight.original0.mul_(2)


CHANGES = {
    "bias": _biased,
    "replaced forward": _patched,
    "subclass": lambda head: setattr(head, "__class__", _Doubled),
    "parametrized": _parametrized,
    "hook": lambda head: head.register_forward_hook(lambda module, inputs, output: 2 * output),
    "pre-hook": lambda head: head.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("detached", [False, True])
def test_any_other_head_is_called(change, detached):
    cfg = config("v3", num_nextn_predict_layers=1)
    lm, ids = model(cfg), tokens(cfg, 2, 8)
    plain = lm(ids, labels=ids)
    lm.mtp_detached = detached
    change(lm.lm_head)
    assert plain_weight(lm.lm_head) is None
    out, without = lm(ids, labels=ids), lm(ids, labels=ids, return_logits=False)
    assert without.logits is None and torch.equal(without.loss, out.loss)
    assert error(out.loss, plain.loss) > 0.01 and error(out.mtp_loss, plain.mtp_loss) > 0.01


def test_backward_hooks_of_the_head_are_called():
    cfg, called = config("v3"), []
    lm, ids = model(cfg), tokens(cfg, 1, 5)
    lm.lm_head.register_full_backward_hook(lambda module, grad_in, grad_out: called.append(module))
    lm(ids, labels=ids, return_logits=False).loss.backward()
    assert called == [lm.lm_head]


def test_adapters_on_the_head_are_called():
    peft = pytest.importorskip("peft")
    cfg = config("v3", num_nextn_predict_layers=1)
    lm, ids = model(cfg), tokens(cfg, 2, 8)
    adapted = peft.get_peft_model(lm, peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    through, without = adapted(ids, labels=ids), adapted(ids, labels=ids, return_logits=False)
    assert torch.equal(through.loss, without.loss)
    without.loss.backward()
    gradients = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert gradients and all("lora_" in name and "lm_head" in name for name in gradients)


def test_a_frozen_head_and_a_frozen_trunk():
    cfg = config("v3", num_nextn_predict_layers=1)
    ids, results = tokens(cfg, 2, 8), []
    for trained in (None, "lm_head", "model"):
        lm = model(cfg)
        for name, parameter in lm.named_parameters():
            parameter.requires_grad_(trained is None or name.startswith(trained))
        lm(ids, labels=ids, return_logits=False).loss.backward()
        results.append({name: p.grad for name, p in lm.named_parameters() if p.grad is not None})
    everything, head, trunk = results
    assert not any(name.startswith("mtp.") for name in everything)  # none, rather than zeros
    assert head.keys() == {"lm_head.weight"} and trunk.keys() == everything.keys() - head.keys()
    for name, gradient in (head | trunk).items():
        assert error(gradient, everything[name]) < GRADIENT_TOLERANCE, name


def test_compiled_losses_are_the_same():
    torch.compiler.reset()
    head, states = Linear(8, 11, bias=False), [torch.randn(2, 5, 8, requires_grad=True) for _ in range(2)]
    targets = [torch.randint(11, (2, 5)) for _ in states]
    compiled = torch.compile(head_losses, fullgraph=True, backend="aot_eager")
    results = []
    for function in (head_losses, compiled):
        found, right = function(head, states, targets)
        results.append((found, right, *torch.autograd.grad(found.sum(), (*states, head.weight))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_means_and_shares_of_each_input():
    head = Linear(8, 11, bias=False)
    states, targets = [torch.randn(2, 5, 8), torch.randn(3, 8)], [torch.randint(11, (2, 5)), torch.tensor([-100] * 3)]
    with torch.no_grad():
        targets[0][0, :2] = head(states[0])[0, :2].argmax(-1)
    targets[0][1] = -100
    found, right = head_losses(head, states, targets)
    logits = head(states[0])[0]
    expected = nn.functional.cross_entropy(logits.double(), targets[0][0])
    assert error(found[0], expected) < TOLERANCE and found[1] == 0
    assert right.tolist() == [pytest.approx(float((logits.argmax(-1) == targets[0][0]).float().mean())), 0.0]


def test_each_mean_is_weighed_by_what_it_is_over(monkeypatch):
    """Two ranks: cross-entropies are means over targets, balance losses over sequences."""
    own = LossCounts(torch.tensor([6, 4, 1]), torch.tensor([2, 3, 1]))
    other = LossCounts(torch.tensor([2, 4, 3]), torch.tensor([6, 1, 4]))

    def reduce(total, group=None):
        total += torch.stack(other)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    out = CausalLMOutput(None, loss=torch.tensor(3.5), aux_loss=torch.tensor(0.5), counts=own)
    out.mtp_losses, out.mtp_aux_losses = torch.tensor([4.0, 5.0]), torch.tensor([0.25, 0.75])
    main = 3.0 * 6 * 2 / 8 + 0.5 * 2 * 2 / 8
    ahead = (4.0 * 4 * 2 / 8 + 0.25 * 3 * 2 / 4 + 5.0 * 1 * 2 / 4 + 0.75 * 1 * 2 / 5) / 2
    assert global_loss(out) == pytest.approx(main)
    assert global_loss(out, mtp_weight=0.5) == pytest.approx(main + 0.5 * ahead)
