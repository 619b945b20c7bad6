"""Shared by all benchmarks: options, workers, machine, report, timing, tables, comparison. Imports no benchmark."""
