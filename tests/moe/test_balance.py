"""Balancing, from the formulas: losses as plain loops over equations, biases as plain integer arithmetic."""

import pytest
import torch
import torch.multiprocessing as mp

from deepseek_arch.moe.balance_loss import BalanceLoss
from deepseek_arch.moe.expert_load import ExpertLoad, LoadHistory
from deepseek_arch.moe.load_balancer import LoadBalancer, expert_loads, routers
from deepseek_arch.moe.moe import Router
from deepseek_arch.moe.placement import plan_placement
from deepseek_arch.moe.token_dropping import TokenDropping
from support.small_models import config, error, model, tokens

EPS32 = torch.finfo(torch.float32).eps


def _router(method="noaux_tc", experts=8, top_k=2, groups=4, kept=2):
    router = Router(16, experts, top_k, topk_method=method, n_group=groups, topk_group=kept)
    torch.nn.init.normal_(router.weight)
    if router.e_score_correction_bias is not None:
        torch.nn.init.normal_(router.e_score_correction_bias)
    return router


def _routed(router, shape=(3, 7)):
    logits, _, ids = router(torch.randn(*shape, 16))
    return logits.detach(), ids, shape


# ---------------------------------------------------------------- losses


def _sequence_loss(scores, counted, lengths):
    """V3 report, equations 17 to 20, sequence by sequence, in float64."""
    losses = []
    for row, length in enumerate(lengths):
        s, experts, k = scores[row, :length].double(), scores.shape[-1], counted.shape[-1]
        total = 0.0
        for i in range(experts):
            f = sum(int(i in counted[row, t].tolist()) for t in range(length)) * experts / (k * length)
            p = sum(float(s[t, i] / s[t].sum()) for t in range(length)) / length
            total += f * p
        losses.append(total)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("counts", ["unbiased", "routed"])
@pytest.mark.parametrize("method", ["noaux_tc", "greedy", "group_limited_greedy"])
def test_sequence_loss_is_the_equations(method, counts):
    """TRAPS D5, D6: normalized over all experts; f from the raw scores or from the experts chosen."""
    router = _router(method)
    logits, ids, shape = _routed(router)
    lengths = [7, 4, 1]
    valid = torch.arange(7) < torch.tensor(lengths)[:, None]
    scores = (logits.sigmoid() if method == "noaux_tc" else logits.softmax(-1)).unflatten(0, shape)
    counted = ids.unflatten(0, shape)
    if counts == "unbiased":
        counted = scores.topk(2, -1).indices
    expected = 0.25 * _sequence_loss(scores, counted, lengths)
    got = BalanceLoss(sequence=0.25, counts=counts)(router, logits, ids, shape, valid)
    # Sums of some ten float32 numbers each.
    assert float(got) == pytest.approx(expected, rel=50 * EPS32)


def test_both_ways_of_counting_differ_where_biases_decide():
    router = _router()
    logits, ids, shape = _routed(router, (4, 50))
    losses = [float(BalanceLoss(sequence=1.0, counts=c)(router, logits, ids, shape)) for c in ("unbiased", "routed")]
    assert abs(losses[0] - losses[1]) > 0.01


def test_perfect_balance_gives_alpha():
    router = _router(top_k=1, groups=1, kept=1)
    logits = 10 * torch.eye(8)[None].flatten(0, 1)  # token t prefers expert t
    ids = torch.arange(8)[:, None]
    assert float(BalanceLoss(sequence=0.3)(router, logits, ids, (1, 8))) == pytest.approx(0.3, rel=20 * EPS32)


def test_losses_of_v2_are_their_equations():
    """V2 report, equations 23 to 31, with 4 devices of 2 experts and at most 2 of them for a token."""
    router = _router("group_limited_greedy")
    logits, ids, shape = _routed(router)
    loss = BalanceLoss(expert=0.5, device=0.25, communication=0.125, devices=4)
    scores, chosen = logits.softmax(-1).double().unflatten(0, shape), ids.unflatten(0, shape)
    (batch, length), experts, k, devices, most = shape, 8, 2, 4, 2
    expected = 0.0
    for b in range(batch):
        picks = chosen[b].tolist()
        f = [experts / (k * length) * sum(i in pick for pick in picks) for i in range(experts)]
        p = [float(scores[b, :, i].mean()) for i in range(experts)]
        on = [range(2 * d, 2 * d + 2) for d in range(devices)]
        sent = [
            devices / (most * length) * sum(any(i in pick for i in on[d]) for pick in picks) for d in range(devices)
        ]
        expected += 0.5 * sum(a * c for a, c in zip(f, p, strict=True)) / batch
        for d in range(devices):
            mass = sum(p[i] for i in on[d])
            expected += (0.25 * sum(f[i] for i in on[d]) / 2 * mass + 0.125 * sent[d] * mass) / batch
    assert float(loss(router, logits, ids, shape)) == pytest.approx(expected, rel=50 * EPS32)


