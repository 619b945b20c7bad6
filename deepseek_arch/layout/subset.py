"""Part of a model: which decoder layers, how many experts, with or without the MTP modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..config.deepseek_config import DeepseekConfig

__all__ = ["Subset", "select_subset"]


@dataclass(frozen=True)
class Subset:
    """Part of a checkpoint of `source`, and the config of the model that it makes.

    Attributes:
        source: the config of the whole checkpoint.
        config: the config of the part: layers renumbered from 0, experts and groups reduced.
        layers: the decoder layers taken, ascending, numbered as in `source`.
    """

    source: DeepseekConfig
    config: DeepseekConfig
    layers: tuple[int, ...]

    @property
    def layer_pairs(self) -> list[tuple[int, int]]:
        """Pairs (number in `source`, number in `config`) of each layer taken, MTP modules last."""
        first, first_kept = self.source.num_hidden_layers, self.config.num_hidden_layers
        depths = range(self.config.num_nextn_predict_layers)
        return [(layer, i) for i, layer in enumerate(self.layers)] + [(first + k, first_kept + k) for k in depths]


def select_subset(
    source: DeepseekConfig,
    layers: Iterable[int] | None = None,
    experts: int | None = None,
    mtp: bool = True,
) -> Subset:
    """Chooses part of a model.

    Args:
        layers: decoder layers to keep, ascending; None for all. They are renumbered from 0, and
            `first_k_dense_replace` becomes the number of dense layers among them.
        experts: keep the first so many routed experts of every layer; None for all. Where the router works in groups,
            the kept experts are whole groups, or lie within the first group, so that each group's score still means
            what it meant; `topk_group` and `num_experts_per_tok` shrink to what is left to choose from.
        mtp: keep the MTP modules.

    Raises:
        ValueError: layers that are out of range, repeated or not ascending, an expert count that cuts a group, a
            selection that no config can describe.
    """
    changes: dict[str, Any] = {}
    kept = tuple(range(source.num_hidden_layers)) if layers is None else _check_layers(source, layers)
    if len(kept) < source.num_hidden_layers:
        changes |= {"num_hidden_layers": len(kept), **_dense_prefix(source, kept), **_indexer_types(source, kept)}
    if experts is not None:
        changes |= _keep_experts(source, experts)
    if not mtp and source.num_nextn_predict_layers:
        changes["num_nextn_predict_layers"] = 0
    return Subset(source, source.replace(**changes) if changes else source, kept)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_layers(source: DeepseekConfig, layers: Iterable[int]) -> tuple[int, ...]:
    """Returns the layers to keep; stops at the first that cannot be, however many follow."""
    total, kept = source.num_hidden_layers, list[int]()
    each: Iterable[Any] = layers if isinstance(layers, Iterable) and not isinstance(layers, str | bytes) else (None,)
    for layer in each:
        if not _is_count(layer) or not 0 <= layer < total:
            shown = [*kept, layer] if isinstance(layers, Iterator) else layers
            raise ValueError(f"expected layers to be some of the numbers 0 to {total - 1}, got {shown!r:.200}")
        if kept and layer <= kept[-1]:
            raise ValueError(f"expected layers to be ascending, each once, got {[*kept, layer]!r:.200}")
        kept.append(layer)
    if not kept:
        raise ValueError(f"expected layers to be some of the numbers 0 to {total - 1}, got none")
    return tuple(kept)


def _dense_prefix(source: DeepseekConfig, kept: tuple[int, ...]) -> dict[str, Any]:
    """Returns the fields that say which of the renumbered layers are dense."""
    if not source.n_routed_experts:
        return {}
    experts = [source.is_moe_layer(layer) for layer in kept]
    dense = experts.index(True) if True in experts else len(kept)
    # Beyond the decoder layers the count goes on to say whether MTP modules are dense.
    beyond = max(0, source.first_k_dense_replace - source.num_hidden_layers) if dense == len(kept) else 0
    for frequency in (1, source.moe_layer_freq):
        if all(has == (i >= dense and i % frequency == 0) for i, has in enumerate(experts)):
            return {"first_k_dense_replace": dense + beyond, "moe_layer_freq": frequency}
    raise ValueError(
        f"expected layers {list(kept)} to have experts in a regular pattern once renumbered, got "
        f"{['experts' if has else 'dense' for has in experts]}"
    )


def _indexer_types(source: DeepseekConfig, kept: tuple[int, ...]) -> dict[str, Any]:
    """Returns the field that says which of the renumbered layers share the selection of keys of one before them."""
    if source.indexer_types is None:
        return {}
    last = None  # of the kept layers that select keys themselves
    for layer in kept:
        selects = max(i for i in range(layer + 1) if source.has_indexer(i))
        if selects == layer:
            last = layer
        elif selects != last:
            raise ValueError(
                f"expected layers with layer {selects} among them, whose selection of keys layer {layer} shares, "
                f"got {list(kept)!r:.200}"
            )
    return {"indexer_types": tuple(source.indexer_types[layer] for layer in kept)}


def _keep_experts(source: DeepseekConfig, experts: int) -> dict[str, Any]:
    total = source.n_routed_experts
    if not total:
        raise ValueError(f"expected experts=None for a model without routed experts, got {experts!r}")
    if not _is_count(experts) or not 1 <= experts <= total:
        raise ValueError(f"expected experts between 1 and {total}, got {experts!r}")
    groups = 1 if source.topk_method == "greedy" else source.n_group or 1
    per_group = total // groups
    if experts > per_group and experts % per_group:
        raise ValueError(
            f"expected experts to be at most {per_group} (one group) or whole groups "
            f"({', '.join(str(n) for n in range(2 * per_group, total + 1, per_group))}), got {experts}"
        )
    kept_groups = max(1, experts // per_group)
    topk_group = min(source.topk_group or 1, kept_groups) if groups > 1 else 1
    choices = topk_group * (experts // kept_groups)
    changes: dict[str, Any] = {
        "n_routed_experts": experts,
        "num_experts_per_tok": min(source.num_experts_per_tok or 1, choices),
    }
    return changes | ({"n_group": kept_groups, "topk_group": topk_group} if groups > 1 else {})
