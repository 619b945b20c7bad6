"""Recipes of stages: read from YAML, run with manifests, resumed after any interruption, reported."""

from .recipe import Recipe, load_recipe, recipes
from .report import write_report
from .runner import Outcome, run, run_single

__all__ = ["Outcome", "Recipe", "load_recipe", "recipes", "run", "run_single", "write_report"]
