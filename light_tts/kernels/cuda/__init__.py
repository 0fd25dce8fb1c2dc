"""Kernels written in CUDA C++, for what Triton cannot express, such as clusters of thread blocks.

- `source.py` compiles a file when the server starts, `kernel.py` loads and launches its kernels;
  `hopper.cuh` names the instructions that they use.
- A source is in the package of the kernels that it belongs to, beside the Python function that launches its
  kernel: `extern "C" __global__`, with one struct as its only parameter.
"""
