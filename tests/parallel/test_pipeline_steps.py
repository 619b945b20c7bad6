"""Steps of a pipeline: optimizer, clipping, balancing, checkpoints, loading, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import deepseek_arch as da
from deepseek_arch.checkpoint.synthetic import write_checkpoint
from deepseek_arch.layout.parallel_layout import LayoutError, ParallelLayout
from deepseek_arch.parallel.collectives import sent_bytes
from deepseek_arch.parallel.stage_plan import plan_stages
from deepseek_arch.planning.schedules import rank_stages
from support import small_models
from support.cut_models import whole
from support.ranks import RankError, run_ranks
from support.small_models import error

CONFIG = small_models.config(
    "v3", num_attention_heads=4, vocab_size=64, num_nextn_predict_layers=1, num_hidden_layers=4
)
IDS = small_models.tokens(CONFIG, 8, 9)
MICRO = 4


def made(axes, options, seed=0):
    model = small_models.model(CONFIG, seed=seed).train()
    pipe = da.pipeline(model, ParallelLayout(**axes), microbatches=MICRO, **options)
    return pipe, torch.optim.AdamW(model.parameters(), lr=1e-2)


def rows_of(model):
    return IDS.chunk(dist.get_world_size(model.meshes.data))[dist.get_rank(model.meshes.data)]


def contents(model, optimizer):
    found = {name: whole(tensor).clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            found[f"{name} {key}"] = whole(value).clone()
    return found


# ---------------------------------------------------------------- steps


def trained(rank, axes, options):
    pipe, optimizer = made(axes, options)
    balancer, norms = da.LoadBalancer(pipe.model, 0.25), []
    for _ in range(2):
        pipe.step(rows_of(pipe.model), rows_of(pipe.model), mtp_weight=0.3)
        norms.append(float(da.clip_grad_norm(pipe.model, 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        balancer.step()
    losses = pipe.evaluate(rows_of(pipe.model), rows_of(pipe.model))
    state = {name: whole(tensor) for name, tensor in pipe.model.state_dict().items()}
    return norms, state, float(losses.loss), float(losses.mtp_loss)


@pytest.mark.parametrize(
    ("axes", "world", "options"),
    [({"pp": 2}, 2, {"schedule": "1F1B"}), ({"pp": 2, "dp_shard": 2, "ep": 2}, 4, {"schedule": "DualPipeV"})],
    ids=str,
)
def test_two_steps_are_those_of_one_process(axes, world, options):
    """Both copies of the embedding stay equal. Two steps of AdamW enlarge what rounding leaves."""
    model = small_models.model(CONFIG).train()
    balancer, optimizer = da.LoadBalancer(model, 0.25), torch.optim.AdamW(model.parameters(), lr=1e-2)
    expected = []
    for _ in range(2):
        out = model(IDS, labels=IDS, return_logits=False)
        (out.loss + 0.3 * out.mtp_loss).backward()
        expected.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        balancer.step()
    with torch.no_grad():
        final = model(IDS, labels=IDS)
    seen = {}
    for norms, state, loss, ahead in run_ranks(trained, world, axes, options):
        assert norms == pytest.approx(expected, rel=1e-5)
        assert [loss, ahead] == pytest.approx([float(final.loss), float(final.mtp_loss)], rel=1e-4)
        for name, tensor in state.items():
            assert error(tensor, model.state_dict()[name]) < 1e-3, name
            assert torch.equal(tensor, seen.setdefault(name, tensor)), name
    assert seen.keys() == model.state_dict().keys()


def counted(rank):
    pipe, _ = made({"pp": 2}, {})
    sent_bytes.clear()
    pipe.step(IDS, IDS, mtp_weight=0.3)
    return dict(sent_bytes)


def test_bytes_of_the_shared_embedding_are_those_of_the_plan():
    """A ring of two sends half of each of an all-reduce's two passes: the gradient once."""
    for sent in run_ranks(counted, 2):
        assert sent == {"shared embedding": 4 * CONFIG.vocab_size * CONFIG.hidden_size}


# ---------------------------------------------------------------- checkpoints


def saved(rank, axes, options, folder):
    pipe, optimizer = made(axes, options)
    pipe.step(rows_of(pipe.model), rows_of(pipe.model), mtp_weight=0.3)
    optimizer.step()
    da.save_sharded(pipe.model, folder, optimizer)
    return contents(pipe.model, optimizer)


def loaded(rank, axes, options, folder, target=None):
    pipe, optimizer = made(axes, options, seed=1)
    da.load_sharded(pipe.model, folder, optimizer)
    if target is not None:
        da.save_sharded(pipe.model, target, optimizer)
    return contents(pipe.model, optimizer)


