"""Recipes: a folder with `pipeline.yaml`, which names the stages in order, and a file for each of them."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checks import require

__all__ = ["RECIPES", "Recipe", "apply_change", "load_recipe", "parse_value", "read_yaml", "recipes"]

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
PIPELINE = "pipeline.yaml"
_KEYS = ("name", "about", "seed", "defaults", "stages", "plan")


@dataclass(frozen=True)
class Recipe:
    """Stages with all their fields.

    Attributes:
        name: of the recipe.
        about: what it is for.
        seed: of every stage that has none of its own.
        stages: fields of each stage by its name, in order, with `kind` among them.
        plan: what the planner needs to know about the machine and the model.
        folder: that it was read from; relative paths in it start there.
    """

    name: str
    stages: Mapping[str, Mapping[str, Any]]
    seed: int = 0
    about: str = ""
    plan: Mapping[str, Any] = field(default_factory=dict)
    folder: Path = RECIPES


def recipes() -> list[str]:
    """Returns the names of the recipes that come with the package."""
    return sorted(path.parent.name for path in RECIPES.glob(f"*/{PIPELINE}"))


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping in a file. Numbers such as 3e-6 are numbers, and a key stands there once.

    YAML 1.1 takes 3e-6 for text, and PyYAML the last of equal keys.

    Raises:
        ImportError: PyYAML is missing.
        ValueError: the file holds no mapping, or is no YAML.
        OSError: it cannot be read.
    """
    yaml = require("yaml")

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            for key in keys:
                if keys.count(key) > 1:
                    raise ValueError(f"expected every key once in {path}, got {key!r} twice")
            return super().construct_mapping(node, deep)

    number = re.compile(r"[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+\Z")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"expected YAML in {path}, got {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise ValueError(f"expected fields with values in {path}, got {type(values).__name__}")
    return values


def parse_value(text: str) -> Any:
    """Returns a value as a recipe's file would have it."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "value"
        path.write_text(f"value: {text}\n", encoding="utf-8")
        return read_yaml(path)["value"]


def load_recipe(source: str | Path, changes: Sequence[str] = (), seed: int | None = None) -> Recipe:
    """Reads a recipe and applies changes to it.

    Args:
        source: the name of a recipe of the package, or a folder with a `pipeline.yaml`.
        changes: as `zero.max_steps=50`, dots lead into mappings.
        seed: instead of the recipe's.

    Raises:
        ValueError: an unknown recipe, stage or key.
    """
    folder = Path(source)
    if not (folder / PIPELINE).is_file():
        folder = RECIPES / str(source)
    if not (folder / PIPELINE).is_file():
        raise ValueError(
            f"expected a recipe among {', '.join(recipes())}, or a folder with a {PIPELINE}, got {str(source)!r}"
        )
    head = read_yaml(folder / PIPELINE)
    for key in head:
        if key not in _KEYS:
            raise ValueError(f"expected keys among {', '.join(_KEYS)} in {folder / PIPELINE}, got {key!r}")
    names = head.get("stages")
    if not isinstance(names, list) or not names or len(set(names)) < len(names):
        raise ValueError(f"expected a list of different stages in {folder / PIPELINE}, got {names!r}")
    stages: dict[str, dict[str, Any]] = {}
    for name in names:
        stages[name] = _stage(name, folder, stages, head.get("defaults") or {})
    for change in changes:
        apply_change(change, stages)
    chosen = head.get("seed", 0) if seed is None else seed
    if not isinstance(chosen, int):
        raise ValueError(f"expected a seed that is an integer, got {chosen!r}")
    return Recipe(head.get("name", folder.name), stages, chosen, head.get("about", ""), head.get("plan") or {}, folder)


def _stage(
    name: str, folder: Path, before: Mapping[str, Mapping[str, Any]], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the fields of a stage: its own, those of the stage that it is like, and the defaults of its kind."""
    own = read_yaml(folder / f"{name}.yaml")
    like = own.pop("like", None)
    if like is not None and like not in before:
        raise ValueError(f"expected an earlier stage in `like` of {name!r}, got {like!r}")
    given = copy.deepcopy(dict(before[like])) | own if like else own
    kind = str(given.get("kind"))
    unknown = [key for key in defaults if key not in ("pretrain", "reinforce", "collect", "finetune", "judge")]
    if unknown:
        raise ValueError(f"expected defaults by kind of stage, got {unknown[0]!r}")
    return copy.deepcopy(dict(defaults.get(kind) or {})) | given


def apply_change(change: str, stages: dict[str, dict[str, Any]]) -> None:
    path, equals, text = change.partition("=")
    name, *keys = path.split(".")
    if not equals or not keys:
        raise ValueError(f"expected a change as stage.field=value, got {change!r}")
    if name not in stages:
        raise ValueError(f"expected a stage among {', '.join(stages)} in {change!r}, got {name!r}")
    target: Any = stages[name]
    for key in keys[:-1]:
        target = target.setdefault(key, {}) if isinstance(target, dict) else None
    if not isinstance(target, dict):
        raise ValueError(f"expected fields on the way to {keys[-1]!r} in {change!r}, got a value")
    target[keys[-1]] = parse_value(text)
