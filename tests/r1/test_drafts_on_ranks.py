"""Prediction layers that are trained on several processes: as on one process with all rows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

import deepseek_arch.hf as dhf
from deepseek_arch.r1.trainer import R1Config
from deepseek_arch.r1.trainer.losses import losses_of, watching_trunk
from deepseek_arch.r1.trainer.supervised import R1SFTConfig
from support.ranks import run_ranks

ARGS = SimpleNamespace(mtp_loss_weight=0.5, balance_loss=0.0)
STEPS = 3


def rows(step: int, rank: int) -> torch.Tensor:
    return torch.randint(2, 61, (2, 9), generator=torch.Generator().manual_seed(10 * step + rank))


def loss_of(wrapped, model, ids: torch.Tensor) -> torch.Tensor:
    """A policy's loss and that of its drafts, as the trainers add them."""
    with watching_trunk(model, ARGS) as seen:
        loss = wrapped(input_ids=ids).logits.square().mean()
    added = losses_of(model, ARGS, seen, ids, ids, torch.ones_like(ids).bool())
    return loss + sum(weight * value for weight, value in added.values())


def trained(folder: str, batches, wrap=lambda model: model) -> dict[str, torch.Tensor]:
    model = dhf.DeepseekForCausalLM.from_pretrained(folder).train()
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for each in batches:
        sum(loss_of(wrapped, model, ids) / len(each) for ids in each).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def test_layers_get_the_gradients_of_all_processes(policy_folder):
    folder = policy_folder(num_nextn_predict_layers=1)

    def on_rank(rank: int) -> dict[str, torch.Tensor]:
        wrap = torch.nn.parallel.DistributedDataParallel
        return trained(folder, [[rows(step, rank)] for step in range(STEPS)], wrap)

    first, second = run_ranks(on_rank, 2)
    alone = trained(folder, [[rows(step, 0), rows(step, 1)] for step in range(STEPS)])
    before = dict(dhf.DeepseekForCausalLM.from_pretrained(folder).named_parameters())
    assert sum(not torch.equal(alone[name], before[name]) for name in alone if name.startswith("mtp.")) > 10
    for name in alone:
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], alone[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [R1Config, R1SFTConfig])
def test_the_search_for_unused_parameters_is_off_where_layers_are_trained(kind, tmp_path):
    given = {"use_cpu": True, "bf16": False, "report_to": []}
    assert kind(str(tmp_path), **given).ddp_find_unused_parameters is None
    assert kind(str(tmp_path), mtp_loss_weight=0.1, **given).ddp_find_unused_parameters is False
    with pytest.raises(ValueError, match="ddp_find_unused_parameters=False with mtp_loss_weight, got True"):
        kind(str(tmp_path), mtp_loss_weight=0.1, ddp_find_unused_parameters=True, **given)
