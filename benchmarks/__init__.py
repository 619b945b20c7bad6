"""Measurements, run from the repository root: `python -m benchmarks --help`. Tests check; these measure."""
