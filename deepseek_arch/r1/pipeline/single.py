"""Single stages and evaluations outside a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .recipe import apply_change, read_yaml
from .runner import run_single

__all__ = ["evaluate_checkpoint", "evaluate_with_lm_eval", "run_file"]


def run_file(
    name: str, config: str | Path, out: str | Path, changes: Sequence[str] = (), seed: int = 0, progress: bool = False
) -> Path:
    """Runs a stage from its file; see `run_single`.

    Args:
        changes: as `max_steps=50`.
    """
    stages = {name: read_yaml(Path(config))}
    if "like" in stages[name]:
        raise ValueError(f"expected a stage with all its fields in {config}, got one that is like another")
    for change in changes:
        apply_change(f"{name}.{change}", stages)
    return run_single(name, stages[name], out, seed, progress)


def evaluate_checkpoint(
    checkpoint: str | Path,
    task: Mapping[str, Any],
    template: str,
    settings: Mapping[str, Any],
    device: str = "cpu",
    batch_size: int = 256,
) -> dict[str, Any]:
    """Returns the measures of a model in a folder, as a stage's `metrics.json` has them.

    Raises:
        ValueError: an unknown task, template or setting.
    """
    from ..stages.arguments import CommonArguments
    from ..stages.policy import Policy
    from ..stages.training import bars, measure_policy

    arguments = CommonArguments(dict(task), template, dict(settings), batch_size=batch_size)
    with bars(False):
        return measure_policy(Policy.load(checkpoint, batch_size, device), arguments, 0)[0]


def evaluate_with_lm_eval(checkpoint: str | Path, tasks: Sequence[str], device: str = "cpu") -> dict[str, Any]:
    """Returns the results of lm-eval's tasks, run on the model through transformers.

    Raises:
        ImportError: lm-eval is missing.
    """
    try:
        import importlib

        lm_eval = importlib.import_module("lm_eval")
        wrapper = importlib.import_module("lm_eval.models.huggingface").HFLM
    except ImportError as error:
        raise ImportError("expected lm-eval, got none: pip install lm-eval") from error
    from ..stages.policy import load_model, load_tokenizer

    model = load_model(checkpoint).to(device)
    found = lm_eval.simple_evaluate(wrapper(pretrained=model, tokenizer=load_tokenizer(checkpoint)), tasks=list(tasks))
    return found["results"]
