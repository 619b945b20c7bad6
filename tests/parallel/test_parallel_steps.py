"""Steps on a layout: bytes, balancing, global losses, clipping, the optimizer, decoding."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import deepseek_arch as da
from deepseek_arch.layout.parallel_layout import ParallelLayout
from deepseek_arch.parallel import vocabulary
from deepseek_arch.parallel.collectives import sent_bytes
from deepseek_arch.planning.routing import count_rows
from deepseek_arch.planning.setup import TrainingSetup
from deepseek_arch.planning.traffic import end_traffic, expert_row, ring_bytes, tensor_parallel_traffic, total_by
from support import small_models
from support.ranks import run_ranks
from support.small_models import error

CONFIG = small_models.config("v3", num_attention_heads=4, vocab_size=64, num_nextn_predict_layers=1)
IDS = small_models.tokens(CONFIG, 4, 9)
SAME = 2e-6
FLOAT32 = 4


def cut(**axes):
    model = small_models.model(CONFIG).train()
    return da.parallelize(model, ParallelLayout(**axes))


def rows_of(model):
    ranks, rank = dist.get_world_size(model.meshes.data), dist.get_rank(model.meshes.data)
    return IDS.chunk(ranks)[rank]


def step(model, ids):
    out = model(ids, labels=ids, return_logits=False)
    return out.loss + 0.3 * out.mtp_loss


# ---------------------------------------------------------------- bytes


def counted(rank, axes):
    model = cut(**axes)
    chosen = []
    for module in model.modules():
        if isinstance(module, da.Router):
            module.register_forward_hook(lambda _, args, out: chosen.append(out[2].tolist()))
    sent_bytes.clear()
    step(model, rows_of(model)).backward()
    return dict(sent_bytes), chosen


def test_expert_parallel_bytes_are_those_of_the_plan():
    results = run_ranks(counted, 2, {"dp_shard": 2, "ep": 2})
    row = expert_row(CONFIG.hidden_size, CONFIG.num_experts_per_tok, FLOAT32)
    between = []
    for _, layers in results:
        made = [count_rows(choices, CONFIG.n_routed_experts, 2, False) for choices in layers]
        between.append([sum(column) for column in zip(*made, strict=True)])
    for me, (sent, _) in enumerate(results):
        out, come = between[me][1 - me], between[1 - me][me]
        assert sent == {
            "expert dispatch": out * row.dispatch,
            "expert combine": come * row.combine,
            "expert combine backward": out * row.combine_backward,
            "expert dispatch backward": come * row.dispatch_backward,
        }


def test_tensor_parallel_bytes_are_those_of_the_plan():
    """Dense layers and experts, embedding, heads and losses; nothing is sent that holds logits."""
    layout = ParallelLayout(dp_shard=1, tp=2)
    tokens, depth = IDS.numel(), CONFIG.num_nextn_predict_layers
    layers = list(tensor_parallel_traffic(CONFIG, layout, tokens, 8, FLOAT32)) * (CONFIG.num_hidden_layers + depth)
    setup = TrainingSetup(sequence=tokens, micro_batch=1)
    # Those of the ends are planned in 16 bits but for the losses, which are in 32.
    ends = dict.fromkeys(("forward", "backward"), 0.0)
    for transfer in end_traffic(CONFIG, layout, setup, 8, True, True):
        if transfer.purpose == "tensor parallel":
            is_loss = transfer.phase == "forward" and transfer.nbytes == ring_bytes(24 * tokens * (1 + depth), 2)
            ends[transfer.phase] += transfer.nbytes * (1 if is_loss else 2)
    expected = total_by(layers, "phase")
    for sent, _ in run_ranks(counted, 2, {"tp": 2}):
        assert "logits" not in sent
        assert sent["tensor parallel"] == expected["forward",] + ends["forward"]
        assert sent["tensor parallel backward"] == expected["backward",] + ends["backward"]


# ---------------------------------------------------------------- steps


def test_an_infinite_limit_measures_a_norm_that_is_infinite():
    model = torch.nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[torch.inf, 1.0]]), torch.ones(1)
    assert da.clip_grad_norm(model, float("inf")) == torch.inf
    assert model.weight.grad.tolist() == [[torch.inf, 1.0]] and model.bias.grad.tolist() == [1.0]


def trained(rank, axes):
    model = cut(**axes)
    balancer, optimizer = da.LoadBalancer(model, 0.25), torch.optim.AdamW(model.parameters(), lr=1e-2)
    norms = []
    for _ in range(2):
        out = model(rows_of(model), labels=uneven(rows_of(model)), return_logits=False)
        da.global_loss(out, 0.3, model.meshes.data).backward()
        norms.append(float(da.clip_grad_norm(model, 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        loads = [load.tolist() for load in balancer.step().loads.values()]
    state = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in model.state_dict().items()}
    return norms, loads, state


def uneven(ids):
    """The last row of all has no target."""
    labels = ids.clone()
    labels[(ids == IDS[-1]).all(-1)] = -100
    return labels


AXES = [({"tp": 2}, 2), ({"dp_shard": 2, "ep": 2}, 2), ({"dp_shard": 2, "tp": 2, "ep": 2}, 4)]


@pytest.mark.parametrize(("axes", "world"), AXES, ids=str)
def test_two_steps_are_those_of_one_process(axes, world):
    """Uneven targets, clipping over meshes, AdamW, balancing. Two steps of AdamW enlarge what rounding leaves."""
    model = small_models.model(CONFIG).train()
    balancer, optimizer = da.LoadBalancer(model, 0.25), torch.optim.AdamW(model.parameters(), lr=1e-2)
    expected = []
    for _ in range(2):
        out = model(IDS, labels=uneven(IDS), return_logits=False)
        (out.loss + 0.3 * out.mtp_loss).backward()
        expected.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        totals = [load.tolist() for load in balancer.step().loads.values()]
    for norms, loads, state in run_ranks(trained, world, axes):
        assert norms == pytest.approx(expected, rel=1e-5)
        assert loads == totals
        for name, tensor in model.state_dict().items():
            assert error(state[name], tensor) < 1e-3, name


def head_gradient(rank, rows, weight, labels):
    vocabulary._ROWS = 16
    rows, weight = rows.bfloat16(), weight.bfloat16().chunk(2)[rank].clone().requires_grad_()
    each, _ = vocabulary._CrossEntropy.apply(rows, weight, labels, dist.group.WORLD)
    each.mean().backward()
    return weight.grad


def test_chunks_of_rows_add_up_in_float32():
    """A bfloat16 head over 256 chunks: each part and the sum are rounded once, 2^-9 of the largest."""
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(4096, 32, generator=generator), torch.randn(64, 32, generator=generator)
    labels = torch.randint(64, (4096,), generator=generator)
    exact = weight.bfloat16().double().requires_grad_()
    torch.nn.functional.cross_entropy(rows.bfloat16().double() @ exact.T, labels).backward()
    parts = run_ranks(head_gradient, 2, rows, weight, labels)
    assert error(torch.cat(parts), exact.grad) < 2**-8


# ---------------------------------------------------------------- decoding


def decoded(rank, axes, options):
    torch.manual_seed(rank)
    return da.generate(cut(**axes), IDS[:2] if "tp" in axes else IDS[2 * rank : 2 * rank + 2], **options)


OPTIONS = [{}, {"mtp_depth": 2}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("axes", "world"), AXES[:2], ids=str)
def test_texts_are_those_of_one_process(axes, world, options):
    options = {"max_new_tokens": 12, "eos_token_id": []} | options
    model = small_models.model(CONFIG)
    for rank, tokens in enumerate(run_ranks(decoded, world, axes, options)):
        prompts = IDS[:2] if "tp" in axes else IDS[2 * rank : 2 * rank + 2]
        assert torch.equal(tokens, da.generate(model, prompts, **options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ranks_that_share_logits_draw_the_same_tokens(options):
    options = {"max_new_tokens": 12, "eos_token_id": [], "temperature": 1.0} | options
    first, second = run_ranks(decoded, 2, {"tp": 2}, options)
    assert torch.equal(first, second)


# ---------------------------------------------------------------- without memory


def shapes_on_meta(rank):
    model = da.parallelize(da.DeepseekLM(CONFIG, device="meta"), ParallelLayout(dp_shard=1, tp=2, ep=2))
    assert all(p.is_meta for p in model.parameters())
    return {name: (tuple(p.shape), tuple(p.to_local().shape)) for name, p in model.named_parameters()}


def test_a_model_on_the_meta_device_is_cut_without_memory():
    whole = {name: tuple(p.shape) for name, p in small_models.model(CONFIG).named_parameters()}
    for shapes in run_ranks(shapes_on_meta, 2):
        assert {name: full for name, (full, _) in shapes.items()} == whole
        assert shapes["model.layers.1.mlp.experts.down_proj"][1] == (4, 32, 20)
        assert shapes["model.layers.1.self_attn.o_proj.weight"][1] == (32, 20)
