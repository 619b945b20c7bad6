"""Bytes that one device sends, by link and purpose. Collectives are counted as rings: (n - 1) / n of the whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ..config.deepseek_config import DeepseekConfig
from ..layout.parallel_layout import ParallelLayout
from .routing import even_parts, expected_targets
from .schedules import rank_stages, stage_count
from .setup import TrainingSetup
from .shards import Parameter, elements, end_parameters, layer_parameters, per_layer

__all__ = [
    "ExpertRow",
    "Transfer",
    "context_parallel_traffic",
    "end_traffic",
    "expert_row",
    "layer_traffic",
    "ring_bytes",
    "step_traffic",
    "tensor_parallel_traffic",
    "total_by",
]

ID_BYTES, WEIGHT_BYTES = 2, 4  # of each choice that travels with a row
BF16 = 2


class Transfer(NamedTuple):
    """Bytes that one device sends over one link ("nvlink" or "network") in one pass ("forward", "backward", "step")."""

    purpose: str
    link: str
    phase: str
    nbytes: float


class ExpertRow(NamedTuple):
    """Bytes of one row (a token on its way to one rank's experts) in each of the four exchanges of a training step."""

    dispatch: float
    combine: float
    combine_backward: float
    dispatch_backward: float

    @property
    def total(self) -> float:
        return sum(self)


def expert_row(
    hidden: int, top_k: int, value: float, dispatched: float | None = None, per_choice: bool = False
) -> ExpertRow:
    """Returns the bytes of one row.

    A row travels with the ids and weights of its choices, comes back as a weighted sum, and gradients take the same
    ways: of the sum to the experts, of the row and of the weights back.

    Args:
        value: bytes of a value; dispatched: of one on its way to the experts, if it differs (with FP8's scales,
            1 + 4/128).
        per_choice: a row for every choice, which its sender weights: neither ids nor weights travel.
    """
    there = value if dispatched is None else dispatched
    ids, weights = (0, 0) if per_choice else (top_k * ID_BYTES, top_k * WEIGHT_BYTES)
    return ExpertRow(hidden * there + ids + weights, hidden * value, hidden * there, hidden * value + weights)


def ring_bytes(nbytes: float, ranks: int) -> float:
    """Returns what a rank sends to gather, or to reduce and scatter, `nbytes` over a ring; an all-reduce is both."""
    return nbytes * (ranks - 1) / ranks


def _ring(
    layout: ParallelLayout, axis: str, size: int, per_node: int, purpose: str, phase: str, nbytes: float
) -> Iterator[Transfer]:
    """Yields the ring's bytes by link: of the ranks of a node, one sends to the next node, the others stay inside."""
    if size == 1 or not nbytes:
        return
    local = max(1, min(size, per_node // layout.stride(axis)))
    sent = ring_bytes(nbytes, size)
    outside = 0.0 if local == size else sent / local
    if outside:
        yield Transfer(purpose, "network", phase, outside)
    if sent > outside:
        yield Transfer(purpose, "nvlink", phase, sent - outside)


# ------------------------------------------------------------------ of one layer


def layer_traffic(
    config: DeepseekConfig, layer_idx: int, layout: ParallelLayout, setup: TrainingSetup, per_node: int
) -> list[Transfer]:
    """Returns what one device sends for one micro-batch of decoder layer `layer_idx`."""
    tokens = setup.tokens(layout)
    out = list(tensor_parallel_traffic(config, layout, tokens, per_node))
    out += context_parallel_traffic(config, layout, tokens, per_node)
    if config.is_moe_layer(layer_idx):
        out += _experts(config, layout, setup, tokens, per_node)
    if setup.recompute == "full":
        # The forward pass runs again before the backward pass, collectives included.
        out += [transfer._replace(phase="backward") for transfer in out if transfer.phase == "forward"]
    return out + list(_sharded(layer_parameters(config, layer_idx, layout), layout, setup, per_node))


def tensor_parallel_traffic(
    c: DeepseekConfig, layout: ParallelLayout, tokens: int, per_node: int, value: int = BF16
) -> Iterator[Transfer]:
    """Yields a layer's all-reduces, of `value` bytes a value: forward, the outputs of attention and of the MLP or
    experts; backward, the gradients of the latents that all heads read (the rotated key among them), or of their input
    where queries have no latent, and of the MLP's input."""
    latents = (c.q_lora_rank or c.hidden_size) + c.latent_dim
    for phase, values in (("forward", 2 * c.hidden_size), ("backward", latents + c.hidden_size)):
        yield from _ring(layout, "tp", layout.tp, per_node, "tensor parallel", phase, 2 * value * tokens * values)


def context_parallel_traffic(
    c: DeepseekConfig, layout: ParallelLayout, tokens: int, per_node: int, value: int = BF16
) -> Iterator[Transfer]:
    """Yields the gathering of a layer's latents and rotated keys, and the reduction of their gradients to their owners.

    Args:
        tokens: of this rank; value: bytes of a value.
    """
    whole = layout.cp * tokens * c.latent_dim * value
    for phase in ("forward", "backward"):
        yield from _ring(layout, "cp", layout.cp, per_node, "context parallel", phase, whole)


def _experts(
    c: DeepseekConfig, layout: ParallelLayout, setup: TrainingSetup, tokens: int, per_node: int
) -> Iterator[Transfer]:
    """Yields dispatch and combine: one row to each other node that serves a token, from there one to each rank.

    Ranks of a tensor-parallel group have the same tokens and send a part of them each.
    """
    group = layout.ep * layout.etp
    if group == 1:
        return
    row = expert_row(c.hidden_size, c.num_experts_per_tok or 0, BF16, 1 + 4 / 128 if setup.precision == "fp8" else None)
    experts = c.n_routed_experts or 0
    ranks = expected_targets(c, even_parts(experts, layout.ep)) * layout.etp
    nodes = -(-group // per_node)
    rows = {"nvlink": ranks * (1 - 1 / min(group, per_node))}
    if nodes > 1:
        rows["network"] = expected_targets(c, even_parts(experts, nodes)) * (1 - 1 / nodes)
    for link, count in rows.items():
        sent = count * tokens / layout.tp
        yield Transfer("expert dispatch", link, "forward", sent * row.dispatch)
        yield Transfer("expert combine", link, "forward", sent * row.combine)
        yield Transfer("expert combine", link, "backward", sent * row.combine_backward)
        yield Transfer("expert dispatch", link, "backward", sent * row.dispatch_backward)


def _sharded(
    parameters: Sequence[Parameter], layout: ParallelLayout, setup: TrainingSetup, per_node: int
) -> Iterator[Transfer]:
    """Yields FSDP's collectives of a micro-batch: weights gathered twice (ZeRO-3), gradients reduced (ZeRO-2, 3)."""
    for routed, axis, size in _shard_groups(layout):
        count = elements(parameters, routed)
        if setup.zero == 3:
            for phase in ("forward", "backward"):
                nbytes = setup.weight_bytes * count
                yield from _ring(layout, axis, size, per_node, "weight gathering", phase, nbytes)
        if setup.zero >= 2:
            nbytes = setup.gradient_bytes * count
            yield from _ring(layout, axis, size, per_node, "gradient reduction", "backward", nbytes)


def _shard_groups(layout: ParallelLayout) -> tuple[tuple[bool, str, int], ...]:
    """Returns for dense and routed parameters the innermost axis and the size of the group that shares them.

    dp_shard and cp are neighbours in the mesh: together one group with cp's stride.
    """
    return (False, "cp", layout.dense_shards), (True, "edp", layout.edp)


# ------------------------------------------------------------------- of one step


def step_traffic(
    config: DeepseekConfig,
    layout: ParallelLayout,
    setup: TrainingSetup,
    per_node: int,
    stages: list[range],
    pp_rank: int,
) -> list[Transfer]:
    """Returns what one device of pipeline rank `pp_rank` sends in a step; `stages` are the layers of every stage."""
    micro_batches = setup.micro_batches(layout)
    # DualPipe feeds half of the micro-batches from each end, so each of a rank's two stages sees half of them.
    passes = micro_batches // 2 if setup.schedule == "dualpipe" else micro_batches
    held = rank_stages(setup.schedule, layout.pp, pp_rank, setup.chunks)
    layers = per_layer(config, lambda i: layer_traffic(config, i, layout, setup, per_node))
    out: list[Transfer] = []
    for stage in held:
        first, last = stage == 0, stage == len(stages) - 1
        out += (transfer for layer_idx in stages[stage] for transfer in layers[layer_idx])
        out += end_traffic(config, layout, setup, per_node, first, last)
    out = [transfer._replace(nbytes=transfer.nbytes * passes) for transfer in out]
    out += _pipeline(config, layout, setup, per_node, pp_rank, held, passes)
    return out + list(_once_a_step(config, layout, setup, per_node, stages, held))


def end_traffic(
    c: DeepseekConfig, layout: ParallelLayout, setup: TrainingSetup, per_node: int, first: bool, last: bool
) -> Iterator[Transfer]:
    """Yields what a micro-batch sends for embedding and heads, those of the first and the last stage.

    Cut by vocabulary they need all-reduces of the looked-up rows, of the gradient of the head's input, and of the loss
    a maximum, a sum and the target's logit of each token, never the logits.
    """
    depth, tokens = c.num_nextn_predict_layers, setup.tokens(layout)
    yield from _sharded(end_parameters(c, layout, first, last), layout, setup, per_node)
    rows = 2 * BF16 * tokens * c.hidden_size
    lookups = int(first) + (depth if last else 0)
    yield from _ring(layout, "tp", layout.tp, per_node, "tensor parallel", "forward", rows * lookups)
    if last:
        heads = 1 + depth
        losses = 2 * 3 * 4 * tokens * heads
        yield from _ring(layout, "tp", layout.tp, per_node, "tensor parallel", "forward", losses)
        yield from _ring(layout, "tp", layout.tp, per_node, "tensor parallel", "backward", rows * heads)


def _between_stages(layout: ParallelLayout, per_node: int) -> str:
    return "nvlink" if layout.stride("pp") * layout.pp <= per_node else "network"


def _pipeline(
    c: DeepseekConfig,
    layout: ParallelLayout,
    setup: TrainingSetup,
    per_node: int,
    pp_rank: int,
    held: tuple[int, ...],
    passes: int,
) -> Iterator[Transfer]:
    if layout.pp == 1:
        return
    stages = stage_count(setup.schedule, layout.pp, setup.chunks)
    link = _between_stages(layout, per_node)
    activation = BF16 * setup.tokens(layout) * c.hidden_size * passes
    # The turning point of a V is within one rank.
    turns = setup.schedule in ("zbv", "dualpipev") and pp_rank == layout.pp - 1
    forward = sum(stage < stages - 1 for stage in held) - turns
    backward = sum(stage > 0 for stage in held) - turns
    yield Transfer("pipeline", link, "forward", activation * forward)
    yield Transfer("pipeline", link, "backward", activation * backward)


def _once_a_step(
    c: DeepseekConfig,
    layout: ParallelLayout,
    setup: TrainingSetup,
    per_node: int,
    stages: list[range],
    held: tuple[int, ...],
) -> Iterator[Transfer]:
    """Yields the exchange of gradients and weights over data-parallel ranks, and between copies of parameters.

    What ZeRO-2 and 3 reduce, and ZeRO-3 gathers, has travelled in every micro-batch. DualPipe holds every stage twice,
    others may hold the embedding twice: the gradients of both copies are added, each rank's shard with that of its
    counterpart.
    """
    first, last = 0 in held, len(stages) - 1 in held
    layers = per_layer(c, lambda i: layer_parameters(c, i, layout))
    parameters = [*end_parameters(c, layout, first, last), *(p for s in held for i in stages[s] for p in layers[i])]
    for routed, axis, size in _shard_groups(layout):
        count = elements(parameters, routed)
        if setup.zero == 1:
            nbytes = setup.gradient_bytes * count
            yield from _ring(layout, axis, size, per_node, "gradient reduction", "step", nbytes)
        if setup.zero < 3:
            nbytes = setup.weight_bytes * count
            yield from _ring(layout, axis, size, per_node, "weight gathering", "step", nbytes)
        shard = 2 * setup.gradient_bytes * count / size
        yield from _ring(layout, "dp_replicate", layout.dp_replicate, per_node, "gradient reduction", "step", shard)
        if setup.schedule == "dualpipe":
            yield Transfer("stage copies", _between_stages(layout, per_node), "step", ring_bytes(shard, 2))
    shared = c.num_nextn_predict_layers or c.tie_word_embeddings
    if shared and first != last:
        rows = c.vocab_size // layout.tp
        both = 2 * setup.gradient_bytes * rows * c.hidden_size / layout.dense_shards
        yield Transfer("shared embedding", _between_stages(layout, per_node), "step", ring_bytes(both, 2))


def total_by(transfers: Iterable[Transfer], *fields: str) -> dict[tuple[str, ...], float]:
    """Returns summed bytes by the values of `fields`, in the order of their first appearance."""
    out: dict[tuple[str, ...], float] = {}
    for transfer in transfers:
        key = tuple(getattr(transfer, name) for name in fields)
        out[key] = out.get(key, 0.0) + transfer.nbytes
    return out
