"""Pieces that all benchmarks share: reports, timing, the machine, worker processes, tables."""