def test_checkpoints_move_between_pipelines_and_one_process(tmp_path):
    first: dict = {}
    for found in run_ranks(saved, 2, {"pp": 2}, {"schedule": "1F1B"}, tmp_path / "a"):
        first |= found
    assert set(first) >= set(small_models.model(CONFIG).state_dict())
    parts = run_ranks(
        loaded, 4, {"pp": 2, "dp_shard": 2}, {"schedule": "ZBVZeroBubble"}, tmp_path / "a", tmp_path / "b"
    )
    for found in parts:
        assert [name for name in found if not torch.equal(found[name], first[name])] == []
    model = small_models.model(CONFIG, seed=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    da.load_sharded(model, tmp_path / "b", optimizer)
    found = contents(model, optimizer)
    assert found.keys() == first.keys()
    assert [name for name in first if not torch.equal(found[name], first[name])] == []
    da.save_sharded(model, tmp_path / "c", optimizer)
    for found in run_ranks(loaded, 2, {"pp": 2}, {"schedule": "DualPipeV"}, tmp_path / "c"):
        assert [name for name in found if not torch.equal(found[name], first[name])] == []


FILES = CONFIG.replace(quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})


def loaded_stages(rank, folder, axes, options, fp8):
    model = da.load(folder, dtype=torch.float32, fp8=fp8, layout=ParallelLayout(**axes), **options)
    pipe = da.pipeline(model.train(), ParallelLayout(**axes), microbatches=MICRO, **options)
    ids = rows_of(model)
    out = pipe.step(ids, ids, mtp_weight=0.3)
    held = sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in model.parameters())
    return float(out.loss), float(out.mtp_loss), held, model.load_report.bytes_read


@pytest.mark.parametrize("fp8", ["keep", "dequantize"])
@pytest.mark.parametrize(
    ("axes", "world", "options"),
    [({"pp": 2}, 2, {"schedule": "DualPipeV"}), ({"pp": 2, "dp_shard": 2, "ep": 2}, 4, {"schedule": "1F1B"})],
    ids=str,
)
def test_a_rank_reads_its_stages_alone(tmp_path, axes, world, options, fp8):
    write_checkpoint(tmp_path / "files", FILES, "fp8", std=0.1, shards=3)
    model = da.load(tmp_path / "files", dtype=torch.float32, fp8=fp8).train()
    out = model(IDS, labels=IDS, return_logits=False)
    size = sum(p.nbytes for p in model.parameters())
    for loss, ahead, held, read in run_ranks(loaded_stages, world, tmp_path / "files", axes, options, fp8):
        assert loss == pytest.approx(float(out.loss.detach()), rel=1e-5)
        assert ahead == pytest.approx(float(out.mtp_loss.detach()), rel=1e-5)
        assert held < 0.75 * size and read < 0.75 * model.load_report.bytes_read


# ---------------------------------------------------------------- stages


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2", "deepseek-v2-lite", "deepseek-v3.2"])
@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "DualPipeV"])
def test_stages_of_published_models_cost_alike(name, schedule):
    config = da.DeepseekConfig.from_pretrained(name)
    plan = plan_stages(config, ParallelLayout(pp=4), schedule)
    assert [layer for stage in plan.layers for layer in stage] == list(range(config.num_hidden_layers))
    sizes = [len(stage) for stage in plan.layers]
    assert max(sizes[1:-1]) - min(sizes[1:-1]) <= 1 and sizes[-1] <= min(sizes[:-1])
    planned = {"1F1B": "1f1b", "Interleaved1F1B": "interleaved", "DualPipeV": "dualpipev"}[schedule]
    for rank in range(4):
        assert plan.held(rank) == rank_stages(planned, 4, rank, 2)


# ---------------------------------------------------------------- refusals


def refused(rank, axes, options, changes):
    model = da.DeepseekLM(CONFIG.replace(**changes))
    before = {name: (id(p), type(p)) for name, p in model.named_parameters()}
    with pytest.raises(LayoutError) as caught:
        da.pipeline(model, ParallelLayout(**axes), **options)
    assert before == {name: (id(p), type(p)) for name, p in model.named_parameters()}
    assert type(model) is da.DeepseekLM
    return str(caught.value)


SHARED = {"index_n_heads": 4, "index_head_dim": 16, "index_topk": 6, "model_type": "glm_moe_dsa", "n_group": 1}
SHARED |= {"topk_group": 1, "indexer_rope_interleave": True, "indexer_types": ("full", "full", "shared", "full")}


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"schedule": "1F1B", "microbatches": 1}, {}, "expected at least 2 microbatches, one a stage, for 1F1B, got 1"),
        ({"schedule": "DualPipeV", "microbatches": 3}, {}, "expected at least 4 microbatches"),
        ({"schedule": "Interleaved1F1B", "microbatches": 5}, {}, "multiples of their 2 rounds"),
        ({"schedule": "GPipe", "microbatches": 0}, {}, "expected microbatches >= 1, got 0"),
        ({"schedule": "DualPipe"}, {}, "expected a schedule of GPipe, 1F1B"),
        ({"schedule": "DualPipeV"}, {"num_hidden_layers": 2}, "expected at most 3 stages for 2 layers, got 4"),
        ({"stage_layers": [4]}, {}, "expected stage_layers of 1 x pp = 2 stages for 1F1B, got 1"),
        ({"stage_layers": [3, 2]}, {}, "4 in all, got [3, 2]"),
        ({"stage_layers": [0, 4]}, {}, "at least one layer each"),
        ({"stage_layers": [2, 2]}, SHARED, "which shares the selection of one before it"),
    ],
    ids=str,
)
def test_what_does_not_fit_changes_nothing(options, changes, message):
    first, second = run_ranks(refused, 2, {"pp": 2}, options, changes)
    assert first == second and message in first


