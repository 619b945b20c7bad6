"""Mixed precision, FP8 weights, FP8 training and adapters on layouts, against one process."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

import deepseek_arch as da
from deepseek_arch.layout.parallel_layout import LayoutError, ParallelLayout
from support import small_models
from support.cut_models import FP8_SIZES, gradients
from support.ranks import run_ranks
from support.small_models import error

CONFIG = small_models.config("v3", **FP8_SIZES)
IDS = small_models.tokens(CONFIG, 4, 9)


def model_of():
    return small_models.model(CONFIG).train()


def rows_of(model):
    if model.meshes is None:
        return IDS
    return IDS.chunk(dist.get_world_size(model.meshes.data))[dist.get_rank(model.meshes.data)]


def step(model):
    ids = rows_of(model)
    out = model(ids, labels=ids, return_logits=False)
    (out.loss + 0.3 * out.mtp_loss).backward()
    return float(out.loss.detach())


# ---------------------------------------------------------------- mixed precision


def mixed(rank, axes, folder=None):
    """Casts a model, or with a pipeline one that is read from files, and takes a step."""
    layout, schedule, seen = ParallelLayout(**axes), axes.get("pp") and "DualPipeV", {}
    if folder is None:
        model = da.parallelize(model_of(), layout, torch.bfloat16)
    else:
        model = da.load(folder, dtype="float32", layout=layout, schedule=schedule, param_dtype=torch.bfloat16).train()

    def note(kind, tensors):
        seen.setdefault(kind, set()).update(str(t.dtype) for t in tensors if t.is_floating_point())

    for module in model.modules():
        if isinstance(module, da.Router):
            module.register_forward_pre_hook(lambda m, args: note("router", [m.weight]))
        if isinstance(module, da.Experts):
            module.register_forward_pre_hook(lambda m, args: note("routing weights", [args[2]]))
            module.register_forward_pre_hook(lambda m, args: note("experts", [args[0]]))
    if schedule is None:
        step(model)
    else:
        pipe = da.pipeline(model, layout, schedule, 4)
        ids = rows_of(model).repeat_interleave(4 // len(rows_of(model)), 0)
        pipe.step(ids, ids, mtp_weight=0.3)
        pipe.evaluate(ids, ids)
    parameters = {str(p.dtype) for p in model.parameters()}
    return seen, parameters, gradients(model)


@pytest.mark.parametrize(
    ("axes", "world"),
    [
        ({"dp_shard": 2, "ep": 2}, 2),
        ({"tp": 2}, 2),
        ({"dp_shard": 2, "tp": 2, "ep": 2}, 4),
        ({"pp": 2}, 2),
        ({"pp": 2, "dp_shard": 2, "ep": 2}, 4),
    ],
    ids=str,
)
def test_parameters_are_cast_for_computing(axes, world, tmp_path):
    """Gradients stray from those of float32 no further than one process's in bfloat16: routers choose otherwise."""
    exact, half = model_of(), model_of().bfloat16()
    for module in half.modules():
        if isinstance(module, da.Router):
            module.weight.data = module.weight.data.float()
    rounded = dict(half.named_parameters())
    for name, parameter in exact.named_parameters():
        parameter.data = rounded[name].data.float()
    for model in (exact, half):
        step(model)
    expected, noisy = gradients(exact), gradients(half)
    files = tmp_path / "files" if "pp" in axes else None
    if files is not None:
        da.save(model_of(), files)
    whole: dict = {}
    for seen, parameters, grads in run_ranks(mixed, world, axes, files):
        assert seen == {
            "router": {"torch.float32"},
            "routing weights": {"torch.float32"},
            "experts": {"torch.bfloat16"},
        }
        assert parameters == {"torch.float32"} and {g.dtype for g in grads.values()} == {torch.float32}
        whole |= grads
    assert whole.keys() == expected.keys()
    for name in (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.experts.down_proj",
        "mtp.0.eh_proj.weight",
    ):
        assert error(whole[name], expected[name]) < 1.5 * error(noisy[name].float(), expected[name]), name


def decoded(rank, depth):
    model = da.parallelize(model_of(), ParallelLayout(dp_shard=2), torch.bfloat16)
    return da.generate(model, IDS[:2], max_new_tokens=6, mtp_depth=depth, eos_token_id=[])


@pytest.mark.parametrize("depth", [0, 1])
def test_caches_are_of_the_dtype_that_is_computed_in(depth):
    """Shards alone are float32. Routers are those of float32, too."""
    exact, half = model_of(), model_of().bfloat16()
    for module, other in zip(exact.modules(), half.modules(), strict=True):
        if isinstance(module, da.Router):
            other.weight.data = module.weight.data
    expected = da.generate(half, IDS[:2], max_new_tokens=6, mtp_depth=depth, eos_token_id=[])
    for tokens in run_ranks(decoded, 2, depth):
        assert torch.equal(tokens, expected)


