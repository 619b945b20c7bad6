"""One file for each operator, as `benchmarks.operators.declare` describes it."""
