"""Published tensor names <-> our parameters.

`published_tensors` lists what a published checkpoint holds; this file says where each of those tensors lives in a
`DeepseekLM`. Most have the same name in both. The exceptions are the tables below: experts, one tensor each in the
files, are stacked; MTP modules, `model.layers.{num_hidden_layers + k}` in the files, are `mtp.{k}`;
and the files repeat the embedding and the head in each of those.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ..config.deepseek_config import DeepseekConfig
from .published_tensors import Weight, layer_weights, mtp_weights, published_dtype
from .subset import Subset, select_subset

__all__ = ["TensorSlot", "is_stray", "layer_of", "layout", "scale_name"]

# Published name below its layer -> stacked parameter [E, ...] and which of its parts [E, part of the rows, ...].
_STACKED = {
    "mlp.experts.{expert}.gate_proj.weight": ("mlp.experts.gate_up_proj", 0),
    "mlp.experts.{expert}.up_proj.weight": ("mlp.experts.gate_up_proj", 1),
    "mlp.experts.{expert}.down_proj.weight": ("mlp.experts.down_proj", 0),
}
# Published name below a MTP module -> the main model's tensor that it repeats.
_REPEATED = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
# First dimension = experts: selecting fewer experts takes fewer rows.
_PER_EXPERT_ROWS = ("mlp.gate.weight", "mlp.gate.e_score_correction_bias")


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """One published tensor and its place in the model.

    Attributes:
        name: its name in the checkpoint that is read.
        shape: its shape there.
        rows: how many of its leading rows belong to the model; fewer than `shape[0]` when experts are left out.
        new_name: its name in a published checkpoint of the model itself; differs when layers are left out.
        parameter: the entry of the model's state dict that holds it.
        index: where in a stacked parameter: expert, first row, end row. None for the whole parameter.
        fp8: stored as FP8 in an FP8 checkpoint.
        float32: stored as float32 in every published checkpoint, whatever the model's dtype (V3.2's norms).
        repeats: a second copy of what `parameter` holds already: compared, not loaded, and allowed to be absent.
    """

    name: str
    shape: tuple[int, ...]
    rows: int
    new_name: str
    parameter: str
    index: tuple[int, int, int] | None = None
    fp8: bool = False
    float32: bool = False
    repeats: bool = False

    @property
    def stack(self) -> str | None:
        """Name of the tensor that this one is part of in a checkpoint that stacks the experts of a layer.

        transformers 5 writes `mlp.experts.gate_up_proj` [E, 2I, H], each expert's gate rows above its up rows, and
        `mlp.experts.down_proj` [E, H, I]. The layer's number is the checkpoint's. None for what is never stacked.
        """
        if self.index is None:
            return None
        return f"{self.name.partition('.experts.')[0]}.experts.{self.parameter.rpartition('.')[2]}"

    @property
    def parts_per_expert(self) -> int:
        """Number of published tensors of one expert in the stacked tensor: 2 for gate above up, else 1."""
        return 2 if self.parameter.endswith(".gate_up_proj") else 1

    @property
    def stack_position(self) -> int:
        """Position among the published tensors of the stacked one, in the order of their bytes."""
        assert self.index is not None
        expert, first, end = self.index
        return expert * self.parts_per_expert + first // (end - first)

    def stack_shape(self, experts: int, block_size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """Shape of the stacked tensor of `experts` experts; with a `block_size`, of its FP8 scales.

        Gate and up have a grid of blocks each, so that no block reaches from one into the other where I is no multiple
        of the block.
        """
        rows, columns = self.shape
        if block_size is not None:
            rows, columns = -(-rows // block_size[0]), -(-columns // block_size[1])
        return experts, self.parts_per_expert * rows, columns

    def of(self, state: dict[str, Tensor]) -> Tensor:
        """Returns the view of the model's tensors that this published tensor fills, [rows, ...]."""
        tensor = state[self.parameter]
        if self.index is None:
            return tensor
        expert, first, end = self.index
        return tensor[expert, first:end]

    def scale_of(self, state: dict[str, Tensor], block_rows: int) -> Tensor:
        """Returns the view of the model's scales for this published tensor, where `parameter` is in FP8.

        Stacked parts (gate above up) have a grid of scales each, of as many rows as the tensor alone would have.
        """
        scale = state[scale_name(self.parameter)]
        if self.index is None:
            return scale
        expert, first, end = self.index
        part, down = first // (end - first), -(-(end - first) // block_rows)
        return scale[expert, part * down : (part + 1) * down]


