"""Tools that tests and benchmarks of the operators share. No operator imports them when it runs.

- `interpreter`: makes Triton's CPU interpreter right for bfloat16 and e4m3, so that kernels are tested without a GPU.
- `compile_gate`: compiles kernels without a GPU, and reads registers, spills, shared memory and
  instructions from the result.
- `numeric`: bitwise comparison.
"""
