"""Everything about a training step that is neither the model, the layout nor the device."""

from __future__ import annotations

from dataclasses import dataclass

from ..config.argument_types import check_types
from ..layout.parallel_layout import LayoutError, ParallelLayout
from .schedules import SCHEDULES, check_schedule

__all__ = ["PRECISIONS", "RECOMPUTE", "TrainingSetup"]

PRECISIONS = ("fp8", "bf16")
RECOMPUTE = ("none", "selective", "full")


@check_types
@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """A training step's batch, schedule and number formats; by default DeepSeek-V3's (arXiv 2412.19437, 3.2 to 4.2).

    Attributes:
        batch: sequences of a step, of `sequence` tokens; micro_batch: sequences that run at a time.
        schedule: of `SCHEDULES`; chunks: stages a rank for `interleaved` and `zero_bubble`.
        zero: what data-parallel ranks share: 1 optimizer states, 2 gradients too, 3 weights too (FSDP).
        precision: of matrix products and of what is kept for them, "fp8" or "bf16".
        recompute: "none"; "selective": norms, the projections up from latents and SwiGLU's output are computed again
            (V3's policy); "full": every layer is.
        weight_bytes, gradient_bytes, master_bytes, moment_bytes: a parameter's compute copy, accumulated gradient,
            master copy and each of Adam's two moments.

    Raises:
        ValueError: a value is not one of the above.
    """

    batch: int = 15360
    sequence: int = 4096
    micro_batch: int = 1
    schedule: str = "dualpipe"
    chunks: int = 1
    zero: int = 1
    precision: str = "fp8"
    recompute: str = "selective"
    weight_bytes: int = 2
    gradient_bytes: int = 4
    master_bytes: int = 4
    moment_bytes: int = 2

    def __post_init__(self) -> None:
        choices = {"schedule": SCHEDULES, "zero": (1, 2, 3), "precision": PRECISIONS, "recompute": RECOMPUTE}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"expected {name} to be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}"
                )
        for name in ("batch", "sequence", "micro_batch", "chunks", "weight_bytes", "gradient_bytes", "moment_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}")
        if self.master_bytes < 0:
            raise ValueError(f"expected master_bytes >= 0, got {self.master_bytes}")

    def micro_batches(self, layout: ParallelLayout) -> int:
        """Returns how many micro-batches a pipeline runs in a step.

        Raises:
            LayoutError: `dp x micro_batch` does not divide the batch, or the schedule cannot run so many.
        """
        if self.batch % (layout.dp * self.micro_batch):
            raise LayoutError(
                f"expected dp x micro_batch = {layout.dp} x {self.micro_batch} to divide the batch of "
                f"{self.batch} sequences"
            )
        count = self.batch // (layout.dp * self.micro_batch)
        try:
            check_schedule(self.schedule, layout.pp, count, self.chunks)
        except ValueError as error:
            raise LayoutError(str(error)) from None
        return count

    def tokens(self, layout: ParallelLayout) -> int:
        """Returns the tokens of a micro-batch that one rank sees (context parallelism cuts each sequence)."""
        return self.micro_batch * self.sequence // layout.cp
