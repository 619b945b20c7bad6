"""Training under FSDP2 (`fully_shard`) on two ranks, against one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import deepseek_arch as da
from support import small_models
from support.cut_models import gradients
from support.ranks import run_ranks
from support.small_models import error

CONFIG = small_models.config("v3", num_nextn_predict_layers=1)
IDS = small_models.tokens(CONFIG, 4, 9)
SAME = 2e-6  # float32 gradients, summed in another order


def sharded(model, **options):
    """Wraps every layer, then the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (*model.model.layers, *model.mtp):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def uneven_labels():
    """Rows of the first rank have eight targets each, those of the second two and none."""
    labels = IDS.clone()
    labels[2, 3:] = -100
    labels[3] = -100
    return labels


def loss_of_next_token_alone(rank):
    model = sharded(small_models.model(CONFIG).train())
    part = IDS[2 * rank : 2 * rank + 2]
    for _ in range(2):
        model.zero_grad()
        out = model(part, labels=part)
        out.loss.backward()
    return gradients(model), float(out.mtp_loss.detach())


def test_a_loss_without_mtp_modules_leaves_them_alone():
    """Their balance loss would otherwise run their routers backward, with weights that nothing has gathered."""
    reference = small_models.model(CONFIG).train()
    for part in IDS.split(2):
        (reference(part, labels=part).loss / 2).backward()
    expected = gradients(reference)
    assert not [name for name in expected if name.startswith("mtp.")]
    for grads, _ in run_ranks(loss_of_next_token_alone, 2):
        assert {n for n in grads if not n.startswith("mtp.") or grads[n].any()} == expected.keys()
        assert max(error(grads[name], grad) for name, grad in expected.items()) < SAME


def in_mixed_precision(rank):
    model = small_models.model(CONFIG).train()
    seen = []
    model.model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[1].cos.dtype))
    model = sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    part = IDS[2 * rank : 2 * rank + 2]
    out = model(part, labels=part)
    (out.loss + 0.3 * out.mtp_loss).backward()
    return out.logits.detach(), gradients(model), seen


def test_mixed_precision_is_the_model_in_16_bits_with_float32_angles():
    for rank, (logits, grads, seen) in enumerate(run_ranks(in_mixed_precision, 2)):
        assert seen == [torch.float32]
        part = IDS[2 * rank : 2 * rank + 2]
        expected = small_models.model(CONFIG).bfloat16().train()(part).logits
        assert torch.equal(logits, expected)
        assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads.values())


def global_gradients(rank, uneven):
    model = sharded(small_models.model(CONFIG).train())
    part = slice(2 * rank, 2 * rank + 2)
    labels = uneven_labels() if uneven else IDS
    loss = da.global_loss(model(IDS[part], labels=labels[part]), 0.3)
    loss.backward()
    loss = loss.detach()
    dist.all_reduce(loss)
    return float(loss) / 2, gradients(model)


@pytest.mark.parametrize("uneven", [True, False])
def test_the_global_loss_is_that_of_one_process(uneven):
    model = small_models.model(CONFIG).train()
    out = model(IDS, labels=uneven_labels() if uneven else IDS)
    expected = out.loss + 0.3 * out.mtp_loss
    expected.backward()
    for loss, grads in run_ranks(global_gradients, 2, uneven):
        assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
        assert max(error(grads[name], grad) for name, grad in gradients(model).items()) < SAME


def test_a_mean_of_means_is_another_loss():
    model, labels = small_models.model(CONFIG), uneven_labels()
    with torch.no_grad():
        means = [model(IDS[rows], labels=labels[rows]).loss for rows in (slice(2), slice(2, 4))]
        assert error(sum(means) / 2, model(IDS, labels=labels).loss) > 1e-3


def test_the_global_loss_of_one_process():
    model = small_models.model(CONFIG).train()
    out = model(IDS, labels=IDS)
    assert error(da.global_loss(out, 0.3), out.loss + 0.3 * out.mtp_loss) < 1e-6
    with pytest.raises(ValueError, match=r"expected MTP modules for mtp_weight 0\.3"):
        da.global_loss(small_models.model(CONFIG.replace(num_nextn_predict_layers=0)).train()(IDS, labels=IDS), 0.3)
    with pytest.raises(ValueError, match="in training mode with labels"):
        da.global_loss(model.eval()(IDS, labels=IDS))
