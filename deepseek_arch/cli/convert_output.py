"""Output of `deepseek-arch convert --dry-run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from .tables import facts_table, new_table, scaled

if TYPE_CHECKING:
    from ..checkpoint import ConversionPlan

__all__ = ["print_conversion"]

_DTYPES = {"F8_E4M3": "FP8"}


def print_conversion(plan: ConversionPlan) -> None:
    """Prints what each kind of tensor becomes, and the disk and memory that it takes."""
    console = Console()
    table = new_table(f"{plan.source.folder} -> {plan.out}", "tensors", "", "from", "to", "bytes read", "bytes written")
    for (part, old, new), (count, read, written) in plan.classes.items():
        names = (_DTYPES.get(dtype, dtype) for dtype in (old, new))
        table.add_row(part.replace("_", " "), f"{count:,}", *names, f"{read:,}", f"{written:,}")
    table.add_section()
    count = sum(plan.actions.values())
    table.add_row("in all", f"{count:,}", "", "", f"{plan.bytes_read:,}", f"{plan.bytes_written:,}")
    console.print(table)
    enough = "" if plan.disk_needed <= plan.disk_free else ", too little"
    facts = {
        "experts": "one tensor for a layer and projection" if plan.stacked else "one tensor each",
        "files": f"{len(plan.shards):,}, the largest {scaled(max(plan.shard_bytes), 'B')}",
        "disk needed": f"{scaled(plan.disk_needed, 'B')}; free: {scaled(plan.disk_free, 'B')}{enough}",
        "memory needed": f"{scaled(plan.memory_needed, 'B')} beside PyTorch",
    }
    if plan.finished:
        facts["files there already"] = f"{len(plan.finished):,} of an interrupted conversion, which would go on"
    console.print(facts_table("to write", facts))
    for warning in plan.source.warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}")
