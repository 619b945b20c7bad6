"""Training steps on two processes, in a module of their own: processes that are started for them import little."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from support import small_models

CONFIG = small_models.config("v3", num_nextn_predict_layers=1)
SPARSE = small_models.config("v32", num_nextn_predict_layers=1)  # rows below have more tokens than selected keys
STEPS = 3


def made(kind: str) -> nn.Module:
    config = SPARSE if "sparse" in kind else CONFIG
    if kind.startswith("core"):
        core = small_models.model(config).train()
        core.gradient_checkpointing_enable("recomputing" in kind)
        return core
    from twins import ours

    model = ours(config).train()
    if "recomputing" in kind:
        model.gradient_checkpointing_enable()
    if "adapters" in kind:
        from peft import LoraConfig, get_peft_model

        model.enable_input_require_grads()
        torch.manual_seed(0)
        # The head's and the router's Linears are not what is tested here.
        lora = LoraConfig(r=2, target_modules=["o_proj", "kv_b_proj", "eh_proj"], init_lora_weights=False)
        return get_peft_model(model, lora)
    return model


def steps(model: nn.Module, kind: str, rows: list[Tensor]) -> dict[str, Tensor]:
    """Returns the trained weights after `STEPS` steps of SGD, each on one of `rows`."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for ids in rows:
        if "logits" in kind:
            loss = model(input_ids=ids).logits.square().mean()
        else:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n.removeprefix("module."): p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def batches() -> list[Tensor]:
    """Returns the rows of each step, one for each process."""
    return list(small_models.tokens(CONFIG, 2 * STEPS, 9).split(2))


def on_rank(rank: int, port: int, kinds: tuple[str, ...], results: MutableMapping[int, object]) -> None:
    """One of two processes: leaves its weights under its number."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    found = {}
    for kind in kinds:
        rows = [ids[rank : rank + 1] for ids in batches()]
        weights = steps(DistributedDataParallel(made(kind)), kind, rows)
        found[kind] = {name: weight.numpy() for name, weight in weights.items()}
    results[rank] = found
    torch.distributed.destroy_process_group()
