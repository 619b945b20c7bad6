"""A small model from dense to sparse attention, in the two stages of the V3.2 report: an example to start from.

    python -m benchmarks.training.sparse_stages --steps 150 --warm-up 60 --sparse 60

A model with dense attention learns to look things up: which member of a group a row has, of which it has shown many.
It then gets indexers.
The dense warm-up trains them alone, on the attention's own weights; the sparse stage trains the whole model on the
keys that they select. Printed, and drawn if matplotlib is installed: the share of the attention's best mass that the
selected keys have (recall), and the loss on held-out rows with dense attention and with sparse attention before and
after each stage.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated

import torch
from torch import Tensor

import deepseek_arch as da

from ..core.options import parse_settings

__all__ = ["Settings", "Stages", "main", "run", "small_config"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes and rates of the three stages.

    Raises:
        ValueError: a size that is not positive, or as many selected keys as tokens.
    """

    steps: Annotated[int, "steps of training with dense attention"] = 150
    warm_up: Annotated[int, "steps of the dense warm-up"] = 60
    sparse: Annotated[int, "steps of the sparse stage"] = 60
    batch: Annotated[int, "rows of a batch"] = 16
    sequence: Annotated[int, "tokens of a row"] = 128
    index_topk: Annotated[int, "keys of a query"] = 8
    rate: Annotated[float, "learning rate of the dense model; the sparse stage has a tenth of it"] = 3e-3
    warm_up_rate: Annotated[float, "learning rate of the indexers"] = 1e-2
    seed: Annotated[int, "of the weights and of the rows"] = 0
    threads: Annotated[int, "threads of torch"] = 2
    picture: Annotated[str, "PNG of recall and losses; '' for none"] = "benchmarks/results/sparse-stages.png"

    def __post_init__(self) -> None:
        sizes = (self.steps, self.warm_up, self.sparse, self.batch, self.index_topk, self.threads)
        if min(sizes) < 1 or self.sequence < 16 or self.index_topk >= self.sequence:
            raise ValueError(f"expected positive sizes, and less selected keys than tokens, got {self}")


@dataclass(frozen=True)
class Stages:
    """Outcome of a run.

    Attributes:
        recall: mean over layers, before each step of the warm-up and after the last one.
        losses: on held-out rows: "dense", and "sparse" with indexers that are "random", "warmed up" and after the
            "sparse stage".
    """

    recall: list[float]
    losses: dict[str, float]

    def __str__(self) -> str:
        lines = [f"recall of the best mass: {self.recall[0]:.3f} -> {self.recall[-1]:.3f} by the warm-up"]
        lines += [f"loss, {name:30} {loss:.4f}" for name, loss in self.losses.items()]
        return "\n".join(lines)


def small_config(sequence: int) -> da.DeepseekConfig:
    """Returns two layers without experts, 4 heads, 64 features."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    ranks = {"q_lora_rank": 48, "kv_lora_rank": 32, "max_position_embeddings": sequence}
    experts = dict.fromkeys(("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts"))
    others = {"dtype": "float32", "initializer_range": 0.1, "n_group": None, "topk_group": None}
    return da.DeepseekConfig(**sizes, **heads, **ranks, **experts, **others)


def lookup_rows(settings: Settings, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns rows int64 [B, T], and their labels, -100 but for the answers.

    Each row has one token of each of 8 groups (ids g, g + 8, g + 16, g + 24). Its first half is a random sequence of
    these 8; in the second, questions after a group (id 32 + g) are followed by the row's token of that group.
    """
    half, pairs = settings.sequence // 2, settings.sequence // 4
    own = torch.arange(8) + 8 * torch.randint(4, (settings.batch, 8), generator=draw)
    shown = own.gather(1, torch.randint(8, (settings.batch, settings.sequence - 2 * pairs), generator=draw))
    groups = torch.randint(8, (settings.batch, pairs), generator=draw)
    asked = torch.stack((groups + 32, own.gather(1, groups)), dim=-1).flatten(1)
    rows = torch.cat((shown, asked), dim=1)
    labels = rows.masked_fill((torch.arange(settings.sequence) < half) | (rows >= 32), -100)
    return rows, labels


def run(settings: Settings | None = None) -> Stages:
    """Trains a model with dense attention, then its indexers, then all of it."""
    settings = settings or Settings()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    draw = torch.Generator().manual_seed(settings.seed)
    held_out = lookup_rows(settings, torch.Generator().manual_seed(settings.seed + 1))
    dense = da.DeepseekLM(small_config(settings.sequence), dtype=torch.float32)
    optimizer = torch.optim.AdamW(dense.parameters(), lr=settings.rate)
    for _ in range(settings.steps):
        rows, labels = lookup_rows(settings, draw)
        _step(optimizer, dense(rows, labels=labels).loss)
    losses = {"dense": _loss(dense, *held_out)}

    model = da.sparse_from_dense(dense, index_topk=settings.index_topk, index_n_heads=16, index_head_dim=32)
    losses["sparse, random indexers"] = _loss(model, *held_out)
    optimizer, recall = torch.optim.AdamW(da.train_only_indexers(model), lr=settings.warm_up_rate), []
    for _ in range(settings.warm_up):
        loss, selection = da.indexer_warm_up(model, lookup_rows(settings, draw)[0])
        recall.append(_mean(selection))
        _step(optimizer, loss)
    with torch.no_grad():
        recall.append(_mean(da.indexer_warm_up(model, held_out[0])[1]))
    losses["sparse, warmed up"] = _loss(model, *held_out)

    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate / 10)
    for _ in range(settings.sparse):
        rows, labels = lookup_rows(settings, draw)
        out = da.sparse_training(model, rows, labels)
        assert out.loss is not None and out.indexer_loss is not None
        _step(optimizer, out.loss + out.indexer_loss)
    losses["sparse, after the sparse stage"] = _loss(model, *held_out)
    return Stages(recall, losses)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor | None) -> None:
    assert loss is not None
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def _loss(model: da.DeepseekLM, rows: Tensor, labels: Tensor) -> float:
    """Returns the loss of the answers."""
    out = model(rows, labels=labels)
    assert out.loss is not None
    return float(out.loss)


def _mean(selection: da.KeySelection) -> float:
    return float(torch.stack(list(selection.recall.values())).mean())


def draw_stages(stages: Stages, path: str) -> None:
    """Draws recall and losses into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(stages.recall)
    left.set(xlabel="step of the dense warm-up", ylabel="recall of the best mass", ylim=(0, 1.02))
    names = [name.replace("sparse, ", "sparse,\n").replace("after the ", "after the\n") for name in stages.losses]
    bars = right.bar(names, list(stages.losses.values()), color=["0.6", "C3", "C0", "C2"][: len(names)])
    right.bar_label(bars, fmt="%.3f")
    right.set(ylabel="loss of held-out answers", yscale="log")
    right.tick_params(axis="x", labelsize=7)
    figure.savefig(path, dpi=140)


def main(settings: Settings) -> int:
    """Runs the stages, prints and draws what they do."""
    stages = run(settings)
    print(stages)
    if settings.picture and find_spec("matplotlib") is not None:
        draw_stages(stages, settings.picture)
        print(f"drawn: {settings.picture}")
    return 0


def _arguments(arguments: Sequence[str]) -> Settings:
    return parse_settings("python -m benchmarks.training.sparse_stages", Settings, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main(_arguments(sys.argv[1:])))
