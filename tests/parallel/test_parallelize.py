"""Models cut by a layout: losses and gradients of one process, for every axis and their combinations."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import deepseek_arch as da
from deepseek_arch.attention.key_selection import KeySelection
from deepseek_arch.layout.parallel_layout import LayoutError, ParallelLayout
from support import small_models
from support.cut_models import SIZES, gradients
from support.ranks import RankError, run_ranks
from support.small_models import error

SAME = {torch.float32: 2e-6, torch.float64: 1e-12}  # sums in another order


def model_of(kind="v3", dtype=torch.float32, **changes):
    return small_models.model(small_models.config(kind, **(SIZES | changes))).to(dtype).train()


def rows_of(config, rank, rows):
    """Rows of data-parallel rank `rank`."""
    first = sum(rows[:rank])
    return small_models.tokens(config, sum(rows), 9)[first : first + rows[rank]]


def loss_of(out):
    return out.loss + 0.3 * out.mtp_loss if out.mtp_loss is not None else out.loss


def expected_of(model, rows):
    losses = []
    for rank in range(len(rows)):
        ids = rows_of(model.config, rank, rows)
        loss = loss_of(model(ids, labels=ids, return_logits=False))
        (loss / len(rows)).backward()
        losses.append(float(loss.detach()))
    return losses, gradients(model)


def trained(rank, axes, build, rows, recompute=False):
    model = build()
    model.gradient_checkpointing_enable(recompute)
    model = da.parallelize(model, ParallelLayout(**axes))
    mine = dist.get_rank(model.meshes.data)
    ids = rows_of(model.config, mine, rows)
    out = model(ids, labels=ids, return_logits=False)
    loss_of(out).backward()
    held = {name: p.to_local().numel() if hasattr(p, "to_local") else p.numel() for name, p in model.named_parameters()}
    return mine, float(loss_of(out).detach()), gradients(model), held


def check(axes, world, rows, build, dtype=torch.float32, recompute=False):
    """Trains one step on ranks and in one process; returns each rank's number of elements by parameter."""
    losses, expected = expected_of(build(), rows)
    shares = []
    for mine, loss, grads, held in run_ranks(trained, world, axes, build, rows, recompute):
        assert loss == pytest.approx(losses[mine], rel=SAME[torch.float32])  # float32 in either case
        assert grads.keys() == expected.keys()
        worst = max(expected, key=lambda name: error(grads[name], expected[name]))
        assert error(grads[worst], expected[worst]) < SAME[dtype], worst
        shares.append(held)
    return shares


LAYOUTS = [
    ({"tp": 2}, 2, (2,)),
    ({"tp": 4}, 4, (2,)),
    ({"dp_shard": 2}, 2, (2, 2)),
    ({"dp_shard": 2, "ep": 2}, 2, (2, 2)),
    ({"dp_shard": 4, "ep": 4}, 4, (1, 3, 2, 2)),
    ({"dp_shard": 4, "ep": 2}, 4, (2, 1, 1, 2)),
    ({"tp": 2, "ep": 2}, 2, (2,)),
    ({"dp_shard": 2, "tp": 2, "ep": 4}, 4, (2, 1)),
    ({"dp_shard": 2, "tp": 2, "ep": 2}, 4, (1, 2)),
    ({"dp_replicate": 2, "dp_shard": 2, "ep": 2}, 4, (1, 1, 2, 1)),
]


@pytest.mark.parametrize(("axes", "world", "rows"), LAYOUTS, ids=str)
def test_gradients_are_those_of_one_process(axes, world, rows):
    check(axes, world, rows, model_of)


@pytest.mark.parametrize(("axes", "world", "rows"), [LAYOUTS[0], LAYOUTS[3], LAYOUTS[7]], ids=str)
def test_in_float64_to_its_rounding(axes, world, rows):
    check(axes, world, rows, lambda: model_of(dtype=torch.float64), torch.float64)


# ---------------------------------------------------------------- other models and settings


