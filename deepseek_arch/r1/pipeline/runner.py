"""Runs recipes stage by stage: what is done is kept, what was interrupted goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import __version__
from .manifest import MANIFEST, STARTED, Manifest, differences, read_manifest
from .recipe import Recipe

__all__ = ["LEAST_FREE", "Outcome", "run", "run_single"]

LEAST_FREE = 256 * 2**20
"""Bytes that have to be free before anything is trained."""


@dataclass(frozen=True)
class Outcome:
    """One stage of a run.

    Attributes:
        stage: its name.
        folder: of its results.
        skipped: True for results that were there already.
    """

    stage: str
    folder: Path
    skipped: bool


def run(
    recipe: Recipe,
    out: str | Path,
    until: str | None = None,
    first: str | None = None,
    progress: bool = False,
    say: Callable[[str], object] = print,
) -> list[Outcome]:
    """Runs the stages of a recipe into `out`, one folder each, and writes the report.

    The same call goes on after an interruption, wherever it was, with the same results. Everything is checked before
    anything is trained.

    Args:
        until: the last stage to run.
        first: the first stage to run; those before it have to be done.
        progress: whether trainers draw bars.
        say: is given a line at the beginning and at the end of each stage.

    Raises:
        ValueError: an unknown stage or field, results in `out` of another recipe, configuration or seed, a stage that
            needs another one which does not come before it, or what a stage refuses.
        OSError: `out` cannot be written, or there is no room.
    """
    from ..stages import STAGES  # noqa: F401  says which extra is missing before a folder is made
    from ..stages.checking import check_stage
    from .report import write_report

    out = Path(out)
    names = _chosen(recipe, until, first)
    inputs = check_recipe(recipe)
    _check_room(out)
    with _locked(out):
        manifests = _manifests(recipe, inputs, out)
        _check_results(manifests, out)
        for name in list(recipe.stages)[: list(recipe.stages).index(names[0])]:
            if not (out / name / MANIFEST).is_file():
                raise ValueError(f"expected stage {name!r} to be done before {first!r}, got no results in {out}")
        for name in names:
            if not (out / name / MANIFEST).is_file():
                values = {k: v for k, v in recipe.stages[name].items() if k != "seed"}
                check_stage(name, values, out / name, manifests[name].seed)
        done = []
        for i, name in enumerate(names):
            skipped = (out / name / MANIFEST).is_file()
            say(f"[{i + 1}/{len(names)}] {name}: {'done before' if skipped else recipe.stages[name]['kind']}")
            if not skipped:
                _run(recipe.stages[name], manifests[name], out / name, lambda given: _find(given, out, recipe),
                     progress)  # fmt: skip
                say(f"[{i + 1}/{len(names)}] {name}: {_summary(out / name)}")
            done.append(Outcome(name, out / name, skipped))
            if not skipped or name == names[-1]:
                write_report(out, recipe)
    return done


def run_single(name: str, fields: Mapping[str, Any], out: str | Path, seed: int = 0, progress: bool = False) -> Path:
    """Runs one stage into the folder `out`; inputs are folders, or stages beside `out`.

    Also for several processes, as `accelerate launch` starts them: one of them writes.

    Raises:
        ValueError, OSError: as `run`.
    """
    from ..stages.registry import parse_stage

    out = Path(out)
    _, arguments, _ = parse_stage(name, fields)
    inputs = {}
    for given in arguments.inputs:  # type: ignore[attr-defined]
        folder = _beside(given, out)
        made = read_manifest(folder / MANIFEST) if folder.is_dir() else None
        inputs[given] = made["digest"] if made else str(folder)
    seed = int(fields.get("seed", seed))
    manifest = Manifest(name, seed, dict(fields), inputs, __version__)
    if (out / MANIFEST).is_file() or (out / STARTED).is_file():
        _check_results({name: manifest}, out.parent, out)
    if not (out / MANIFEST).is_file():
        _check_room(out)
        _run(fields, manifest, out, lambda given: _beside(given, out), progress)
    return out


def check_recipe(recipe: Recipe) -> dict[str, list[str]]:
    """Returns the inputs of each stage, after checking all fields of all stages.

    Raises:
        ValueError: an unknown field, or an input that is neither an earlier stage nor a path.
    """
    from ..stages.registry import parse_stage

    inputs: dict[str, list[str]] = {}
    for name, fields in recipe.stages.items():
        _, arguments, _ = parse_stage(name, {k: v for k, v in fields.items() if k != "seed"})
        inputs[name] = list(arguments.inputs)  # type: ignore[attr-defined]
        for given in inputs[name]:
            if given in inputs and given != name:
                continue
            if given in recipe.stages:
                raise ValueError(f"expected the inputs of stage {name!r} before it, got {given!r} behind it")
            if not _path(given, recipe).exists() and not _is_model_name(given):
                raise ValueError(
                    f"expected inputs of stage {name!r} among {', '.join(list(inputs)[:-1]) or 'no stages'} or paths, "
                    f"got {given!r}"
                )
    return inputs


def _is_model_name(given: str) -> bool:
    """Returns True for a name on the Hub, as owner/name."""
    return given.count("/") == 1 and not given.startswith((".", "/", "~"))


def _path(given: str, recipe: Recipe) -> Path:
    path = Path(given).expanduser()
    return path if path.is_absolute() or path.exists() else recipe.folder / path


def _find(given: str, out: Path, recipe: Recipe) -> Path:
    return out / given if given in recipe.stages else _path(given, recipe)


def _beside(given: str, out: Path) -> Path:
    beside = out.parent / given
    return beside if (beside / MANIFEST).is_file() else Path(given).expanduser()


def _chosen(recipe: Recipe, until: str | None, first: str | None) -> list[str]:
    names = list(recipe.stages)
    for name in (until, first):
        if name is not None and name not in names:
            raise ValueError(f"expected a stage among {', '.join(names)}, got {name!r}")
    start = names.index(first) if first else 0
    end = names.index(until) + 1 if until else len(names)
    if start >= end:
        raise ValueError(f"expected {first!r} to come before {until!r}, got it behind")
    return names[start:end]


def _manifests(recipe: Recipe, inputs: Mapping[str, list[str]], out: Path) -> dict[str, Manifest]:
    made: dict[str, Manifest] = {}
    for name, fields in recipe.stages.items():
        digests = {given: made[given].digest if given in made else str(_path(given, recipe)) for given in inputs[name]}
        seed = fields.get("seed", recipe.seed)
        if not isinstance(seed, int):
            raise ValueError(f"expected a seed that is an integer in stage {name!r}, got {seed!r}")
        made[name] = Manifest(name, seed, {k: v for k, v in fields.items() if k != "seed"}, digests, __version__)
    return made


def _check_results(manifests: Mapping[str, Manifest], out: Path, folder: Path | None = None) -> None:
    """Raises ValueError where `out` holds results that were made otherwise."""
    for name, manifest in manifests.items():
        place = folder or out / name
        found = read_manifest(place / MANIFEST) or read_manifest(place / STARTED)
        wanted = manifest.to_dict()
        if found is None or found["digest"] == wanted["digest"]:
            continue
        differing = [line for line in differences(found, wanted) if not line.startswith("inputs.")]
        if not differing:
            differing = differences(found, wanted)
        raise ValueError(
            f"expected results of stage {name!r} in {place} that were made with the same fields and seed, got "
            f"{'; '.join(differing[:5])}. Choose another folder, or remove {place} and those of the stages behind it"
        )


def _run(
    fields: Mapping[str, Any], manifest: Manifest, folder: Path, find: Callable[[str], Path], progress: bool
) -> None:
    from ..stages.context import WORK, StageContext, write_json
    from ..stages.registry import run_stage

    writes = os.environ.get("RANK", "0") == "0"
    folder.mkdir(parents=True, exist_ok=True)
    if writes:
        write_json(manifest.to_dict(), folder / STARTED)
    context = StageContext(manifest.stage, folder, find, manifest.seed, progress)
    run_stage({k: v for k, v in fields.items() if k != "seed"}, context)
    if writes:
        write_json(manifest.to_dict(), folder / MANIFEST)
        (folder / STARTED).unlink()
        shutil.rmtree(folder / WORK, ignore_errors=True)


def _check_room(out: Path) -> None:
    """Raises OSError where nothing could be written."""
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    if free < LEAST_FREE:
        raise OSError(f"expected at least {LEAST_FREE >> 20} MiB free for {out}, got {free >> 20}")
    probe = out / f".writable-{os.getpid()}"  # several processes may look at once
    probe.write_bytes(b"\0" * 4096)
    probe.unlink()


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keeps a second process out of the folder; the lock of a process that was killed is gone with it."""
    import fcntl

    with open(out / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"expected one run at a time in {out}, got another one that is under way") from error
        yield


def _summary(folder: Path) -> str:
    """Returns one line on a stage's results."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    timing = json.loads((folder / "timing.json").read_text(encoding="utf-8"))
    if "reasoning" in metrics:
        found = metrics["reasoning"]
        said = f"pass@1 {100 * found['pass_at_1']['mean']:.1f} %, format {100 * found['formatted']:.0f} %"
    elif "rows" in metrics:
        said = f"{metrics['rows']} rows"
    else:
        said = f"accuracy {100 * metrics['accuracy']:.1f} %"
    return f"{said}, {timing['wall_seconds']:.0f} s"
