"""Layout of experts and tokens in a program: static rules on shapes, which need neither Triton nor a GPU."""

from __future__ import annotations

from ...common.host import power_of_two

__all__ = ["places_of", "tokens_of"]

# Programs are one warp: reductions then stay inside it and need no barrier. A multiprocessor holds 32 programs, so that
# an H200 has room for about 4096 at once; beyond, each takes two tokens, or several short ones. More would spill.
_MOST_PROGRAMS = 4096


def tokens_of(tokens: int, width: int) -> int:
    """Returns the number of tokens that one program serves."""
    return 1 if tokens <= _MOST_PROGRAMS else max(2, 256 // width)


def places_of(experts: int, n_group: int, topk_group: int) -> dict[str, int]:
    """Returns the kernel's constants for the groups, which matter to the layout only if some are left out."""
    groups = n_group if topk_group < n_group else 1
    blocks = {"GROUP_BLOCK": power_of_two(groups), "WIDTH": power_of_two(experts // groups)}
    return {"GROUPS": groups, "KEPT": min(topk_group, groups), **blocks}