def test_the_gradient_is_that_of_the_scores_with_the_counts_held():
    router = _router()
    logits, ids, shape = _routed(router)
    leaf = logits.detach().clone().requires_grad_()
    BalanceLoss(sequence=1.0)(router, leaf, ids, shape).backward()
    other = logits.detach().clone().double().requires_grad_()
    scores = other.sigmoid().unflatten(0, shape)
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(2, -1).indices, 1.0).detach()
    f = chosen.mean(1) * 8 / 2
    ((f * (scores / scores.sum(-1, keepdim=True)).mean(1)).sum(-1)).mean().backward()
    assert error(leaf.grad, other.grad) < 50 * EPS32


def test_the_loss_depends_neither_on_batch_size_nor_on_accumulation():
    """TRAPS D7."""
    router, loss = _router(), BalanceLoss(sequence=1.0)
    logits, ids, shape = _routed(router, (4, 6))
    whole = loss(router, logits, ids, shape)
    parts = [loss(router, logits[6 * i : 6 * i + 6], ids[6 * i : 6 * i + 6], (1, 6)) for i in range(4)]
    assert float(whole) == pytest.approx(float(sum(parts)) / 4, rel=20 * EPS32)
    twice = loss(router, logits.repeat(2, 1), ids.repeat(2, 1), (8, 6))
    assert float(twice) == pytest.approx(float(whole), rel=20 * EPS32)


def test_default_factors():
    """TRAPS D8: a config without one does not mean zero."""
    assert BalanceLoss.from_config(config("v3")) == BalanceLoss(sequence=1e-4, counts="unbiased")
    assert BalanceLoss.from_config(config("v2")) == BalanceLoss(sequence=1e-3, counts="routed")
    assert BalanceLoss.from_config(config("v3", aux_loss_alpha=0.0)).active is False
    assert BalanceLoss.from_config(config("moonlight", aux_loss_alpha=0.001)).sequence == 0.001


@pytest.mark.parametrize("kind", ["v3", "v2", "v2-lite"])
def test_the_model_adds_the_loss_of_every_layer_in_training_only(kind):
    lm = model(config(kind, num_nextn_predict_layers=1 if kind == "v3" else 0))
    ids = tokens(lm.config, 2, 9)
    plain = lm(ids, labels=ids)
    assert plain.aux_loss is None
    lm.train()
    expected = 0.0
    seen = []
    hooks = [r.register_forward_hook(lambda r, _, out: seen.append((r, out))) for r in routers(lm).values()]
    out = lm(ids, labels=ids)
    for hook in hooks:
        hook.remove()
    for router, (logits, _, chosen) in seen:
        # The prediction layer has no next token behind the last one, and nothing to route there.
        valid = torch.arange(9).expand(2, 9) < (8 if router is seen[-1][0] and kind == "v3" else 9)
        expected += float(lm.balance_loss(router, logits, chosen, (2, 9), valid).detach())
    assert len(seen) == (3 if kind == "v3" else 2)
    ahead = 0.0
    if kind == "v3":  # belongs to the loss that trains the prediction layer
        ahead = float(out.mtp_aux_losses.detach())
        assert float(out.mtp_loss.detach()) == pytest.approx(float(plain.mtp_loss) + ahead, rel=20 * EPS32)
    assert ahead > 0 or kind != "v3"
    assert float(out.aux_loss.detach()) + ahead == pytest.approx(expected, rel=20 * EPS32)
    assert float(out.loss.detach()) == pytest.approx(float(plain.loss) + float(out.aux_loss.detach()), rel=20 * EPS32)
    lm.balance_loss = BalanceLoss()
    assert lm(ids, labels=ids).aux_loss is None


