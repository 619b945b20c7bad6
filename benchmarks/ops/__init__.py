"""One file per operator; `benchmarks.operators` says what is in one."""
