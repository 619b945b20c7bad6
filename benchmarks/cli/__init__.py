"""The command line of the benchmarks, and its commands for saved reports."""