def test_padding_changes_no_loss():
    lm = model(config("v3")).train()
    ids = tokens(lm.config, 2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    losses = []
    for fill in (0, 7):
        padded = ids.clone()
        padded[1, 6:] = fill
        losses.append(float(lm(padded, mask, labels=padded).aux_loss))
    assert losses[0] == losses[1]


def test_wrong_factors():
    with pytest.raises(ValueError, match=r"unbiased.*got 'other'"):
        BalanceLoss(counts="other")
    with pytest.raises(ValueError, match="expected device >= 0, got -1"):
        BalanceLoss(device=-1)
    router = _router()
    with pytest.raises(ValueError, match="devices that divide 8 experts, got 3"):
        BalanceLoss(device=1.0, devices=3)(router, *_routed(router))


# ---------------------------------------------------------------- biases


def _biases(lm):
    return {name: router.e_score_correction_bias.clone() for name, router in routers(lm).items()}


@pytest.mark.parametrize("form", ["sign", "centred"])
def test_the_update_is_the_papers(form):
    """TRAPS D1; V3 report section 2.1.2, Moonlight's form beside it."""
    router = _router(experts=4, top_k=1, groups=1, kept=1)
    router.load = torch.tensor([9, 3, 0, 0])  # the mean is 3: the second expert has exactly its share
    before = router.e_score_correction_bias.clone()
    LoadBalancer(router, rate=0.5, form=form).step()
    sign = torch.tensor([-1.0, 0.0, 1.0, 1.0])
    expected = before + 0.5 * (sign - sign.mean() if form == "centred" else sign)
    assert torch.equal(router.e_score_correction_bias, expected)
    assert router.load is None


def test_counts_are_those_of_the_tokens_really_routed():
    """TRAPS D2, D3, F9: integers, no padding, not in evaluation, the prediction layers' too."""
    lm = model(config("v3", num_nextn_predict_layers=1))
    ids = tokens(lm.config, 2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    lm(ids, mask, labels=ids)
    assert expert_loads(lm) == {}
    lm.train()
    lm(ids, mask, labels=ids)
    loads = expert_loads(lm)
    assert len(loads) == 3 and all(load.dtype == torch.int64 for load in loads.values())
    # The prediction layer has one token less in each row: the last one's next is unknown.
    assert [int(load.sum()) for load in loads.values()] == [14 * 3, 14 * 3, 12 * 3]


def test_recomputation_counts_nothing_twice_and_gives_the_same_gradients():
    lm = model(config("v3", num_nextn_predict_layers=1)).train()
    ids = tokens(lm.config, 2, 9)
    results = []
    for recompute in (False, True):
        lm.gradient_checkpointing_enable(recompute)
        lm.zero_grad()
        out = lm(ids, labels=ids)
        (out.loss + out.mtp_loss).backward()
        grads = {name: parameter.grad.clone() for name, parameter in lm.named_parameters()}
        results.append((LoadBalancer(lm, rate=0).step().loads, grads))
    assert results[0][0].keys() == results[1][0].keys()
    assert all(torch.equal(results[0][0][name], results[1][0][name]) for name in results[0][0])
    for name, grad in results[0][1].items():
        assert torch.equal(grad, results[1][1][name]), name


def test_one_update_per_step_whatever_the_accumulation():
    ids = tokens(config("v3"), 4, 9)
    biases = []
    for pieces in (1, 4):
        lm = model(config("v3")).train()
        balancer = LoadBalancer(lm)
        for piece in ids.chunk(pieces):
            lm(piece, labels=piece).loss.backward()
        balancer.step()
        biases.append(_biases(lm))
    assert all(torch.equal(biases[0][name], biases[1][name]) for name in biases[0])


def test_biases_stay_float32_and_survive_saving_and_resuming(tmp_path):
    """TRAPS C2, D4: nothing is recentred, rounded or lost."""
    lm = model(config("v3"), bias_mean=5.0).to(torch.bfloat16).train()
    ids = tokens(lm.config, 2, 9)
    schedule = [1e-3, 1e-3, 0.0, 1e-3]
    balancer = LoadBalancer(lm, rate=schedule.__getitem__)
    for _ in range(2):
        lm(ids, labels=ids)
        report = balancer.step()
    assert report.rate == 1e-3
    torch.save((lm.state_dict(), balancer.state_dict()), tmp_path / "state")
    other = model(config("v3"), seed=3).to(torch.bfloat16).train()
    weights, steps = torch.load(tmp_path / "state")
    other.load_state_dict(weights)
    resumed = LoadBalancer(other, rate=schedule.__getitem__)
    resumed.load_state_dict(steps)
    for each, balance in ((lm, balancer), (other, resumed)):
        before = _biases(each)
        each(ids, labels=ids)
        assert balance.step().rate == 0.0  # the third of the schedule
        assert all(torch.equal(bias, before[name]) for name, bias in _biases(each).items())
        each(ids, labels=ids)
        balance.step()
    for (name, bias), again in zip(_biases(lm).items(), _biases(other).values(), strict=True):
        assert bias.dtype == torch.float32 and torch.equal(bias, again), name
        assert bias.mean() > 4


def test_a_step_without_tokens_changes_nothing():
    lm = model(config("v3")).train()
    before = _biases(lm)
    with pytest.warns(UserWarning, match="no router has counted a token"):
        assert LoadBalancer(lm).step().loads == {}
    assert all(torch.equal(bias, before[name]) for name, bias in _biases(lm).items())


def test_a_model_without_routers_or_an_unknown_form():
    with pytest.raises(ValueError, match="model with routers, got Linear"):
        LoadBalancer(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="'sign' or 'centred', got 'other'"):
        LoadBalancer(_router(), form="other")


def _count_on(rank, path, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    router = Router(16, 4, 1)
    # Alone, each rank would push another expert down; the second rank saw no token of this layer's.
    router.load = torch.tensor([5, 1, 1, 1]) if rank == 0 else None
    other = Router(16, 4, 1)
    other.load = torch.tensor([3, 3, 0, 0]) if rank == 0 else torch.tensor([0, 3, 3, 0])
    LoadBalancer(torch.nn.ModuleList([router, other]), rate=1.0).step()
    results[rank] = [r.e_score_correction_bias.tolist() for r in (router, other)]
    torch.distributed.destroy_process_group()


def test_counts_are_summed_over_ranks(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_count_on, (tmp_path / "rendezvous", results), nprocs=2)
        expected = [[-1.0, 1.0, 1.0, 1.0], [0.0, -1.0, 0.0, 1.0]]
        assert results[0] == results[1] == expected


def test_reports():
    report = ExpertLoad({"even": torch.tensor([4, 4]), "one": torch.tensor([8, 0])})
    assert report.max_violation == {"even": 0.0, "one": 1.0}
    assert report.entropy["even"] == pytest.approx(1.0) and report.entropy["one"] == pytest.approx(0.0)
    assert "one   max violation  1.000" in str(report)
    history = LoadHistory()
    history.add(report)
    assert history.max_violation("one") == [1.0]


def test_the_heat_map_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    history = LoadHistory()
    with pytest.raises(ValueError, match="at least one step"):
        history.heat_map(tmp_path / "empty.png")
    for step in range(1, 4):
        history.add(ExpertLoad({"a": torch.tensor([step, 4]), "b": torch.tensor([1, 0])}))
    path = history.heat_map(tmp_path / "use.png", "Use")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


@pytest.mark.parametrize("experts, devices, redundant", [(8, 4, 0), (8, 4, 4), (256, 32, 32), (6, 3, 3), (4, 4, 12)])
def test_a_placement_holds_every_expert_and_shares_the_work(experts, devices, redundant):
    loads = torch.rand(experts, generator=torch.Generator().manual_seed(experts)) ** 4 * 1000
    plan = plan_placement(loads, devices, redundant)
    held = [expert for device in plan.devices for expert in device]
    assert len(held) == experts + redundant and set(held) == set(range(experts))
    assert {len(device) for device in plan.devices} == {(experts + redundant) // devices}
    for device, load in zip(plan.devices, plan.loads, strict=True):
        assert load == pytest.approx(sum(float(loads[e]) / held.count(e) for e in device))
    together = loads.view(devices, -1).sum(-1)
    assert plan.imbalance_before == pytest.approx(float(together.max() / together.mean()))
    assert plan.imbalance <= plan.imbalance_before and plan.imbalance >= 1 - 1e-6
    if redundant >= experts // 8 > 0 and experts == 256:
        assert plan.imbalance < 1.05 < plan.imbalance_before
    assert f"{plan.imbalance:.3f} after" in str(plan)


def test_copies_go_to_the_busiest_expert():
    plan = plan_placement([90.0, 10.0, 10.0, 10.0], 2, redundant=2)
    assert sum(device.count(0) for device in plan.devices) == 2 and plan.imbalance < plan.imbalance_before
    with pytest.raises(ValueError, match="devices that divide"):
        plan_placement([1.0, 2.0, 3.0], 2)


def test_skewed_tokens_are_balanced_by_biases_and_not_without():
    """Tokens with a common direction crowd a few experts; biases spread them, and nothing else does.

    Loads of the last 100 steps together: 12,800 choices an expert, so chance alone makes about 2 %.
    """
    violations = {}
    for rate in (0.0, 2e-3):
        router = Router(32, 16, 2, n_group=1).train()
        torch.nn.init.normal_(router.weight, std=0.2, generator=torch.Generator().manual_seed(1))
        direction = torch.randn(32, generator=torch.Generator().manual_seed(2))
        balancer, history = LoadBalancer(router, rate), LoadHistory()
        draw = torch.Generator().manual_seed(3)
        for _ in range(400):
            ids = router(torch.randn(1024, 32, generator=draw) + direction)[2]
            router.load = torch.bincount(ids.flatten(), minlength=16)
            history.add(balancer.step())
        violations[rate] = float(torch.stack(history.shares[""][-100:]).mean(0).max() - 1)
    assert violations[0.0] > 1.0
    assert violations[2e-3] < 0.1


# ---------------------------------------------------------------- dropping


@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("devices", [1, 4])
def test_each_device_keeps_its_weightiest_choices(factor, devices):
    router = _router()
    _, weights, ids = router(torch.randn(5, 8, 16))
    valid = torch.ones(5, 8, dtype=torch.bool)
    valid[0, 3:] = False
    got = TokenDropping(factor, devices, spared=0.0).drop(ids, weights, 8, (5, 8), valid)
    capacity = int(factor * int(valid.sum()) * 2 / devices)
    real = valid.flatten()[:, None].expand_as(ids)
    for device in range(devices):
        here = [
            (-float(weights[t, k]), t, k)
            for t in range(40)
            for k in range(2)
            if real[t, k] and int(ids[t, k]) * devices // 8 == device
        ]
        kept = {(t, k) for _, t, k in sorted(here)[:capacity]}
        for _, t, k in here:
            assert int(got[t, k]) == (int(ids[t, k]) if (t, k) in kept else 8)
    assert torch.equal(got[~real], ids[~real])


def test_spared_sequences_keep_everything():
    router = _router()
    _, weights, ids = router(torch.randn(5, 8, 16))
    assert torch.equal(TokenDropping(0.01, 4, spared=1.0).drop(ids, weights, 8, (5, 8)), ids)


def test_dropped_choices_contribute_nothing_and_only_in_training():
    lm = model(config("v3")).train()
    ids = tokens(lm.config, 2, 9)
    lm.capacity = TokenDropping(factor=1e-9, spared=0.0)
    starved = lm(ids).logits
    for layer in lm.model.layers[1:]:
        torch.nn.init.zeros_(layer.mlp.experts.down_proj)
    lm.capacity = None
    assert error(starved, lm(ids).logits) < 20 * EPS32
    lm = model(config("v3"))
    whole = lm(ids).logits
    lm.capacity = TokenDropping(factor=1e-9, spared=0.0)
    assert torch.equal(lm(ids).logits, whole)
    with pytest.raises(ValueError, match="factor > 0"):
        TokenDropping(factor=0)


@pytest.mark.parametrize("part", ["sequence", "expert", "device", "communication"])
def test_a_row_of_padding_is_no_sequence(part):
    """A batch is filled up with such rows; a mean over rows would shrink with their number."""
    loss = BalanceLoss(**{part: 1.0}, devices=4)
    router = _router("group_limited_greedy")
    logits, ids, _ = _routed(router, (2, 5))
    expected = loss(router, logits, ids, (2, 5))
    filled = torch.cat((logits, torch.randn(10, 8))), torch.cat((ids, ids))
    valid = torch.arange(4)[:, None].expand(4, 5) < 2
    assert expected > 0.5
    torch.testing.assert_close(loss(router, *filled, (4, 5), valid), expected)
