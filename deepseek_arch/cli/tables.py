"""The command line's tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from ..checkpoint import CheckpointReport
    from ..config.deepseek_config import DeepseekConfig
    from .memory_plan import Fit, MemoryPlan

__all__ = [
    "facts_table",
    "new_table",
    "print_doctor",
    "print_inspection",
    "print_plan",
    "print_presets",
    "scaled",
]

_SHOWN = 20  # problems of a kind before the rest is only counted


def scaled(value: float, unit: str = "", prefixes: str = " kMGT") -> str:
    """Returns four digits of a number in decimal units: 671_026_419_200 bytes -> "671.0 GB"."""
    steps = 0
    while abs(value) >= 999.95 and steps + 1 < len(prefixes):
        value, steps = value / 1000, steps + 1
    digits = 0 if steps == 0 else max(0, 3 - len(str(int(value))) + 1)
    return f"{value:,.{digits}f} {prefixes[steps].strip()}{unit}".rstrip()


def _count(value: int) -> str:
    """Returns four digits of a count, in the field's thousand, million, billion."""
    return scaled(value, prefixes=" kMBT").replace(" ", "")


def new_table(title: str, *columns: str) -> Table:
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def facts_table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=escape(title), title_justify="left", title_style="bold", show_header=False)
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table


def print_plan(model: str, plan: MemoryPlan) -> None:
    """Prints parameters, FLOPs, cache, weights, and the devices that they fit on."""
    console, count = Console(), plan.parameters
    table = new_table(f"{model}: parameters", "", "exact", "")
    rows = {
        "main model": count.total,
        "activated by a token": count.activated,
        "  without the embedding": count.activated_without_embedding,
        "  without embedding and head": count.activated_without_embedding_and_head,
        "multi-token prediction": count.mtp,
        "embedding": count.embedding,
        f"attention, x {count.dense_layers + count.moe_layers}": count.attention,
        f"indexer, x {count.indexers}": count.indexer,
        f"dense MLP, x {count.dense_layers}": count.dense_mlp,
        "one routed expert": count.expert,
        f"shared experts, x {count.moe_layers}": count.shared_experts,
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, f"{value:,}", _count(value))
    console.print(table)

    table = new_table(f"a token, context {plan.context:,}", "", "")
    for name, flops in {
        "prefill (average of the context)": plan.prefill_flops,
        "decode (one token after the context)": plan.decode_flops,
        "training (average of the context)": plan.training_flops,
    }.items():
        table.add_row(name, scaled(flops, "FLOP"))
    table.add_row("latent cache, bf16", f"{plan.latent_cache_bytes_per_token:,} B")
    if plan.indexer_cache_bytes_per_token:
        table.add_row("indexer cache, fp8", f"{plan.indexer_cache_bytes_per_token:,} B")
    table.add_row("keys and values of all heads instead", f"{plan.expanded_cache_bytes_per_token:,} B")
    console.print(table)

    table = new_table("memory", "", *plan.weight_bytes)
    table.add_row("weights", *(scaled(size, "B") for size in plan.weight_bytes.values()))
    if count.mtp:
        mtp = plan.mtp_weight_bytes
        table.add_row("  for multi-token prediction", *(scaled(mtp[dtype], "B") for dtype in plan.weight_bytes))
    cache = scaled(plan.cache_bytes, "B")
    table.add_row(f"cache, {plan.batch:,} x {plan.context:,} tokens", *(cache for _ in plan.weight_bytes))
    for size in dict.fromkeys(fit.gigabytes for fit in plan.fits):
        fits = {fit.dtype: fit for fit in plan.fits if fit.gigabytes == size}
        table.add_row(f"on devices of {size:g} GB", *(_fit(fits[dtype]) for dtype in plan.weight_bytes))
    console.print(table)
    console.print(
        "fits, N: beside the weights, N tokens of cache. Nine tenths of a device are counted on; over several, weights "
        "and cache are spread evenly."
    )


def _fit(fit: Fit) -> str:
    if fit.devices > 1:
        return f"{fit.devices:,} devices"
    return f"fits, {_count(fit.cache_tokens)}"


def print_presets(configs: dict[str, DeepseekConfig]) -> None:
    """Prints the names of presets, with the facts that tell them apart."""
    from ..layout.accounting import count_parameters

    table = new_table("presets", "name", "parameters", "activated", "layers", "experts", "checkpoint")
    table.columns[0].no_wrap = True
    for name, config in configs.items():
        count, sizes = count_parameters(config), config.expert_sizes
        stored = "FP8" if config.weight_block_size else "BF16"
        figures = (_count(count.total), _count(count.activated), str(config.num_hidden_layers))
        table.add_row(name, *figures, f"{sizes.chosen} of {sizes.routed}", stored)
    Console().print(table)


def print_inspection(report: CheckpointReport) -> None:
    """Prints tensors by dtype, those that load, and everything that is wrong."""
    console = Console()
    table = new_table(f"{report.path}: {report.config.model_type}", "dtype", "tensors", "bytes")
    for dtype, (tensors, size) in report.dtypes.items():
        table.add_row(dtype, f"{tensors:,}", f"{size:,}")
    table.add_section()
    table.add_row(f"{len(report.shards):,} files", f"{len(report.tensors):,}", f"{report.nbytes:,}")
    console.print(table)
    rows = {"would be loaded": f"{len(report.loads):,} tensors"}
    if report.dequantized:
        rows["  of these FP8"] = f"{report.dequantized:,}"
    if report.aliases:
        rows["repeated embedding and head"] = f"{len(report.aliases):,}"
    if report.skipped:
        rows["skipped"] = _some(report.skipped)
    console.print(facts_table("loading", rows))
    for warning in report.warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}")
    for kind, details in report.problems.items():
        console.print(f"[red]{escape(kind)}[/red] ({len(details):,}):")
        for line in details[:_SHOWN]:
            console.print(f"  {escape(line)}")
        if len(details) > _SHOWN:
            console.print(f"  and {len(details) - _SHOWN:,} more (--json lists all)")
    if not report.ok:
        console.print("[red]This checkpoint does not load.[/red]")
    else:
        console.print("[green]This checkpoint loads.[/green]")


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def print_doctor(facts: dict[str, Any]) -> None:
    """Prints versions, devices, operators."""
    console = Console()
    versions = {"python": facts["python"], "system": facts["system"]}
    versions |= {name: version or "not installed" for name, version in facts["packages"].items()}
    versions["C++ operators"] = facts["cpu_library"]
    console.print(facts_table("versions", versions))
    devices = {}
    for device in facts["devices"]:
        details = {key: value for key, value in device.items() if key != "device"}
        if "memory_bytes" in details:
            details["memory"] = scaled(details.pop("memory_bytes"), "B")
        name = details.pop("name")
        devices[device["device"]] = ", ".join([name, *(f"{key} {value}" for key, value in details.items())])
    console.print(facts_table("devices", devices))
    table = Table(title="operators", title_justify="left", title_style="bold")
    for column in ("operator", "implementation", "why"):
        table.add_column(column)
    for row in facts["operators"]:
        table.add_row(row["op"], row["implementation"], escape(row["reason"]))
    console.print(table)
