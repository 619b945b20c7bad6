"""Context parallelism: losses and gradients of one process that has whole sequences."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import deepseek_arch as da
from deepseek_arch.layout.parallel_layout import LayoutError, ParallelLayout
from deepseek_arch.parallel.collectives import sent_bytes
from deepseek_arch.planning.traffic import context_parallel_traffic, total_by
from support import small_models
from support.cut_models import SIZES, gradients
from support.ranks import run_ranks
from support.small_models import error

SAME = {torch.float32: 2e-6, torch.float64: 1e-12}
TOKENS = 16


def model_of(kind="v3", dtype=torch.float32, **changes):
    return small_models.model(small_models.config(kind, **(SIZES | changes))).to(dtype).train()


def plain(config, rows):
    ids = small_models.tokens(config, rows, TOKENS)
    return {"input_ids": ids, "labels": ids}


def packed(config, rows):
    """Documents that begin on one rank and end on another, padding on both sides, targets on some ranks only."""
    ids = small_models.tokens(config, rows, TOKENS)
    labels, mask = ids.clone(), torch.ones_like(ids)
    positions = torch.arange(TOKENS).expand(rows, -1).clone()
    positions[:, 3:] -= 3
    positions[1:, 10:] -= 7
    labels[0, 5:] = -100
    mask[0, 13:] = 0
    mask[-1, :2] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "position_ids": positions}


def with_a_hole(config, rows):
    """Padding within a document needs a dense mask."""
    given = plain(config, rows)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    given["attention_mask"][:, 5:7] = 0
    return given


def trained(rank, axes, build, batch, rows, recompute):
    model = build()
    model.gradient_checkpointing_enable(recompute)
    model = da.parallelize(model, ParallelLayout(**axes))
    dp, cp = model.meshes.layout.dp, model.meshes.layout.cp
    mine = dist.get_rank(model.meshes.data) // cp
    given = {name: value.chunk(dp)[mine] for name, value in batch(model.config, rows).items()}
    out = model(**given, return_logits=False)
    da.global_loss(out, weight_of(model), model.meshes.data).backward()
    return mine, losses_of(out), gradients(model), loads_of(model), float(da.clip_grad_norm(model, float("inf")))


def weight_of(model):
    return 0.3 if len(model.mtp) else 0.0


def loads_of(model):
    if not any(isinstance(module, da.Router) for module in model.modules()):
        return []
    return [load.tolist() for load in da.LoadBalancer(model, 0.25).step().loads.values()]


def losses_of(out):
    each = (out.loss, out.aux_loss, out.mtp_loss, out.mtp_accuracy)
    return [float(x.detach().sum()) for x in each if x is not None]


def check(axes, world, build=model_of, batch=packed, rows=2, dtype=torch.float32, recompute=False):
    model, dp = build(), axes.get("dp_shard", 1)
    given = batch(model.config, rows)
    out = model(**given, return_logits=False)
    (out.loss + (weight_of(model) * out.mtp_loss if weight_of(model) else 0.0)).backward()
    expected, norm = gradients(model), float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9))
    with torch.no_grad():
        parts = [model(**{k: v.chunk(dp)[i] for k, v in given.items()}, return_logits=False) for i in range(dp)]
    loads = loads_of(model)
    for mine, losses, grads, counted, total in run_ranks(trained, world, axes, build, batch, rows, recompute):
        assert losses == pytest.approx(losses_of(parts[mine]), rel=2e-6)
        assert counted == loads and total == pytest.approx(norm, rel=1e-5)
        assert grads.keys() == expected.keys()
        worst = max(expected, key=lambda name: error(grads[name], expected[name]))
        assert error(grads[worst], expected[worst]) < SAME[dtype], worst


LAYOUTS = [
    ({"cp": 2}, 2, 2),
    ({"cp": 4}, 4, 2),
    ({"cp": 2, "ep": 2}, 2, 2),
    ({"cp": 2, "dp_shard": 2, "ep": 2}, 4, 4),
    ({"cp": 2, "tp": 2, "ep": 4}, 4, 2),
]


@pytest.mark.parametrize("batch", [plain, packed])
@pytest.mark.parametrize(("axes", "world", "rows"), LAYOUTS[:2], ids=str)
def test_gradients_are_those_of_one_process(axes, world, rows, batch):
    check(axes, world, batch=batch, rows=rows)


@pytest.mark.parametrize(("axes", "world", "rows"), LAYOUTS[2:], ids=str)
def test_with_the_other_axes(axes, world, rows):
    check(axes, world, rows=rows)


def test_a_mask_with_a_hole():
    check(*LAYOUTS[0][:2], batch=with_a_hole)


def test_recomputed_layers_repeat_their_collectives():
    check(*LAYOUTS[2][:2], recompute=True)


def test_balance_losses_of_groups_and_a_softmax_router():
    def build():
        model = model_of("v2", num_nextn_predict_layers=0)
        model.balance_loss = da.BalanceLoss(
            sequence=0.1, counts="routed", expert=0.1, device=0.1, communication=0.1, devices=4
        )
        return model

    check(*LAYOUTS[0][:2], build)


def balanced(config, rows):
    """As many targets on either rank, at both distances: a share that float32 has exactly."""
    ids = small_models.tokens(config, rows, 8)
    labels = ids.clone()
    labels[:, [1, 5, 6]] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("axes", [{"cp": 2}, {"cp": 2, "tp": 2}], ids=str)
def test_in_float64_to_its_rounding(axes):
    """Dense layers: routers compute in float32, and their sums over tokens are in another order here."""

    def build():
        return model_of(dtype=torch.float64, first_k_dense_replace=9)

    check(axes, 2 * axes.get("tp", 1), build, balanced, dtype=torch.float64)


# ---------------------------------------------------------------- outputs


def outputs(rank):
    model = da.parallelize(model_of(), ParallelLayout(cp=2))
    given = packed(model.config, 2)
    out = model(**given)
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), given["input_ids"][:, 1:].flatten())
    loss.backward()
    return out.logits.detach(), out.hidden_states.shape, gradients(model), float(out.loss.detach())


def test_logits_of_all_tokens_and_a_loss_of_them():
    model = model_of()
    given = packed(model.config, 2)
    out = model(**given)
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), given["input_ids"][:, 1:].flatten())
    loss.backward()
    expected = gradients(model)
    for logits, shape, grads, value in run_ranks(outputs, 2):
        assert error(logits, out.logits) < 2e-6 and value == pytest.approx(float(out.loss.detach()), rel=2e-6)
        assert tuple(shape) == (2, TOKENS // 2, model.config.hidden_size)
        assert max(error(grads[name], expected[name]) for name in expected) < 2e-6


def counted(rank):
    model = da.parallelize(model_of(), ParallelLayout(cp=2))
    given = plain(model.config, 2)
    sent_bytes.clear()
    out = model(**given, return_logits=False)
    (out.loss + 0.3 * out.mtp_loss).backward()
    return dict(sent_bytes)


def test_bytes_are_those_of_the_plan():
    config = small_models.config("v3", **SIZES)
    layout, layers = ParallelLayout(dp_shard=1, cp=2), config.num_hidden_layers + 1
    planned = list(context_parallel_traffic(config, layout, 2 * TOKENS // 2, 8, 4)) * layers
    expected = total_by(planned, "phase")
    for sent in run_ranks(counted, 2):
        assert sent["context parallel"] == expected["forward",]
        assert sent["context parallel backward"] == expected["backward",]


# ---------------------------------------------------------------- refusals


def refused(rank):
    messages = []
    sparse = da.DeepseekLM(small_models.config("v32"))
    dropping = da.DeepseekLM(small_models.config("v2"))
    dropping.capacity = da.TokenDropping(factor=1.0, devices=2)
    for model in (sparse, dropping):
        with pytest.raises(LayoutError) as caught:
            da.parallelize(model, ParallelLayout(cp=2))
        assert model.meshes is None and type(model) is da.DeepseekLM
        messages.append(str(caught.value))
    model = da.parallelize(model_of(), ParallelLayout(cp=2))
    ids = small_models.tokens(model.config, 1, 10)
    calls = (
        lambda: model(ids),
        lambda: da.generate(model, ids),
        lambda: model(ids[:, :8], record_routing=True),
        lambda: model(),
    )
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        messages.append(str(caught.value))
    return messages


def test_what_does_not_fit_is_refused_alike():
    first, second = run_ranks(refused, 2)
    assert first == second
    wanted = ["cp = 1 for sparse attention", "cp = 1 with token dropping", "multiples of 2 x cp = 4", "no cache where"]
    wanted += ["no recorded routing", "exactly one of input_ids"]
    assert all(part in message for part, message in zip(wanted, first, strict=True)), first


def saved(rank, folder):
    model = da.parallelize(model_of(), ParallelLayout(cp=2, ep=2))
    da.save_sharded(model, folder)


def test_checkpoints_know_nothing_of_it(tmp_path):
    run_ranks(saved, 2, tmp_path / "a")
    model, expected = small_models.model(small_models.config("v3", **SIZES), seed=1), model_of()
    da.load_sharded(model, tmp_path / "a")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())