@pytest.mark.parametrize(("axes", "world", "rows"), [LAYOUTS[0], LAYOUTS[3], LAYOUTS[8]], ids=str)
def test_a_softmax_router_without_query_latent_and_a_tied_head(axes, world, rows):
    tied = {"tie_word_embeddings": True, "num_nextn_predict_layers": 0}
    check(axes, world, rows, lambda: model_of("v2-lite", **tied))


@pytest.mark.parametrize(("axes", "world", "rows"), [LAYOUTS[3], LAYOUTS[6]], ids=str)
def test_recomputed_layers_repeat_their_collectives(axes, world, rows):
    check(axes, world, rows, model_of, recompute=True)


def biased():
    torch.manual_seed(0)
    model = da.DeepseekLM(small_models.config("v3", **SIZES, attention_bias=True), dtype=torch.float64).train()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias"):
            parameter.data.normal_(generator=generator)
    return model


@pytest.mark.parametrize(("axes", "world", "rows"), [LAYOUTS[0], LAYOUTS[8]], ids=str)
def test_biases_of_attention_are_added_once(axes, world, rows):
    check(axes, world, rows, biased, torch.float64)


@pytest.mark.parametrize("kind", ["v32", "glm-5"])
@pytest.mark.parametrize(("axes", "world", "rows"), [LAYOUTS[0], LAYOUTS[8]], ids=str)
def test_sparse_attention_by_heads(kind, axes, world, rows):
    check(axes, world, rows, lambda: model_of(kind, torch.float64), torch.float64)


def selected(rank):
    model = da.parallelize(model_of("v32"), ParallelLayout(tp=2))
    ids, selection = rows_of(model.config, 0, (2,)), KeySelection(record=True)
    model(ids, labels=ids, selection=selection)
    tokens = da.generate(model.eval(), ids, max_new_tokens=8, eos_token_id=[])
    return selection.ids, tokens


def test_ranks_select_the_same_keys():
    model = model_of("v32")
    ids, selection = rows_of(model.config, 0, (2,)), KeySelection(record=True)
    model(ids, labels=ids, selection=selection)
    tokens = da.generate(model.eval(), ids, max_new_tokens=8, eos_token_id=[])
    for found, text in run_ranks(selected, 2):
        assert found.keys() == selection.ids.keys()
        assert all(torch.equal(found[layer].sort(-1).values, selection.ids[layer].sort(-1).values) for layer in found)
        assert torch.equal(text, tokens)


def indexers_trained(model, ids, stage):
    """Loss of each layer, recall, and gradients: of indexers alone in the warm-up, else of all."""
    selection = KeySelection(stage=stage)
    out = model(ids, labels=ids, return_logits=False, selection=selection)
    loss = out.indexer_loss if stage == "dense" else out.indexer_loss + loss_of(out)
    loss.backward()
    losses = {layer: float(loss.detach()) for layer, loss in selection.losses.items()}
    return losses, {layer: float(value) for layer, value in selection.recall.items()}, gradients(model)


def indexers_on_ranks(rank, axes, stage, recompute):
    model = model_of("v32")
    model.gradient_checkpointing_enable(recompute)
    model = da.parallelize(model, ParallelLayout(**axes))
    return indexers_trained(model, rows_of(model.config, 0, (2,)), stage)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("stage", ["dense", "sparse"])
@pytest.mark.parametrize(("axes", "world"), [({"tp": 2}, 2), ({"tp": 2, "ep": 2}, 2), ({"tp": 4}, 4)], ids=str)
def test_indexers_learn_from_the_heads_of_all_ranks(axes, world, stage, recompute):
    model = model_of("v32")
    losses, recall, expected = indexers_trained(model, rows_of(model.config, 0, (2,)), stage)
    assert any(".indexer." in name for name in expected) and len(losses) == 4
    for own, found, grads in run_ranks(indexers_on_ranks, world, axes, stage, recompute):
        assert own == pytest.approx(losses, rel=1e-5) and found == pytest.approx(recall, rel=1e-5)
        assert grads.keys() == expected.keys()
        for name, grad in expected.items():
            assert error(grads[name], grad) < 10 * SAME[torch.float32], name


