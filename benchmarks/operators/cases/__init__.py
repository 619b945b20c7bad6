"""One file per operator; `benchmarks.operators.declare` says what is in one."""