# ---------------------------------------------------------------- FP8


def kept():
    return da.keep_fp8(model_of(), (16, 16))


def recipe():
    model = model_of()
    da.fp8_training(model)
    return model


def with_adapters():
    """LoRA on attention and dense MLPs over weights in FP8."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    targets = ["q_a_proj", "q_b_proj", "o_proj", "kv_b_proj"]
    model = inject_adapter_in_model(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), kept())
    return model.train()


def trained(rank, build, axes):
    model = da.parallelize(build(), ParallelLayout(**axes))
    loss = step(model)
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    return loss, gradients(model)


@pytest.mark.parametrize(
    ("build", "axes", "bound"),
    [
        (kept, {"tp": 2}, 1e-5),
        (kept, {"tp": 2, "ep": 2}, 1e-5),
        (recipe, {"dp_shard": 2, "ep": 2}, 2e-5),
        (recipe, {"dp_shard": 2}, 2e-5),
        (with_adapters, {"dp_shard": 2}, 1e-5),
        (with_adapters, {"dp_shard": 2, "ep": 2}, 1e-5),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_gradients_are_those_of_one_process(build, axes, bound):
    if build is with_adapters:
        pytest.importorskip("peft")
    model = build()
    # FP8's activations are rounded in groups of a row's features, whichever rows are beside it.
    losses = []
    for ids in IDS.chunk(2) if "dp_shard" in axes else [IDS]:
        out = model(ids, labels=ids, return_logits=False)
        ((out.loss + 0.3 * out.mtp_loss) * len(ids) / len(IDS)).backward()
        losses.append(float(out.loss.detach()))
    expected, unrounded = gradients(model), model_of()
    step(unrounded)
    exact = gradients(unrounded)
    for rank, (loss, grads) in enumerate(run_ranks(trained, 2, build, axes)):
        assert loss == pytest.approx(losses[rank % len(losses)], rel=1e-5)
        assert grads.keys() == expected.keys()
        same = [name for name in expected if not (build is recipe and "ep" in axes and ".experts." in name)]
        worst = max(same, key=lambda name: error(grads[name], expected[name]))
        assert error(grads[worst], expected[worst]) < bound, worst
        for name in expected.keys() - set(same):  # their tokens meet in other groups of rows, which are rounded alike
            assert error(grads[name], exact[name]) < 1.5 * error(expected[name], exact[name]) + 0.01, name


def codes_that_would_be_cast(rank, axes):
    model = kept()
    before = dict(model.named_parameters())
    with pytest.raises(LayoutError) as caught:
        if "pp" in axes:
            da.pipeline(model, ParallelLayout(**axes), microbatches=2, param_dtype=torch.bfloat16)
        else:
            da.parallelize(model, ParallelLayout(**axes), torch.bfloat16)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    return str(caught.value)


@pytest.mark.parametrize("axes", [{"dp_shard": 2}, {"tp": 2}, {"pp": 2}], ids=str)
def test_codes_are_not_cast(axes):
    """FSDP would turn them into bfloat16 without their scales: the first pass failed in the middle."""
    for message in run_ranks(codes_that_would_be_cast, 2, axes):
        assert "expected param_dtype None with weights in FP8 (model.layers.0.self_attn.q_a_proj)" in message


# ---------------------------------------------------------------- adapters around experts


class Around(torch.nn.Module):
    """A module around another, as PEFT makes them for `target_parameters`."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    def forward(self, *args):
        return self.base_layer(*args)


def around_experts(rank, axes):
    model = model_of()
    mlp = model.model.layers[1].mlp
    mlp.experts = Around(mlp.experts)
    before = copy.copy(mlp.experts.base_layer._parameters)
    with pytest.raises(LayoutError) as caught:
        da.parallelize(model, ParallelLayout(**axes))
    assert mlp.experts.base_layer._parameters == before and type(mlp.experts.base_layer) is da.Experts
    return str(caught.value)


@pytest.mark.parametrize("axes", [{"dp_shard": 2, "ep": 2}, {"dp_shard": 2}], ids=str)
def test_adapters_around_experts_are_refused(axes):
    """Their weights are of all experts, and what they add is not cut."""
    for message in run_ranks(around_experts, 2, axes):
        assert "expected ep = dp = 1 with model.layers.1.mlp.experts.base_layer, experts inside of another" in message
