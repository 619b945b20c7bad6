"""Shapes of the parameters that one rank holds, from the config and the layout alone.

Heads, MLP columns and the vocabulary are cut by `tp`, routed experts by `ep` and their columns by `etp`; everything
else is whole on every rank. FSDP then cuts dimension 0 of each parameter, or dimension 1 of stacked experts where a
rank would hold fewer experts than there are shards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from ..config.deepseek_config import DeepseekConfig
from ..layout.parallel_layout import ParallelLayout
from ..layout.published_tensors import Weight, layer_weights, mtp_weights

__all__ = [
    "Parameter",
    "elements",
    "end_parameters",
    "expert_shard_dim",
    "layer_parameters",
    "per_layer",
    "shard_elements",
    "sharded_elements",
]

T = TypeVar("T")

_ROWS = ("q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj")
_COLUMNS = ("o_proj", "down_proj")


class Parameter(NamedTuple):
    """One parameter, or buffer, as a rank holds it before FSDP.

    Attributes:
        name: below its layer; routed experts are stacked, gate and up in one tensor.
        shape: this rank's part.
        routed: a routed expert's, on the experts' mesh.
        kind: as in `published_tensors`: projection, norm, float32 (a buffer, never sharded) or plain.
    """

    name: str
    shape: tuple[int, ...]
    routed: bool = False
    kind: str = "plain"

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def _cut(weight: Weight, tp: int) -> Parameter:
    module = weight.name.split(".")[-2]
    rows, *rest = weight.shape
    if module in _ROWS:
        return Parameter(weight.name, (rows // tp, *rest), kind=weight.kind)
    if module in _COLUMNS and rest:
        return Parameter(weight.name, (rows, rest[0] // tp), kind=weight.kind)
    return Parameter(weight.name, weight.shape, kind=weight.kind)


def layer_parameters(config: DeepseekConfig, layer_idx: int, layout: ParallelLayout) -> list[Parameter]:
    """Returns what a rank holds of decoder layer `layer_idx`; a prediction layer's own tensors are included."""
    weights = list(layer_weights(config, layer_idx))
    if layer_idx >= config.num_hidden_layers:
        weights += [weight for weight in mtp_weights(config) if weight.part != "duplicate"]
    out = [_cut(weight, layout.tp) for weight in weights if weight.part != "experts"]
    if config.is_moe_layer(layer_idx):
        local = (config.n_routed_experts or 0) // layout.ep
        width = (config.moe_intermediate_size or 0) // layout.etp
        hidden = config.hidden_size
        out.append(Parameter("mlp.experts.gate_up_proj", (local, 2 * width, hidden), True, "projection"))
        out.append(Parameter("mlp.experts.down_proj", (local, hidden, width), True, "projection"))
    return out


def end_parameters(config: DeepseekConfig, layout: ParallelLayout, first: bool, last: bool) -> list[Parameter]:
    """Returns what a rank holds beside decoder layers, if it runs the first or the last stage, or both.

    The last stage needs the embedding where the head is tied to it or prediction layers read it: a copy, if the first
    stage is elsewhere.
    """
    vocabulary = (config.vocab_size // layout.tp, config.hidden_size)
    out = []
    if first or (last and (config.tie_word_embeddings or config.num_nextn_predict_layers)):
        out.append(Parameter("model.embed_tokens.weight", vocabulary))
    if last:
        out.append(Parameter("model.norm.weight", (config.hidden_size,), kind="norm"))
        if not config.tie_word_embeddings:
            out.append(Parameter("lm_head.weight", vocabulary))
    return out


def per_layer(config: DeepseekConfig, of: Callable[[int], T]) -> list[T]:
    """Returns `of(layer_idx)` for every decoder and prediction layer, called once for each kind of layer."""
    made: dict[tuple[bool, bool, bool], T] = {}
    out = []
    for layer_idx in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        kind = config.is_moe_layer(layer_idx), config.has_indexer(layer_idx), layer_idx >= config.num_hidden_layers
        if kind not in made:
            made[kind] = of(layer_idx)
        out.append(made[kind])
    return out


def elements(parameters: Iterable[Parameter], routed: bool) -> int:
    """Returns the elements of all routed experts, or of everything else."""
    return sum(parameter.elements for parameter in parameters if parameter.routed == routed)


def shard_elements(shape: tuple[int, ...], shards: int, index: int, dim: int = 0) -> int:
    """Returns the elements of shard `index` of a tensor cut along `dim`, without padding.

    Parts are those of `torch.chunk`: ceil(rows / shards) rows each, fewer or none in the last ones.
    """
    rows = -(-shape[dim] // shards)
    mine = min(rows, max(0, shape[dim] - index * rows))
    return math.prod(shape) // shape[dim] * mine


def expert_shard_dim(config: DeepseekConfig, layout: ParallelLayout) -> int:
    """Returns the dimension of stacked experts that FSDP cuts: 1 where a rank has fewer experts than shards."""
    local = (config.n_routed_experts or 0) // layout.ep
    return 1 if layout.edp > local else 0


def sharded_elements(
    config: DeepseekConfig, layout: ParallelLayout, parameters: Iterable[Parameter], rank: int
) -> Iterator[int]:
    """Yields the elements of each parameter that `rank` holds under FSDP; buffers stay whole."""
    at = layout.coordinates(rank)
    dense_index = at["dp_shard"] * layout.cp + at["cp"]
    for parameter in parameters:
        if parameter.kind == "float32":
            yield parameter.elements
        elif parameter.routed:
            yield shard_elements(parameter.shape, layout.edp, at["edp"], expert_shard_dim(config, layout))
        else:
            yield shard_elements(parameter.shape, layout.dense_shards, dense_index)
