"""A task on which experts collapse without balancing: tiny, seconds long, with a bound for balanced loads.

Embeddings start with a large common part, as those of trained models have, so that all tokens prefer the same experts.
The task is a walk over the vocabulary in which seven tokens of ten have one successor. The experts that get the tokens
learn it, and are preferred even more.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import deepseek_arch as da
from deepseek_arch.moe.balance_loss import BalanceLoss
from deepseek_arch.moe.expert_load import LoadHistory
from deepseek_arch.moe.load_balancer import LoadBalancer

__all__ = ["BATCH", "LENGTH", "chance_violation", "skewed_config", "train_skewed"]

BATCH, LENGTH = 16, 32


def skewed_config() -> da.DeepseekConfig:
    """Returns two layers of 16 experts, 2 for a token, without groups and without an MTP module."""
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16}
    layers = {"num_hidden_layers": 2, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    routing = {"n_routed_experts": 16, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
    attention = heads | {"v_head_dim": 8, "q_lora_rank": None, "kv_lora_rank": 16}
    others = {"dtype": "float32", "bos_token_id": None, "eos_token_id": None}
    return da.DeepseekConfig.from_pretrained("tiny").replace(**sizes, **layers, **routing, **attention, **others)


def chance_violation(steps: int) -> float:
    """Returns the max violation of even use by chance alone, over so many steps together.

    The number of choices of an expert is about Poisson, with a relative deviation of one over its root, and the largest
    of E such numbers lies about sqrt(2 ln E) deviations above the mean.
    """
    config = skewed_config()
    each = steps * BATCH * LENGTH * config.num_experts_per_tok / config.n_routed_experts
    return math.sqrt(2 * math.log(config.n_routed_experts) / each)


def train_skewed(rate: float, steps: int, seed: int = 0) -> tuple[LoadHistory, list[float]]:
    """Trains on the task and returns the use of the experts and the loss of every step.

    Args:
        rate: of the bias updates; 0 for none. No balance loss is added, so that nothing else balances.
        seed: of weights and data; the same for every rate.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = da.DeepseekLM(skewed_config(), device="cpu", dtype=torch.float32)
    model.balance_loss = BalanceLoss()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
        embedding = model.model.embed_tokens.weight
        embedding += embedding.std() * torch.randn(embedding.shape[1], generator=draw)
    successors = torch.randperm(len(embedding), generator=draw)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    balancer, history, losses = LoadBalancer(model, rate), LoadHistory(), []
    model.train()
    for _ in range(steps):
        rows = _walk(successors, draw)
        out = model(rows, labels=rows, return_logits=False)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.add(balancer.step())
        losses.append(float(out.loss.detach()))
    return history, losses


def _walk(successors: Tensor, draw: torch.Generator) -> Tensor:
    """Walks int64 [BATCH, LENGTH]: from each token to its successor in seven of ten cases, else anywhere."""
    anywhere = torch.randint(len(successors), (BATCH, LENGTH), generator=draw)
    follows = torch.rand(BATCH, LENGTH, generator=draw) < 0.7
    rows = anywhere.clone()
    for column in range(1, LENGTH):
        rows[:, column] = torch.where(follows[:, column], successors[rows[:, column - 1]], anywhere[:, column])
    return rows
