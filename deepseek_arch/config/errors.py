"""Errors of configs."""

from __future__ import annotations

__all__ = ["ConfigError", "UnsupportedModelError"]


class ConfigError(ValueError):
    """A config that cannot describe a model; the message lists every problem found."""


class UnsupportedModelError(ConfigError, NotImplementedError):
    """A config that is valid for its model, but that this package cannot build."""
