"""Sizes of parts that a model may lack, without the None that its config has then."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ExpertSizes", "IndexerSizes"]


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """Sizes of the mixture of experts of a config that has one; none is None.

    Attributes:
        routed: `n_routed_experts`, E; chosen: `num_experts_per_tok`, K; width: `moe_intermediate_size` of each.
        shared_width: intermediate size of all shared experts together, which are one MLP; 0 without any.
        groups, kept_groups: `n_group` and `topk_group`; 1 and 1 without group-limited routing.
    """

    routed: int
    chosen: int
    width: int
    shared_width: int
    groups: int
    kept_groups: int


@dataclass(frozen=True, slots=True)
class IndexerSizes:
    """Sizes of sparse attention's indexer: `index_n_heads`, `index_head_dim`, and the `index_topk` keys of a query."""

    heads: int
    head_dim: int
    topk: int
