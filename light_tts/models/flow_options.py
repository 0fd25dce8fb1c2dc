"""FlowOptions: how the flow of a checkpoint is computed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FlowOptions:
    """`load_trt`: run the estimator as a TensorRT engine if possible; `memory`, `gpu_memory`: bytes for the
    cached state of voices and streams on a CPU and on a GPU (0: no caching); `gpu_memory_is_automatic`:
    nobody asked for that size, so no more than useful is taken, and too little is no error; `n_timesteps`:
    Euler steps, overriding the checkpoint's."""

    load_trt: bool = False
    max_batch_size: int = 1
    memory: int = 0
    gpu_memory: int = 0
    gpu_memory_is_automatic: bool = False
    n_timesteps: int | None = None
