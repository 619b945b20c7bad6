"""Rollouts of a trained policy: tokens that are kept per CPU second, by engine.

Both engines sample the same prompts with the same model. What stands behind a row's end token is not kept: the native
engine takes rows that have ended out of the batch, transformers' carries them to the end of the longest row. Seconds
are of this process's threads, so that other load on the machine counts for neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated

import torch

from ..core.machine import load_average
from ..core.report import NATIVE, OURS, RESULTS, Report, Row, Samples
from ..core.tables import print_progress, show_and_save
from ..core.timing import interleave_clocked

__all__ = ["GOAL", "Settings", "main", "run"]

GOAL, GOAL_ROWS = 3.0, 64  # times transformers' rate, and the batch that this is asked of


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Policy and sizes to measure.

    Raises:
        ValueError: a size that is not positive.
    """

    checkpoint: Annotated[str, "folder with model and tokenizer"] = "runs/box/base/model"
    nodes: Annotated[int, "of the walks that are asked for"] = 8
    low: Annotated[int, "fewest steps of a walk"] = 3
    high: Annotated[int, "most steps of a walk"] = 7
    batches: Annotated[tuple[int, ...], "rows that are sampled at once"] = (16, 64, 256)
    max_new_tokens: Annotated[int, "of a completion"] = 112
    threads: int = 1
    rounds: Annotated[int, "counted rollouts of each engine"] = 7
    out: Annotated[str, "report file (default: in benchmarks/results)"] = ""

    def __post_init__(self) -> None:
        if min(self.max_new_tokens, self.threads, self.rounds, *self.batches) < 1:
            raise ValueError(f"expected positive sizes, got {self}")


def main(settings: Settings) -> int:
    """Runs the command `rollouts`."""
    show_and_save(run(settings, on_row=print_progress), settings.out or RESULTS / "rollouts.json")
    return 0


def run(settings: Settings, on_row: Callable[[Row], None] = lambda row: None) -> Report:
    """Measures all batches; temperature 1, as in training.

    Raises:
        ValueError: a folder without a checkpoint of this package's models.
    """
    from deepseek_arch.r1.stages.policy import Policy

    torch.set_num_threads(settings.threads)
    policies = {OURS: Policy.load(settings.checkpoint), NATIVE: Policy.load(settings.checkpoint)}
    if not policies[OURS].native:
        raise ValueError(f"expected a DeepSeek model in {settings.checkpoint!r}, got another one")
    policies[NATIVE].native = False
    rows = []
    for batch in settings.batches:
        rows.append(_measure(policies, batch, settings))
        on_row(rows[-1])
    notes = (f"{settings.threads} thread(s); load average at the start {load_average()}",)
    return Report("rollouts", asdict(settings), tuple(rows), notes)


def _measure(policies: dict, batch: int, settings: Settings) -> Row:
    from deepseek_arch.r1.rollouts import Sampling
    from deepseek_arch.r1.tasks import Chains
    from deepseek_arch.r1.templates import TEMPLATES

    form = TEMPLATES["zero-marks"]
    problems = Chains(settings.nodes, settings.low, settings.high).draw(batch, 1)
    kept: dict[str, list[int]] = {name: [] for name in policies}
    widest: dict[str, list[int]] = {name: [] for name in policies}

    def action(name: str) -> Callable[[], None]:
        policy = policies[name]
        prompts = [policy.encode(form.prompt(problem.question)) for problem in problems]

        def sample() -> None:
            # Another seed in each round, the same ones for both engines.
            sampling = Sampling(
                settings.max_new_tokens, 1.0, end_tokens=policy.end_tokens, pad_token=policy.pad_token,
                seed=len(kept[name]),
            )  # fmt: skip
            lengths = [len(completion) for completion in policy.sample(prompts, sampling).completions]
            kept[name].append(sum(lengths))
            widest[name].append(batch * max(lengths))

        return sample

    actions = {name: action(name) for name in policies}
    clocked = interleave_clocked(actions, rounds=settings.rounds, warmup=1)
    seconds = {name: one.cpu for name, one in clocked.items()}
    results = {
        name: Samples(tuple(n / s for n, s in zip(kept[name][-len(samples.values) :], samples.values, strict=True)))
        for name, samples in seconds.items()
    }
    share = sum(kept[NATIVE]) / sum(widest[NATIVE])
    return Row(
        f"{batch} rows", "tokens/CPU s", "higher", results, baseline=NATIVE,
        goal=GOAL if batch == GOAL_ROWS else None,
        note=f"{100 * share:.0f} % of the tokens that transformers' engine computes are kept",
    )  # fmt: skip
