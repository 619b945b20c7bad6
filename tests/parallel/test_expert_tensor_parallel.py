"""Routed experts cut inside (etp): gradients of one process, bytes of the plan, checkpoints."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import deepseek_arch as da
from deepseek_arch.checkpoint.synthetic import write_checkpoint
from deepseek_arch.layout.parallel_layout import LayoutError, ParallelLayout
from deepseek_arch.parallel.collectives import sent_bytes
from deepseek_arch.planning.routing import count_rows
from deepseek_arch.planning.traffic import expert_row
from support import small_models
from support.cut_models import SIZES, crowded_model, gradients, rows_of_rank, weighed_loss, whole
from support.ranks import run_ranks
from support.small_models import error

CONFIG = small_models.config("v3", **SIZES)


def model_of(dtype=torch.float32, experts=None, **changes):
    return crowded_model(CONFIG.replace(**changes), dtype, experts)


def trained(rank, axes, build, rows):
    model = da.parallelize(build(), ParallelLayout(**axes))
    weighed_loss(model, rows_of_rank(CONFIG, dist.get_rank(model.meshes.data), rows)).backward()
    held = {n: (p.to_local() if hasattr(p, "to_local") else p).numel() for n, p in model.named_parameters()}
    return gradients(model), held, float(da.clip_grad_norm(model, float("inf")))


def check(axes, world, rows, build):
    model = build()
    for rank in range(len(rows)):
        (weighed_loss(model, rows_of_rank(CONFIG, rank, rows)) / len(rows)).backward()
    expected = gradients(model)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9))
    experts = {name: p.numel() for name, p in model.named_parameters() if ".experts." in name}
    for grads, held, total in run_ranks(trained, world, axes, build, rows):
        assert grads.keys() == expected.keys() and total == pytest.approx(norm, rel=1e-5)
        worst = max(expected, key=lambda name: error(grads[name], expected[name]))
        assert error(grads[worst], expected[worst]) < (2e-6 if model.dtype == torch.float32 else 1e-12), worst
        assert all(held[name] * world == size for name, size in experts.items())


LAYOUTS = [
    ({"tp": 2, "etp": 2}, 2, (2,)),
    ({"dp_shard": 2, "etp": 2}, 2, (2, 1)),
    ({"dp_shard": 4, "ep": 2, "etp": 2}, 4, (1, 3, 2, 2)),
    ({"dp_shard": 4, "etp": 2}, 4, (1, 1, 2, 1)),
]


@pytest.mark.parametrize(("axes", "world", "rows"), LAYOUTS, ids=str)
def test_gradients_are_those_of_one_process(axes, world, rows):
    check(axes, world, rows, model_of)


@pytest.mark.parametrize("experts", [[0, 1, 2], [5, 6, 7]])
def test_ranks_that_serve_no_token_take_part(experts):
    check(*LAYOUTS[2], lambda: model_of(experts=experts))


def test_all_tokens_to_one_expert():
    one = {"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}
    check(*LAYOUTS[2], lambda: model_of(experts=[4], **one))


def few_experts():
    return model_of(n_routed_experts=2, n_group=1, topk_group=1, num_experts_per_tok=2)


def test_fewer_experts_than_shards_are_cut_along_the_third_dimension():
    """TRAPS S11: etp has cut the second one of gate and up."""
    check({"dp_shard": 4, "ep": 2, "etp": 1}, 4, (1, 1, 2, 1), few_experts)
    check({"dp_shard": 4, "ep": 1, "etp": 2}, 4, (1, 1, 2, 1), lambda: model_of(**{**ONE, "num_experts_per_tok": 1}))


ONE = {"n_routed_experts": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}


def counted(rank):
    model = da.parallelize(model_of(), ParallelLayout(dp_shard=4, ep=2, etp=2))
    chosen = []
    for module in model.modules():
        if isinstance(module, da.Router):
            module.register_forward_hook(lambda _, args, out: chosen.append(out[2].tolist()))
    sent_bytes.clear()
    weighed_loss(model, rows_of_rank(CONFIG, rank, LAYOUTS[2][2])).backward()
    return dict(sent_bytes), chosen


def test_bytes_are_those_of_the_plan():
    """A row goes to each rank that has a part of the experts."""
    results = run_ranks(counted, 4)
    row, between = expert_row(CONFIG.hidden_size, CONFIG.num_experts_per_tok, 4), []
    for _, layers in results:
        made = [count_rows(choices, 8, 2) for choices in layers]
        between.append([sum(column) for column in zip(*made, strict=True) for _ in range(2)])
    for me, (sent, _) in enumerate(results):
        out = sum(between[me]) - between[me][me]
        come = sum(rows[me] for rows in between) - between[me][me]
        assert sent == {
            "expert dispatch": out * row.dispatch,
            "expert combine": come * row.combine,
            "expert combine backward": out * row.combine_backward,
            "expert dispatch backward": come * row.dispatch_backward,
        }


# ---------------------------------------------------------------- checkpoints


def stepped(axes, seed):
    model = small_models.model(CONFIG, seed=seed).train()
    if axes is not None:
        model = da.parallelize(model, ParallelLayout(**axes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = rows_of_rank(CONFIG, 0, (2,))
    weighed_loss(model, ids).backward()
    optimizer.step()
    return model, optimizer


def contents(model, optimizer):
    found = {name: whole(tensor).clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        found |= {f"{name} {key}": whole(value).clone() for key, value in optimizer.state[parameter].items()}
    return found


def saved(rank, axes, folder):
    model, optimizer = stepped(axes, 0)
    da.save_sharded(model, folder, optimizer)
    return contents(model, optimizer)


def loaded(rank, axes, folder):
    model, optimizer = stepped(axes, 1)
    da.load_sharded(model, folder, optimizer)
    return contents(model, optimizer)


def test_checkpoints_to_other_layouts_and_back(tmp_path):
    first = run_ranks(saved, 2, LAYOUTS[0][0], tmp_path / "a")[0]
    single = loaded(0, None, tmp_path / "a")
    for found in [single, *run_ranks(loaded, 4, LAYOUTS[2][0], tmp_path / "a")]:
        assert found.keys() == first.keys()
        assert [name for name in first if not torch.equal(found[name], first[name])] == []
    model, optimizer = stepped(None, 2)
    da.save_sharded(model, tmp_path / "b", optimizer)
    expected = contents(model, optimizer)
    for found in run_ranks(loaded, 2, LAYOUTS[1][0], tmp_path / "b"):
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


FILES = small_models.config(
    "v3",
    **SIZES | {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "intermediate_size": 64},
    moe_intermediate_size=32,
    quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]},
)


def read(rank, folder, axes, fp8):
    model = da.load(folder, dtype=torch.float32, fp8=fp8, layout=ParallelLayout(**axes))
    with torch.no_grad():
        logits = model(small_models.tokens(FILES, 2, 9)).logits
    return logits, model.load_report.bytes_read


@pytest.mark.parametrize("fp8", ["keep", "dequantize"])
@pytest.mark.parametrize(
    ("axes", "world"), [({"tp": 2, "etp": 2}, 2), ({"dp_shard": 4, "ep": 2, "etp": 2}, 4)], ids=str
)
def test_a_rank_reads_its_parts_alone(tmp_path, axes, world, fp8):
    write_checkpoint(tmp_path / "files", FILES, "fp8", std=0.1, shards=3)
    model = da.load(tmp_path / "files", dtype=torch.float32, fp8=fp8)
    with torch.no_grad():
        expected = model(small_models.tokens(FILES, 2, 9)).logits
    for logits, nbytes in run_ranks(read, world, tmp_path / "files", axes, fp8):
        assert error(logits, expected) < 1e-5
        assert nbytes < 0.9 * model.load_report.bytes_read


def refused(rank):
    messages = []
    for changes in ({"moe_intermediate_size": 21}, {"moe_intermediate_size": 16}):
        model = da.keep_fp8(da.DeepseekLM(FILES.replace(**changes), dtype=torch.float32), (16, 16))
        with pytest.raises(LayoutError) as caught:
            da.parallelize(model, ParallelLayout(etp=2))
        messages.append(str(caught.value))
    model = da.parallelize(model_of(), ParallelLayout(ep=1, etp=2))
    with pytest.raises(ValueError) as caught:
        da.use_dispatch(model, "choices")
    return [*messages, str(caught.value)]


def test_what_does_not_fit_is_refused_alike():
    first, second = run_ranks(refused, 2)
    assert first == second
    assert "expected etp = 2 to divide moe_intermediate_size = 21" in first[0]
    assert "expected etp = 2 to cut the routed experts' width = 16 at borders of FP8 blocks of 16" in first[1]
    assert "cut by ep > 1" in first[2]


def drawn_and_saved(rank, axes, folder):
    model = da.parallelize(da.DeepseekLM(CONFIG, device="meta", dtype=torch.float32), ParallelLayout(**axes))
    da.init_weights(model, seed=3)
    da.save(model, folder)
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def test_drawn_weights_and_published_files_are_those_of_one_process(tmp_path):
    expected = da.init_weights(da.DeepseekLM(CONFIG, device="meta", dtype=torch.float32), seed=3).state_dict()
    for found in run_ranks(drawn_and_saved, 2, LAYOUTS[0][0], tmp_path / "a"):
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    state = da.load(tmp_path / "a", dtype=torch.float32).state_dict()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []
