"""`deepseek-arch plan --gpus`: training and serving on many devices, planned and printed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from rich.console import Console

from ..config.deepseek_config import DeepseekConfig
from ..layout.parallel_layout import LayoutError, ParallelLayout, parse_axes
from ..planning.devices import Device, find_device
from ..planning.inference import InferencePlan, InferenceSetup, plan_inference
from ..planning.search import TrainingSearch, search_inference, search_training
from ..planning.setup import TrainingSetup
from ..planning.training import TrainingPlan
from .tables import facts_table, new_table, scaled

__all__ = ["DevicePlans", "PlanRequest", "plan_devices", "print_device_plans"]

SHOWN = 10  # plans that --search prints


class PlanRequest(NamedTuple):
    """The command's options; None leaves a choice to the planner."""

    devices: int
    device: str
    layout: str | None
    search: bool
    sequence: int
    cached_sequences: int
    step_batch: int
    micro_batch: int
    schedule: str | None
    zero: int | None
    recompute: str | None
    precision: str | None


@dataclass(frozen=True)
class DevicePlans:
    """Training and serving plans of a `PlanRequest`.

    Attributes:
        training, serving: plans, best first, or the reason why there is none.
    """

    device: Device
    training: TrainingSearch | str
    serving: list[InferencePlan] | str

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        if isinstance(self.training, str):
            training: Any = {"plans": [], "reason": self.training}
        else:
            smallest = self.training.smallest
            training = {
                "plans": [plan.to_dict() for plan in self.training.plans],
                "considered": self.training.considered,
                "smallest": smallest.to_dict() if smallest else None,
            }
        if isinstance(self.serving, str):
            serving: Any = {"plans": [], "reason": self.serving}
        else:
            serving = {"plans": [plan.to_dict() for plan in self.serving]}
        return {"device": asdict(self.device), "training": training, "serving": serving}


def plan_devices(config: DeepseekConfig, request: PlanRequest) -> DevicePlans:
    """Plans training and serving.

    With a layout and without a search, all axes are those of the layout; other choices left open are made by search.

    Raises:
        LayoutError: neither training nor serving is possible; the reasons of both.
        ValueError: no such device.
    """
    device = find_device(request.device)
    published_fp8 = config.weight_block_size is not None
    fixed = parse_axes(request.layout or "")
    if request.layout is not None and not request.search:
        layout = ParallelLayout(**fixed).for_devices(request.devices)
        fixed = {name: size for name, size in asdict(layout).items() if size is not None}
    top = SHOWN if request.search else 1
    training = _training(config, request, device, fixed, published_fp8, top)
    serving = _serving(config, request, device, fixed, published_fp8, top)
    if isinstance(training, str) and isinstance(serving, str):
        reasons = dict.fromkeys((training, serving))
        raise LayoutError("; ".join(reasons))
    return DevicePlans(device, training, serving)


def _training(
    config: DeepseekConfig, q: PlanRequest, device: Device, fixed: dict[str, int], published_fp8: bool, top: int
) -> TrainingSearch | str:
    given = {"schedule": q.schedule, "zero": q.zero, "recompute": q.recompute}
    precision = q.precision or ("fp8" if published_fp8 and device.fp8 else "bf16")
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if q.schedule == "interleaved":
        chosen["chunks"] = 2
    try:
        setup = TrainingSetup(
            batch=q.step_batch, sequence=q.sequence, micro_batch=q.micro_batch, precision=precision, **chosen
        )
        free = [name for name, value in given.items() if value is None]
        return search_training(config, q.devices, device, setup, fixed=fixed, free=free, top=top)
    except LayoutError as problem:
        return str(problem)


def _serving(
    config: DeepseekConfig, q: PlanRequest, device: Device, fixed: dict[str, int], published_fp8: bool, top: int
) -> list[InferencePlan] | str:
    precision = q.precision or ("fp8" if published_fp8 else "bf16")
    setup = InferenceSetup(batch=q.cached_sequences, context=q.sequence, precision=precision)
    try:
        if "dp_shard" in fixed and not q.search:
            return [plan_inference(config, ParallelLayout(**fixed), device, setup)]
        return search_inference(config, q.devices, device, setup, fixed=fixed, top=top)
    except LayoutError as problem:
        return str(problem)


# ---------------------------------------------------------------------- printing


def print_device_plans(model: str, plans: DevicePlans) -> None:
    """Prints the best plans in full, and a table where several were asked for."""
    console = Console()
    if isinstance(plans.training, str):
        console.print(f"training: {plans.training}")
    elif plans.training.plans:
        _print_training(console, model, plans.training.plans[0])
        if len(plans.training.plans) > 1:
            _print_training_list(console, plans.training)
    elif plans.training.smallest:
        count = plans.training.considered
        console.print(f"No training plan of {count:,} fits. The one that needs least memory:" if count > 1 else "")
        _print_training(console, model, plans.training.smallest)
    if isinstance(plans.serving, str):
        console.print(f"serving: {plans.serving}")
    else:
        _print_serving(console, model, plans.serving[0])
        if len(plans.serving) > 1:
            _print_serving_list(console, plans.serving)
    if not plans.device.is_measured:
        console.print(
            f"Rates of {plans.device.name} are its data sheet's peaks at the shares that the H800 reaches, not "
            "measured: compare layouts by them, and expect longer times."
        )
    console.print(
        f"Rates of {plans.device.name} and their sources: --json. Training hides expert exchange behind computing only "
        "under dualpipe and dualpipev; serving figures are bounds with two batches in turn."
    )


