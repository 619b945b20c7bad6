"""What tests and benchmarks of the operators share. Nothing here is imported by an operator when it runs.

- `interpreter`: makes Triton's CPU interpreter right for bfloat16 and e4m3, so that kernels are tested without a GPU.
- `compile_gate`: compiles kernels for GPUs that are not there, and reads registers, spills, shared memory and
  instructions from the result.
- `numeric`: bitwise comparison.
"""
