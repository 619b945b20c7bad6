"""Cutting of a model's layers into pipeline stages, and what each schedule needs; nothing here imports PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config.deepseek_config import DeepseekConfig
from ..layout.parallel_layout import LayoutError, ParallelLayout
from ..planning.shards import layer_parameters
from ..planning.timing import cut_layers

__all__ = ["Schedule", "StagePlan", "check_microbatches", "plan_stages", "schedule_of"]


@dataclass(frozen=True)
class Schedule:
    """One of torch's pipeline schedules.

    Attributes:
        name: of torch's class, without "Schedule".
        stages_per_rank: what it takes by default; fixed: whether it takes no other number.
        folded: stages go from the first rank to the last and back, so that the first rank has both ends.
        splits: gradients of inputs and of weights are computed in two passes (zero-bubble schedules).
    """

    name: str
    stages_per_rank: int = 1
    fixed: bool = True
    folded: bool = False
    splits: bool = False


_SCHEDULES = {
    "GPipe": Schedule("GPipe"),
    "1F1B": Schedule("1F1B"),
    "Interleaved1F1B": Schedule("Interleaved1F1B", 2, fixed=False),
    "ZBH1": Schedule("InterleavedZeroBubble", splits=True),
    "InterleavedZeroBubble": Schedule("InterleavedZeroBubble", 2, fixed=False, splits=True),
    "ZBVZeroBubble": Schedule("ZBVZeroBubble", 2, folded=True, splits=True),
    "DualPipeV": Schedule("DualPipeV", 2, folded=True, splits=True),
}


@dataclass(frozen=True)
class StagePlan:
    """Stages of a model over the ranks of a pipeline.

    Attributes:
        pp: ranks.
        layers: decoder layers of each stage. The embedding is on the first one; the final norm, the head and MTP
            modules are on the last one.
        shares_embedding: the last stage has the embedding, too: MTP modules read it, or the head is tied to it.
    """

    schedule: Schedule
    pp: int
    layers: tuple[range, ...]
    shares_embedding: bool

    def held(self, pp_rank: int) -> tuple[int, ...]:
        """Returns the stages of a rank, first the one nearest the input."""
        if self.schedule.folded:
            return pp_rank, len(self.layers) - 1 - pp_rank
        return tuple(range(pp_rank, len(self.layers), self.pp))

    def stage_of(self, layer: int | None) -> int:
        """Returns the stage of a decoder layer; of an MTP module, and of None, the last one."""
        return next((i for i, layers in enumerate(self.layers) if layer in layers), len(self.layers) - 1)

    @property
    def last_rank(self) -> int:
        """The rank that holds the last stage; the first stage is on rank 0."""
        return 0 if self.schedule.folded else self.pp - 1


def schedule_of(name: str) -> Schedule:
    """Returns the schedule of a name, whose case does not matter.

    Raises:
        LayoutError: no such schedule.
    """
    by_lower = {known.lower(): schedule for known, schedule in _SCHEDULES.items()}
    if name.lower() not in by_lower:
        raise LayoutError(f"expected a schedule of {', '.join(_SCHEDULES)}, got {name!r}")
    return by_lower[name.lower()]


def plan_stages(
    config: DeepseekConfig, layout: ParallelLayout, schedule: str, stage_layers: Sequence[int] | None = None
) -> StagePlan:
    """Cuts the layers of a model into stages.

    Args:
        layout: with pp > 1.
        stage_layers: number of decoder layers of each stage; None cuts by the number of weights that a token meets,
            those of the head and of the MTP modules included.

    Raises:
        LayoutError: fewer layers than stages (the last one may do without), numbers that do not add up or do not fit
            the schedule, or layers that share a selection of keys with a layer of another stage.
    """
    kind, count = schedule_of(schedule), config.num_hidden_layers
    if layout.pp < 2:
        raise LayoutError(f"expected pp >= 2 for a pipeline, got {layout.pp}")
    if stage_layers is None:
        stages = cut_layers(*_costs(config, layout.pp * kind.stages_per_rank))
    else:
        stages = _given(list(stage_layers), kind, layout.pp, count)
    for stage in stages[1:]:
        first = stage.start  # an MTP module's where the last stage has no layer
        if config.is_sparse_attention and not config.has_indexer(first):
            raise LayoutError(
                f"expected stages to begin with a layer that selects its own keys, got layer {first}, which shares "
                "the selection of one before it"
            )
    tied = config.tie_word_embeddings
    return StagePlan(kind, layout.pp, stages, bool(config.num_nextn_predict_layers or tied))


def _costs(c: DeepseekConfig, stages: int) -> tuple[tuple[float, ...], float, tuple[float, ...]]:
    """Returns what a token costs in each layer, in what follows them, and, as the aim, in each stage."""
    whole = ParallelLayout(dp_shard=1)
    share = (c.num_experts_per_tok or 0) / (c.n_routed_experts or 1)

    def cost(layer: int) -> float:
        return sum(p.elements * (share if p.routed else 1.0) for p in layer_parameters(c, layer, whole))

    count, depth = c.num_hidden_layers, c.num_nextn_predict_layers
    layers = tuple(cost(layer) for layer in range(count))
    last = (1 + depth) * float(c.vocab_size * c.hidden_size) + sum(cost(count + k) for k in range(depth))
    return layers, last, ((sum(layers) + last) / stages,) * stages


def _given(counts: list[int], kind: Schedule, pp: int, layers: int) -> tuple[range, ...]:
    per_rank, rest = divmod(len(counts), pp)
    fits = per_rank == kind.stages_per_rank or (not kind.fixed and per_rank >= 1)
    if rest or not fits:
        wanted = f"{kind.stages_per_rank} x" if kind.fixed else "a multiple of"
        raise LayoutError(f"expected stage_layers of {wanted} pp = {pp} stages for {kind.name}, got {len(counts)}")
    whole = all(isinstance(count, int) and not isinstance(count, bool) for count in counts)
    if not whole or min(counts[:-1]) < 1 or counts[-1] < 0 or sum(counts) != layers:
        raise LayoutError(
            f"expected stage_layers of at least one layer each (the last stage may have none), {layers} in all, "
            f"got {counts}"
        )
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return tuple(range(end - size, end) for end, size in zip(ends, counts, strict=True))


def check_microbatches(plan: StagePlan, microbatches: int) -> None:
    """Checks what the schedule needs of the number of microbatches.

    Raises:
        LayoutError: too few, or a number that the schedule cannot divide.
    """
    name, stages, pp = plan.schedule.name, len(plan.layers), plan.pp
    if microbatches < 1:
        raise LayoutError(f"expected microbatches >= 1, got {microbatches}")
    if name in ("1F1B", "DualPipeV") and microbatches < stages:
        raise LayoutError(f"expected at least {stages} microbatches, one a stage, for {name}, got {microbatches}")
    rounds = max(1, microbatches // pp)
    if name in ("Interleaved1F1B", "InterleavedZeroBubble") and microbatches % rounds:
        raise LayoutError(
            f"expected microbatches in multiples of their {rounds} rounds (microbatches // pp) for {name}, got "
            f"{microbatches}"
        )