def _memory_text(plan: TrainingPlan | InferencePlan) -> str:
    size = f"{plan.memory_total / 1e9:.1f} of {plan.device.memory / 1e9:.0f} GB"
    return size if plan.fits else f"{size} (does not fit)"


def _print_training(console: Console, model: str, plan: TrainingPlan) -> None:
    setup, seconds = plan.setup, plan.seconds
    layers = [len(stage) for stage in plan.stages]
    console.print(
        facts_table(
            f"{model}: training on {plan.layout.world_size:,} {plan.device.name}",
            {
                "layout": f"{plan.layout} (experts on {plan.layout.edp} x {plan.layout.ep} x {plan.layout.etp})",
                "schedule": f"{setup.schedule}, {plan.micro_batches:,} micro-batches, ZeRO-{setup.zero}, "
                f"{setup.precision}, recompute {setup.recompute}",
                "layers of a stage": f"{min(layers)} to {max(layers)}" if len(layers) > 1 else f"{layers[0]}",
                "step": f"{seconds.total:.2f} s for {setup.batch:,} x {setup.sequence:,} tokens",
                "  of it": ", ".join(
                    f"{name} {value:.2f}" for name, value in asdict(seconds).items() if value >= 0.005
                ),
                "binds": plan.binds,
                "a device": f"{plan.tokens_per_second:,.0f} tokens/s, {plan.flops / 1e12:,.0f} TFLOP/s of the model, "
                f"{plan.flops / plan.device.peak_bf16:.0%} of the BF16 peak",
                "device hours": f"{plan.device_hours_per_trillion:,.0f} for 10^12 tokens",
                "memory": f"{_memory_text(plan)} (pipeline rank {plan.fullest})",
            },
        )
    )
    _print_memory(console, plan)
    _print_traffic(console, plan)


def _print_memory(console: Console, plan: TrainingPlan) -> None:
    table = new_table("memory of the fullest device", "", "")
    for kind, size in plan.memory.items():
        if size:
            table.add_row(kind, scaled(size, "B"))
    console.print(table)


def _print_traffic(console: Console, plan: TrainingPlan) -> None:
    links = [link for link in ("nvlink", "network") if any(at == link for _, at in plan.traffic)]
    if not links:
        return
    table = new_table("sent by a device in a step", "", *links)
    for purpose in dict.fromkeys(purpose for purpose, _ in plan.traffic):
        table.add_row(purpose, *(scaled(plan.traffic.get((purpose, link), 0.0), "B") for link in links))
    console.print(table)


def _print_training_list(console: Console, found: TrainingSearch) -> None:
    columns = ("schedule", "ZeRO", "recompute", "step, s", "GB", "tokens/s")
    table = new_table(f"best of {found.considered:,} for training", "layout", *columns)
    for plan in found.plans:
        setup = plan.setup
        table.add_row(
            str(plan.layout),
            setup.schedule,
            str(setup.zero),
            setup.recompute,
            f"{plan.seconds.total:.2f}",
            f"{plan.memory_total / 1e9:.1f}",
            f"{plan.tokens_per_second:,.0f}",
        )
    console.print(table)


def _print_serving(console: Console, model: str, plan: InferencePlan) -> None:
    setup = plan.setup
    rows = {
        "layout": f"{plan.layout}, {setup.precision} weights",
        "memory": f"{_memory_text(plan)}: "
        + ", ".join(f"{kind} {scaled(size, 'B')}" for kind, size in plan.memory.items()),
        "sequences": f"{setup.batch:,} of {setup.context:,} tokens a data-parallel rank; "
        f"{plan.largest_batch:,} at most",
        "decoding": f"{plan.step_seconds * 1e3:.1f} ms a step, at most "
        f"{plan.decode_tokens_per_second:,.0f} tokens/s a device",
        "  of it, ms": ", ".join(f"{name} {value * 1e3:.1f}" for name, value in asdict(plan.decode).items()),
        "binds": plan.binds,
        "prefill": f"at most {plan.prefill_tokens_per_second:,.0f} tokens/s a device",
    }
    if plan.layout.tp > 1:
        rows["note"] = f"the latent cache is the same on all {plan.layout.tp} ranks of a tensor-parallel group"
    console.print(facts_table(f"{model}: serving on {plan.layout.world_size:,} {plan.device.name}", rows))


def _print_serving_list(console: Console, plans: list[InferencePlan]) -> None:
    table = new_table("best for serving", "layout", "GB", "fits", "sequences at most", "decoding, tokens/s", "prefill")
    for plan in plans:
        table.add_row(
            str(plan.layout),
            f"{plan.memory_total / 1e9:.1f}",
            "yes" if plan.fits else "no",
            f"{plan.largest_batch:,}",
            f"{plan.decode_tokens_per_second:,.0f}",
            f"{plan.prefill_tokens_per_second:,.0f}",
        )
    console.print(table)