def crowded(experts, **changes):
    """A model all of whose tokens choose these experts."""
    model = model_of(**changes)
    for router in da.LoadBalancer(model).routers.values():
        router.e_score_correction_bias[experts] = 100.0
    return model


@pytest.mark.parametrize("experts", [[0, 1, 2], [5, 6, 7]])
@pytest.mark.parametrize(("axes", "world", "rows"), [LAYOUTS[3], LAYOUTS[7]], ids=str)
def test_ranks_that_serve_no_token_take_part(axes, world, rows, experts):
    """TRAPS S16."""
    check(axes, world, rows, lambda: crowded(experts, dtype=torch.float64), torch.float64)


def one_expert():
    return crowded([4], num_experts_per_tok=1, n_group=1, topk_group=1, norm_topk_prob=False, dtype=torch.float64)


@pytest.mark.parametrize(("axes", "world", "rows"), [LAYOUTS[4], LAYOUTS[6]], ids=str)
def test_all_tokens_to_one_expert(axes, world, rows):
    check(axes, world, rows, one_expert, torch.float64)


def in_fp8():
    model = da.keep_fp8(model_of())
    model.load_state_dict(model.state_dict())
    return model


@pytest.mark.parametrize(("axes", "world", "rows"), [LAYOUTS[3], LAYOUTS[5]], ids=str)
def test_weights_that_stay_in_fp8(axes, world, rows):
    """Codes and scales are cut alike; what is trained is the rest."""
    shares = check(axes, world, rows, in_fp8)
    for held in shares:
        assert held["model.layers.1.mlp.experts.gate_up_proj"] * axes["ep"] * (world // axes["ep"]) == 8 * 40 * 32


def few_experts():
    return model_of(n_routed_experts=2, n_group=1, topk_group=1, num_experts_per_tok=2)


def test_fewer_experts_than_shards_are_cut_inside():
    """TRAPS S11: along their first dimension every rank would hold a whole expert, half of them padding."""
    whole = {name: p.numel() for name, p in few_experts().named_parameters()}
    for held in check({"dp_shard": 4}, 4, (1, 1, 2, 1), few_experts):
        assert all(held[name] * 4 == whole[name] for name in whole if ".experts." in name)


# ---------------------------------------------------------------- shares, bytes, refusals


def test_each_rank_holds_its_share():
    whole = {name: p.numel() for name, p in model_of().named_parameters()}
    experts = [name for name in whole if ".experts." in name]
    assert len(experts) == 6
    for axes, world, rows in (LAYOUTS[0], LAYOUTS[3], LAYOUTS[4]):
        shares = [held for *_, held in run_ranks(trained, world, axes, model_of, rows)]
        for name in whole:
            held = [share[name] for share in shares]
            if "tp" not in axes or name in experts:
                assert sum(held) == whole[name]
            if name in experts:
                assert held == [whole[name] // world] * world
        if "tp" in axes:
            cut = ("q_b_proj", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")
            for name in whole:
                parts = 2 if name.split(".")[-2] in cut or name in experts else 1
                assert [share[name] for share in shares] == [whole[name] // parts] * 2, name


def refused(rank, axes, changes):
    model = da.DeepseekLM(small_models.config("v3", **(SIZES | changes)))
    before = {name: (id(p), type(p)) for name, p in model.named_parameters()}
    with pytest.raises(LayoutError) as caught:
        da.parallelize(model, ParallelLayout(**axes))
    assert before == {name: (id(p), type(p)) for name, p in model.named_parameters()}
    return str(caught.value)


def parameters_after_passes(rank, axes):
    model = da.parallelize(model_of(), ParallelLayout(**axes))
    ids = rows_of(model.config, 0, (2,))
    before, changed = dict(model.named_parameters()), []
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            model(ids, labels=ids, return_logits=False)
        changed += [name for name, parameter in model.named_parameters() if parameter is not before[name]]
    return changed


@pytest.mark.parametrize("axes", [{"tp": 2}, {"dp_shard": 2, "ep": 2}], ids=str)
def test_a_forward_pass_leaves_nothing_gathered(axes):
    """An optimizer that is made then gets the shards; experts of all layers are never whole at a time."""
    assert run_ranks(parameters_after_passes, 2, axes) == [[], []]


@pytest.mark.parametrize(
    ("axes", "changes", "message"),
    [
        ({"tp": 2}, {"num_attention_heads": 3}, "expected tp = 2 to divide num_attention_heads = 3"),
        ({"dp_shard": 2, "ep": 2}, {"n_routed_experts": 9, "n_group": 1, "topk_group": 1}, "n_routed_experts = 9"),
        ({"tp": 4}, {}, "4 to divide 2 devices"),
        ({"pp": 2}, {}, "expected pp = 1 (pipeline cuts into stages), got 2"),
    ],
    ids=str,
)
def test_a_layout_that_does_not_fit_changes_nothing(axes, changes, message):
    first, second = run_ranks(refused, 2, axes, changes)
    assert first == second and message in first


class Adapter(torch.nn.Module):
    """A layer around another, as PEFT makes them."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    def forward(self, x):
        return self.base_layer(x)


def with_an_adapter(rank):
    model = model_of()
    model.model.layers[0].mlp.down_proj = Adapter(model.model.layers[0].mlp.down_proj)
    with pytest.raises(LayoutError) as caught:
        da.parallelize(model, ParallelLayout(tp=2))
    assert type(model.model.layers[0].mlp) is da.MLP
    return str(caught.value)


def test_adapters_are_refused_where_weights_are_cut():
    """Uncut beside cut layers, their whole outputs would be added up over ranks."""
    for message in run_ranks(with_an_adapter, 2):
        assert "expected tp = 1 with model.layers.0.mlp.down_proj" in message and "Adapter" in message


def dropping(rank, spared):
    torch.manual_seed(rank)
    model = da.parallelize(model_of(), ParallelLayout(tp=2))
    model.capacity = da.TokenDropping(factor=0.5, devices=2, spared=spared)
    ids = rows_of(model.config, 0, (8,))
    model(ids, labels=ids)
    return [load.tolist() for load in da.LoadBalancer(model, 0.25).step().loads.values()]


def test_ranks_that_share_tokens_drop_the_same_choices():
    """TRAPS S5: what each draws for itself would part their loads, and with them the biases of their routers."""
    first, second = run_ranks(dropping, 2, 0.0)
    assert first == second
    with pytest.raises(RankError) as caught:
        run_ranks(dropping, 2, 0.5)
    assert str(caught.value).count("ValueError: expected token dropping with spared 0 or 1 where tp > 1") == 2


def converted(rank):
    model = da.parallelize(model_of(), ParallelLayout(tp=2))
    messages = []
    for convert in (da.keep_fp8, da.dequantize):
        with pytest.raises(ValueError) as caught:
            convert(model)
        messages.append(str(caught.value))
    assert not any(p.dtype == torch.float8_e4m3fn for p in model.parameters())
    return messages


def test_a_model_that_is_cut_is_not_converted():
    for messages in run_ranks(converted, 2):
        assert messages == ["expected a model that is not cut over ranks, got one that parallelize has cut"] * 2


def test_it_needs_ranks_and_a_plain_model():
    with pytest.raises(ValueError, match="expected a running process group"):
        da.parallelize(model_of(), ParallelLayout(tp=2))
    with pytest.raises(RankError, match="expected a DeepseekLM that is not cut yet, got"):
        run_ranks(lambda rank: [da.parallelize(model, ParallelLayout(tp=2)) for model in [model_of()] * 2], 2)
