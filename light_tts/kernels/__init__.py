"""Triton kernels, each in one file with the function that launches it and its PyTorch reference
(`*_reference`).

- A kernel is named `_*_kernel`. Its pointer arguments end with `_ptr`; compile-time constants are in
  capitals.
- Block sizes, warps and stages that can be chosen form a configuration (launch.py), passed as **config;
  fixed ones are in the launch.
- Those written in CUDA C++ are described in `cuda`.
- Each package states how its weights are laid out: `llm`, `flow`, `vocoder`.
"""
