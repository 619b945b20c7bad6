"""Layout of a model over many devices: sizes of the parallel axes, checked against a config before anything is built.

Two meshes share the devices of a pipeline stage. Attention, dense MLPs and shared experts use (dp_shard, cp, tp),
routed experts use (edp, ep, etp); both products are equal ("parallel folding", as in Megatron-Core and torchtitan).
Nothing here imports PyTorch, so that the planner and the command line start without it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..config.argument_types import check_types
from ..config.deepseek_config import DeepseekConfig

__all__ = ["AXES", "LayoutError", "ParallelLayout", "parse_axes"]

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "etp")


class LayoutError(ValueError):
    """A layout that does not fit its devices or its model; the message names everything that does not divide."""


def parse_axes(text: str) -> dict[str, int]:
    """Reads `pp=16,ep=64` as arguments of `ParallelLayout`.

    Raises:
        LayoutError: an axis is unknown, named twice, or no integer.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, re.split(r"[,\s]+", text)):
        match = re.fullmatch(r"(\w+)=(\d+)", part)
        if match is None or match[1] not in AXES or match[1] in sizes:
            raise LayoutError(f"expected axes such as pp=16,ep=64, each once, of {', '.join(AXES)}; got {part!r}")
        sizes[match[1]] = int(match[2])
    return sizes


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """Sizes of the parallel axes. Ranks count with tp innermost: (pp, dp_replicate, dp_shard, cp, tp).

    Attributes:
        pp: pipeline stages' ranks.
        dp_replicate: copies of the whole model that only exchange gradients.
        dp_shard: data-parallel ranks that share optimizer states (and, as planned or wrapped, gradients and weights).
            None stands for what the number of devices leaves; `for_devices` fills it in.
        cp: parts of every sequence.
        tp: parts of attention heads, MLP columns and the vocabulary.
        ep: parts of the list of routed experts.
        etp: parts of every routed expert's columns.

    Raises:
        LayoutError: a size is no positive integer, or `ep x etp` does not divide `dp_shard x cp x tp`.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int | None = None
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1

    def __post_init__(self) -> None:
        problems = []
        for name in AXES:
            size = getattr(self, name)
            if size is None and name == "dp_shard":
                continue
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                problems.append(f"expected {name} to be an integer >= 1, got {size!r}")
        if not problems and self.dp_shard is not None and self.dense_ranks % (self.ep * self.etp):
            problems.append(
                f"expected ep x etp to divide dp_shard x cp x tp = {self.dense_ranks}, "
                f"got {self.ep} x {self.etp} = {self.ep * self.etp}"
            )
        if problems:
            raise LayoutError("; ".join(problems))

    # ------------------------------------------------------------ construction

    @check_types
    def for_devices(self, devices: int) -> ParallelLayout:
        """Returns the layout over exactly `devices` devices, an open `dp_shard` filled in.

        Raises:
            LayoutError: the other axes do not divide `devices`, or their product with `dp_shard` differs from it.
        """
        others = self.pp * self.dp_replicate * self.cp * self.tp
        if self.dp_shard is not None:
            if others * self.dp_shard != devices:
                raise LayoutError(
                    f"expected pp x dp_replicate x dp_shard x cp x tp = {devices} devices, got {others * self.dp_shard}"
                )
            return self
        if devices < 1 or devices % others:
            raise LayoutError(f"expected pp x dp_replicate x cp x tp = {others} to divide {devices} devices")
        return dataclasses.replace(self, dp_shard=devices // others)

    # ----------------------------------------------------------------- derived

    @property
    def dense_ranks(self) -> int:
        """Ranks of one stage and replica: `dp_shard x cp x tp`, which is `edp x ep x etp` as well."""
        if self.dp_shard is None:
            raise LayoutError("expected dp_shard to be set (for_devices fills it in), got None")
        return self.dp_shard * self.cp * self.tp

    @property
    def world_size(self) -> int:
        """Number of devices."""
        return self.pp * self.dp_replicate * self.dense_ranks

    @property
    def dp(self) -> int:
        """Ranks that read different sequences: `dp_replicate x dp_shard`."""
        return self.dp_replicate * (self.dense_ranks // (self.cp * self.tp))

    @property
    def dense_shards(self) -> int:
        """Ranks that hold the same dense parameters and may share them: `dp_shard x cp`."""
        return self.dense_ranks // self.tp

    @property
    def edp(self) -> int:
        """Ranks that hold the same routed experts and may share them."""
        return self.dense_ranks // (self.ep * self.etp)

    @property
    def dense_mesh(self) -> dict[str, int]:
        """Names and sizes of the mesh of all parameters but routed experts', outermost axis first."""
        shard = self.dense_ranks // (self.cp * self.tp)
        return {
            "pp": self.pp,
            "dp_replicate": self.dp_replicate,
            "dp_shard": shard,
            "cp": self.cp,
            "tp": self.tp,
        }

    @property
    def expert_mesh(self) -> dict[str, int]:
        """Names and sizes of the routed experts' mesh over the same devices, outermost axis first."""
        return {
            "pp": self.pp,
            "dp_replicate": self.dp_replicate,
            "edp": self.edp,
            "ep": self.ep,
            "etp": self.etp,
        }

    @check_types
    def coordinates(self, rank: int) -> dict[str, int]:
        """Returns the position of `rank` along every axis of both meshes.

        Raises:
            LayoutError: no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise LayoutError(f"expected a rank from 0 to {self.world_size - 1}, got {rank}")
        out: dict[str, int] = {}
        for mesh in (self.dense_mesh, self.expert_mesh):
            rest = rank
            for name, size in reversed(mesh.items()):
                rest, out[name] = divmod(rest, size)
        return out

    @check_types
    def stride(self, axis: str) -> int:
        """Returns how many ranks apart neighbours along `axis` are: the product of the axes further in."""
        mesh = self.dense_mesh if axis in self.dense_mesh else self.expert_mesh
        names = list(mesh)
        if axis not in names:
            raise LayoutError(f"expected axis to be one of {', '.join((*self.dense_mesh, *names))}, got {axis!r:.200}")
        return math.prod(mesh[name] for name in names[names.index(axis) + 1 :])

    def __str__(self) -> str:
        sizes = {name: getattr(self, name) for name in AXES}
        named = [f"{name}={size}" for name, size in sizes.items() if size is not None and size > 1]
        return ",".join(named) or "one device"

    # --------------------------------------------------------------- validation

    @check_types
    def validate(
        self,
        config: DeepseekConfig,
        *,
        sequence: int | None = None,
        fp8_blocks: bool = False,
        redundant_experts: int = 0,
    ) -> None:
        """Checks that the model of `config` can be cut this way.

        Args:
            redundant_experts: copies of routed experts beyond one of each, which ranks share as well.
            sequence: tokens of a sequence, which context parallelism cuts into `2 x cp` equal chunks.
            fp8_blocks: the weights keep their published FP8 blocks, so that every cut must fall on a block's border.

        Raises:
            LayoutError: everything that does not divide, in one message.
        """
        problems = list(self._unequal_parts(config, redundant_experts))
        if sequence is not None and self.cp > 1 and sequence % (2 * self.cp):
            problems.append(f"expected 2 x cp = {2 * self.cp} to divide the sequence of {sequence} tokens")
        if not problems and fp8_blocks and config.weight_block_size is not None:
            problems += self._cut_blocks(config)
        if problems:
            raise LayoutError("; ".join(problems))

    def _unequal_parts(self, c: DeepseekConfig, redundant: int) -> Iterator[str]:
        if self.pp > c.num_hidden_layers + 1:
            yield (
                f"expected pp <= {c.num_hidden_layers + 1} ({c.num_hidden_layers} layers, and the head), got {self.pp}"
            )
        parts = [("tp", "num_attention_heads", c.num_attention_heads), ("tp", "vocab_size", c.vocab_size)]
        kinds = {c.is_moe_layer(i) for i in range(c.num_hidden_layers + c.num_nextn_predict_layers)}
        if False in kinds:
            parts.append(("tp", "intermediate_size", c.intermediate_size))
        if True in kinds:
            width = c.moe_intermediate_size or 0
            parts.append(("tp", "the shared experts' width", (c.n_shared_experts or 0) * width))
            experts = "n_routed_experts" + (" + redundant experts" if redundant else "")
            parts += [("ep", experts, (c.n_routed_experts or 0) + redundant), ("etp", "moe_intermediate_size", width)]
        elif self.ep * self.etp > 1:
            yield f"expected ep = etp = 1 for a model without routed experts, got {self.ep} and {self.etp}"
        for axis, name, size in parts:
            if size % getattr(self, axis):
                yield f"expected {axis} = {getattr(self, axis)} to divide {name} = {size}"

    def _cut_blocks(self, c: DeepseekConfig) -> Iterator[str]:
        """Yields the FP8 weights whose parts would begin inside a block: codes and scales must be cut alike."""
        assert c.weight_block_size is not None
        rows, columns = c.weight_block_size
        heads = c.num_attention_heads
        shared = (c.n_shared_experts or 0) * (c.moe_intermediate_size or 0)
        cuts = [
            ("tp", "q_b_proj rows" if c.q_lora_rank else "q_proj rows", heads * c.qk_head_dim, rows),
            ("tp", "kv_b_proj rows", heads * (c.qk_nope_head_dim + c.v_head_dim), rows),
            ("tp", "o_proj columns", heads * c.v_head_dim, columns),
        ]
        kinds = {c.is_moe_layer(i) for i in range(c.num_hidden_layers + c.num_nextn_predict_layers)}
        if False in kinds:
            cuts.append(("tp", "the dense MLP's width", c.intermediate_size, math.lcm(rows, columns)))
        if True in kinds:
            cuts.append(("tp", "the shared experts' width", shared, math.lcm(rows, columns)))
            cuts.append(("etp", "the routed experts' width", c.moe_intermediate_size or 0, math.lcm(rows, columns)))
        for axis, name, size, block in cuts:
            parts = getattr(self, axis)
            if parts > 1 and size // parts % block:
                yield (
                    f"expected {axis} = {parts} to cut {name} = {size} at borders of FP8 blocks of {block}, "
                    f"got parts of {size // parts}"
                )
