"""Pieces that all training stages share: resuming, curves, and measures of the result."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..evaluation import evaluate, evaluate_general, expert_violation, mtp_acceptance
from ..rewards import ModelReward
from ..rollouts import Sampling
from ..tasks import Chat
from .arguments import CommonArguments
from .context import LOG, METRICS, SAMPLES, StageContext, write_json, write_lines
from .policy import Policy

__all__ = ["Curve", "measure_policy", "save_stage", "train", "trainer_values"]

COMPLETE = "complete"


def trainer_values(values: Mapping[str, Any], context: StageContext) -> dict[str, Any]:
    """Returns arguments of a trainer: the stage's, and where and how it runs."""
    return {
        "output_dir": str(context.work),
        "seed": context.seed,
        "report_to": [],
        "disable_tqdm": not context.progress,
        "logging_steps": 10,
        **values,
    }


class MarkComplete(TrainerCallback):
    """Marks checkpoints that are whole: a process may end while one is written."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            (folder / COMPLETE).write_text("")


class Curve(TrainerCallback):
    """Evaluates while training, and keeps the results among the trainer's logs, which its checkpoints hold.

    Args:
        every: steps, 0 for never.
        measured: gives the values by name.
    """

    def __init__(self, every: int, measured: Callable[[], Mapping[str, float]]) -> None:
        self.every, self.measured = every, measured

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every and not state.global_step:
            self._add(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            self._add(state)

    def _add(self, state: Any) -> None:
        # On every process: generation of a replicated model needs none of the others, and states stay alike.
        values = {f"eval/{name}": value for name, value in self.measured().items()}
        state.log_history.append({"step": state.global_step, **values})


def last_complete(folder: Path) -> str | None:
    """Returns the newest whole checkpoint in `folder`, after removing those that are not."""
    found = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if folder.is_dir() else ():
        if (path / COMPLETE).exists():
            found.append((int(path.name.rpartition("-")[2]), str(path)))
        else:
            shutil.rmtree(path)
    return max(found)[1] if found else None


def train(trainer: Any) -> list[dict[str, Any]]:
    """Runs a trainer from its newest whole checkpoint, or from the start, and returns its logs."""
    trainer.add_callback(MarkComplete())
    if trainer.args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)  # it prints what the log has
    trainer.train(resume_from_checkpoint=last_complete(Path(trainer.args.output_dir)))
    return [_without_times(entry) for entry in trainer.state.log_history]


# The mean loss of a run is one of the steps since it was resumed.
_TIMES = ("train_loss", "runtime", "per_second", "step_time", "total_flos", "num_input_tokens_seen", "tokens_per_sec")


def _without_times(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is the same whenever the run is repeated."""
    # The summary at the end has the loads of a last step, of which a run resumed behind it has none.
    left_out = (*_TIMES, "max_violation") if "train_loss" in entry else _TIMES
    return {name: value for name, value in entry.items() if not any(part in name for part in left_out)}


def measure_policy(
    policy: Policy, arguments: CommonArguments, transcripts: int = 20
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the measures of a policy as JSON can hold them, and transcripts."""
    task, settings = arguments.problems(), arguments.settings
    found = evaluate(policy, task, arguments.form, settings, transcripts)
    values: dict[str, Any] = {"reasoning": found.to_dict()}
    texts = [asdict(transcript) for transcript in found.transcripts]
    if arguments.evaluate_general:
        general = evaluate_general(policy, Chat(), arguments.form, settings, transcripts // 2)
        values["general"] = general.to_dict()
        texts += [asdict(transcript) for transcript in general.transcripts]
    count = min(settings.problems, 64)
    prompts = [
        policy.encode(arguments.form.prompt(problem.question)) for problem in task.draw(count, settings.seed, "test")
    ]
    sampling = Sampling(
        settings.max_new_tokens, settings.temperature, None, settings.top_p, policy.end_tokens, policy.pad_token,
        settings.seed,
    )  # fmt: skip
    if policy.drafts:
        values["mtp_acceptance"] = (mtp_acceptance(policy, prompts, sampling) or [None])[0]
    if policy.experts:
        values["max_violation"] = expert_violation(policy, prompts, sampling, policy.experts)
    return values, texts


def curve_values(policy: Policy, arguments: CommonArguments, judge: ModelReward | None = None) -> dict[str, float]:
    """Returns what curves show, by name.

    Args:
        judge: a reward model, whose mean score of the everyday responses is shown beside their quality: where the score
            rises and the quality does not, it is being hacked.
    """
    found = evaluate(policy, arguments.problems(), arguments.form, arguments.settings, 0)
    return {
        "pass@1": found.pass_at_1.mean,
        "half_width": found.pass_at_1.half_width,
        "format": found.formatted,
        "tokens": found.tokens,
        "reflections": found.reflections,
        **({} if found.consistency is None else {"consistency": found.consistency}),
        **(_general_values(policy, arguments, judge) if arguments.evaluate_general else {}),
    }


def _general_values(policy: Policy, arguments: CommonArguments, judge: ModelReward | None) -> dict[str, float]:
    form, settings = arguments.form, arguments.settings
    found = evaluate_general(policy, Chat(), form, settings, settings.problems)
    if judge is None:
        return {"quality": found.quality.mean}
    shown = found.transcripts
    prompts, kinds = [form.prompt(one.question) for one in shown], [judge.kinds[0]] * len(shown)
    scores = judge([one.response for one in shown], prompts, kind=kinds)
    return {"quality": found.quality.mean, "score": sum(score or 0.0 for score in scores) / len(scores)}


@contextmanager
def bars(shown: bool) -> Iterator[None]:
    """Keeps the libraries' progress bars away, unless `shown`."""
    if shown:
        yield
        return
    models = transformers.logging.is_progress_bar_enabled()
    maps = not datasets.are_progress_bars_disabled()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if models:
            transformers.logging.enable_progress_bar()
        if maps:
            datasets.enable_progress_bars()


class Stopwatch:
    """Seconds of this process since it was made, by the clock and of its processor cores."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def seconds(self) -> dict[str, float]:
        """Returns both."""
        return {
            "wall_seconds": round(time.perf_counter() - self.wall, 3),
            "cpu_seconds": round(time.process_time() - self.cpu, 3),
        }


def save_stage(
    context: StageContext,
    metrics: Mapping[str, Any],
    log: list[dict[str, Any]],
    transcripts: list[dict[str, Any]],
    seconds: Mapping[str, float],
) -> None:
    """Writes the results of a stage, in one process of several.

    Times have a file of their own: everything else is the same when a run is repeated or resumed.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    write_lines(log, context.folder / LOG)
    write_lines(transcripts, context.folder / SAMPLES)
    write_json(seconds, context.folder / "timing.json")
    write_json(metrics, context.folder / METRICS)
