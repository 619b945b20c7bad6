"""Rows of the report: a quantity each, with a column for each layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import deepseek_arch as da
from deepseek_arch.layout.accounting import flops_per_token

from ..core.report import Row, Samples
from .contestants import Contestant
from .figures import bandwidth, mfu
from .measure import Measured

__all__ = ["Planned", "rows_of"]

MS, MB, GB = 1e3, 1e-6, 1e-9
# gloo runs a reduce-scatter as an all-reduce, and so the profiler calls it: their bytes are timed together.
_TIMED_AS = {"reduce_scatter": "all_reduce"}


@dataclass(frozen=True)
class Planned:
    """The planner's figures of one layout.

    Attributes:
        memory: bytes by kind of each pipeline rank; None for a schedule that it does not know.
        seconds: of a step; peak: FLOP/s of the device; details: the whole plan. None for a device without rates.
    """

    memory: Sequence[Mapping[str, int]] | None = None
    seconds: float | None = None
    peak: float | None = None
    details: Mapping[str, Any] | None = None


def rows_of(
    rows: Sequence[Row],
    contestant: Contestant,
    measured: Measured,
    planned: Planned,
    config: da.DeepseekConfig,
    batch: int,
    sequence: int,
) -> list[Row]:
    """Returns `rows` with the figures of one more layout, of steps of `batch` rows of `sequence` tokens."""
    found: dict[tuple[str, str, str], Iterable[float]] = {
        ("loss of the first step", "nats", "lower"): [measured.first_loss],
        ("norm of its gradients", "1", "lower"): [measured.first_norm],
    }
    layout = contestant.layout
    if measured.seconds:
        found["training step", "ms", "lower"] = [MS * s for s in measured.seconds]
        if planned.seconds is not None:
            found["training step, planned", "ms", "lower"] = [MS * planned.seconds]
        rates = [batch * sequence / s for s in measured.seconds]
        found["training, all devices", "tokens/s", "higher"] = rates
        if planned.peak is not None:
            flops = flops_per_token(config, sequence, training=True, mtp=bool(config.num_nextn_predict_layers))
            shares = (mfu(flops, rate, layout.world_size, planned.peak) for rate in rates)
            found["model FLOP utilization", "%", "higher"] = [100 * share for share in shares]
    if measured.memory:
        found["peak memory of the fullest rank", "MB", "lower"] = [MB * max(measured.memory)]
        if planned.memory is not None:
            found["peak memory, planned", "MB", "lower"] = [MB * max(sum(each.values()) for each in planned.memory)]
    found |= _communication(measured)
    if measured.bubbles:
        found["pipeline bubble, mean of ranks", "%", "lower"] = [100 * sum(measured.bubbles) / len(measured.bubbles)]
    if measured.simulated is not None:
        found["pipeline bubble, simulated", "%", "lower"] = [100 * measured.simulated]
    for way, seconds in measured.dispatches.items():
        found[f"training step, dispatch by {way}", "ms", "lower"] = [MS * s for s in seconds]
    if measured.decoding:
        found["decoding, all devices", "tokens/s", "higher"] = measured.decoding
    return _merged(rows, contestant.name, found)


def _communication(measured: Measured) -> dict[tuple[str, str, str], Iterable[float]]:
    """Returns bytes of the rank that sends most, and times of the ranks' mean."""
    found: dict[tuple[str, str, str], Iterable[float]] = {}
    totals = _largest(measured.sent)
    for kind, nbytes in totals.items():
        found[f"sent by {kind}", "MB", "lower"] = [MB * nbytes]
    if not measured.overlaps:
        return found
    count = len(measured.overlaps)
    for name, share in (("exposed", "exposed"), ("overlapped", "overlapped"), ("idle", "idle")):
        label = f"communication {name}" if name != "idle" else "neither computing nor communication"
        better = "higher" if name == "overlapped" else "lower"
        found[label, "ms", better] = [MS * sum(getattr(each, share) for each in measured.overlaps) / count]
    seconds: dict[str, float] = {}
    for kind in {kind for each in measured.overlaps for kind in each.by_kind}:
        seconds[kind] = sum(each.by_kind.get(kind, 0.0) for each in measured.overlaps) / count
    joint: dict[str, float] = {}
    for kind, nbytes in totals.items():
        known = kind if kind in seconds else _TIMED_AS.get(kind, kind)
        joint[known] = joint.get(known, 0.0) + nbytes
    for kind, rate in bandwidth(joint, seconds).items():
        found[f"bandwidth of {kind}", "GB/s", "higher"] = [GB * rate]
    return found


def _largest(ranks: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Returns the bytes by kind of the rank that sends most of each."""
    kinds = dict.fromkeys(kind for each in ranks for kind in each)
    return {kind: max(each.get(kind, 0) for each in ranks) for kind in kinds}


def _merged(rows: Sequence[Row], name: str, found: Mapping[tuple[str, str, str], Iterable[float]]) -> list[Row]:
    """Returns the rows with one more column, new rows behind those that there are."""
    by_name = {row.name: row for row in rows}
    for (title, unit, better), values in found.items():
        row: Any = by_name.get(title) or Row(title, unit, better, {})
        by_name[title] = dataclasses.replace(row, results={**row.results, name: Samples(tuple(values))})
    return list(by_name.values())