def layout(chosen: Subset | DeepseekConfig) -> Iterator[TensorSlot]:
    """Yields every published tensor of a model, or of part of one, without FP8 scales (see `scale_name`)."""
    chosen = select_subset(chosen) if isinstance(chosen, DeepseekConfig) else chosen
    c = chosen.source
    for name, shape in (
        ("model.embed_tokens.weight", (c.vocab_size, c.hidden_size)),
        ("model.norm.weight", (c.hidden_size,)),
        ("lm_head.weight", (c.vocab_size, c.hidden_size)),
    ):
        tied = name == "lm_head.weight" and c.tie_word_embeddings
        parameter = "model.embed_tokens.weight" if tied else name
        wide = name == "model.norm.weight" and published_dtype(c, "norm", False) == "F32"
        yield TensorSlot(name, shape, shape[0], name, parameter, float32=wide, repeats=tied)
    for layer, new_layer in chosen.layer_pairs:
        depth = layer - c.num_hidden_layers
        ours = f"model.layers.{new_layer}." if depth < 0 else f"mtp.{depth}."
        weights = [*layer_weights(c, layer), *(mtp_weights(c) if depth >= 0 else ())]
        for weight in weights:
            yield from _slots(weight, f"model.layers.{layer}.", f"model.layers.{new_layer}.", ours, chosen)


def _slots(weight: Weight, prefix: str, new_prefix: str, ours: str, chosen: Subset) -> Iterator[TensorSlot]:
    name, shape, fp8 = weight.name, weight.shape, weight.kind == "projection"
    if name in _STACKED:
        parameter, part = _STACKED[name]
        rows = shape[0]
        for expert in range(chosen.config.n_routed_experts or 0):
            below = name.format(expert=expert)
            index = (expert, part * rows, (part + 1) * rows)
            yield TensorSlot(prefix + below, shape, rows, new_prefix + below, ours + parameter, index, fp8)
    elif name in _REPEATED:
        parameter = _REPEATED[name]
        if parameter == "lm_head.weight" and chosen.source.tie_word_embeddings:
            parameter = "model.embed_tokens.weight"
        yield TensorSlot(prefix + name, shape, shape[0], new_prefix + name, parameter, repeats=True)
    else:
        rows = (chosen.config.n_routed_experts or 0) if name in _PER_EXPERT_ROWS else shape[0]
        wide = published_dtype(chosen.source, weight.kind, False) == "F32"
        yield TensorSlot(prefix + name, shape, rows, new_prefix + name, ours + name, None, fp8, wide)


def scale_name(name: str) -> str:
    """Returns the name of an FP8 weight's scales: `X.weight_scale_inv` beside `X.weight`, published or ours."""
    return f"{name}_scale_inv"


def layer_of(name: str) -> int | None:
    """Returns the L of a published name `model.layers.L...`, None for all others. Whole components only (TRAPS F7)."""
    parts = name.split(".")
    if parts[:2] == ["model", "layers"] and len(parts) > 3 and parts[2].isdecimal() and len(parts[2]) < 10:
        return int(parts[2])
    return None


def is_stray(name: str) -> bool:
    """Returns True for a rotary table: old V2 files and Kimi-K2's hold one per layer that nothing reads (TRAPS H2)."""
    return name.split(".")[-2:] == ["rotary_emb", "inv_freq"]
