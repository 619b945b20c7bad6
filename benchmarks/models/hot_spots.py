"""The operators that take most of the time, by their own CPU time."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

__all__ = ["hot_spots"]


def hot_spots(action: Callable[[], object], *, runs: int = 1, top: int = 8) -> str:
    """Profiles `action` after one run that does not count.

    Returns:
        a line with the total per run, then one per operator: share, milliseconds and calls per run, name.
    """
    action()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(runs):
            action()
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    lines = [f"{total / runs / 1e3:,.1f} ms a run"]
    for event in events[:top]:
        time = event.self_cpu_time_total
        lines.append(f"{time / total:6.1%} {time / runs / 1e3:10,.1f} ms {event.count / runs:6.0f} calls  {event.key}")
    return "\n".join(lines)