def refused_in_part(rank):
    messages = []
    for axes in ({"tp": 2}, {"pp": 4}, {"pp": 2, "tp": 2}):
        messages.append(refused(rank, axes, {}, {}))
    model = small_models.model(CONFIG)
    model.gradient_checkpointing_enable()
    with pytest.raises(LayoutError) as caught:
        da.pipeline(model, ParallelLayout(pp=2), "ZBH1")
    messages.append(str(caught.value))
    sparse = small_models.model(small_models.config("v32", num_hidden_layers=4))
    with pytest.raises(LayoutError) as caught:
        da.pipeline(sparse, ParallelLayout(pp=2), "ZBH1")
    messages.append(str(caught.value))
    with pytest.raises(LayoutError) as caught:
        da.parallelize(model, ParallelLayout(pp=2))
    messages.append(str(caught.value))
    return messages


def test_other_layouts_and_models_are_refused():
    first, second = run_ranks(refused_in_part, 2)
    assert first == second
    wanted = [
        "pp >= 2",
        "divide 2 devices",
        "divide 2 devices",
        "no gradient checkpointing with",
        "frozen indexers",
        "pp = 1",
    ]
    assert all(part in message for part, message in zip(wanted, first, strict=True)), first


def wrong_steps(rank):
    model = small_models.model(CONFIG).train()
    pipe = da.pipeline(model, ParallelLayout(pp=2), microbatches=MICRO)
    messages = []
    wrong = IDS.clone()
    wrong[0, 0] = 64 * (rank + 1)  # each rank has a mistake of its own: all raise that of the first
    for arguments in ((IDS[:6], IDS[:6]), (wrong, IDS), (IDS, IDS[:, :4]), (IDS, IDS, None, IDS[:, :3])):
        with pytest.raises(ValueError) as caught:
            pipe.step(*arguments)
        messages.append(str(caught.value))
    for call in (lambda: model(IDS), lambda: da.generate(model, IDS[:1])):
        with pytest.raises(ValueError) as caught:
            call()
        messages.append(str(caught.value))
    with pytest.raises(ValueError) as caught:
        da.pipeline(model, ParallelLayout(pp=2), "GPipe")
    messages.append(str(caught.value))
    pipe.step(IDS, IDS)  # nothing is left behind by any of them
    return messages


def test_wrong_arguments_of_a_step_are_raised_alike():
    first, second = run_ranks(wrong_steps, 2)
    assert first == second
    wanted = ["multiples of 4 microbatches, got 6", "got 64", "expected labels [8, 9]", "expected position_ids"]
    wanted += ["expected a whole model"] * 2 + ["cut otherwise"]
    assert all(part in message for part, message in zip(wanted, first, strict=True)), first


def without_mtp(rank):
    model = small_models.model(CONFIG.replace(num_nextn_predict_layers=0)).train()
    pipe = da.pipeline(model, ParallelLayout(pp=2), microbatches=MICRO)
    pipe.step(IDS, IDS, mtp_weight=0.3)


def test_a_weight_without_mtp_modules_is_refused():
    with pytest.raises(RankError) as caught:
        run_ranks(without_mtp, 2)
    assert str(caught.value).count("ValueError: expected MTP modules for mtp_weight 0.3") == 2


# ---------------------------------------------------------------- weights


def drawn(rank, folder):
    pipe = da.pipeline(da.DeepseekLM(CONFIG, device="meta", dtype=torch.float32), ParallelLayout(pp=2), "DualPipeV", 4)
    da.init_weights(pipe.model, seed=3)
    da.save(pipe.model, folder)
    return pipe.model.state_dict()


def test_drawn_weights_are_those_of_one_process(tmp_path):
    expected = da.init_weights(da.DeepseekLM(CONFIG, device="meta", dtype=torch.float32), seed=3).state_dict()
    first, second = run_ranks(drawn, 2, tmp_path / "a")
    assert (first | second).keys() == expected.keys()
    loaded = da.load(tmp_path / "a", dtype=torch.float32).state_dict()
    assert loaded.keys() == expected.keys()
    for state in (first, second, loaded):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
