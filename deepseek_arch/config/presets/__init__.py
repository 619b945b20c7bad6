"""Configs that are known by name: the published config.json files, and two small models to start with."""

from __future__ import annotations

from importlib import resources

__all__ = ["presets", "read_preset"]


def presets() -> list[str]:
    """Returns the names that `DeepseekConfig.from_pretrained` knows without a file."""
    folder = resources.files(__package__)
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def read_preset(name: str) -> str:
    """Returns the text of the config.json that a preset stands for."""
    return (resources.files(__package__) / f"{name}.json").read_text(encoding="utf-8")
