"""Selects the implementation of the flow with a diffusion transformer: packed batches on a GPU, padded ones
in plain PyTorch if Triton is missing; on a CPU one item at a time with cached streams."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from light_tts.models.checkpoint.cosyvoice3_config import Config3
from light_tts.models.flow.chunked import chunk_flow
from light_tts.models.flow.dit.flow import DiTFlow
from light_tts.models.flow.interface import FlowBackend
from light_tts.models.flow.memos import MemoLimit
from light_tts.models.flow.padded import PaddedFlow
from light_tts.models.flow_options import FlowOptions

log = logging.getLogger(__name__)


def choose_dit_flow(
    model_dir: Path,
    config: Config3,
    device: torch.device,
    dtype: torch.dtype,
    options: FlowOptions,
    ended: Callable[[str], None] = lambda phase: None,
) -> Callable[[], FlowBackend]:
    """Load the flow of a checkpoint and return a factory that creates a backend per CUDA stream; backends
    share their weights. On a GPU only what is multiplied by matrices is in `dtype` (see packed.py); in plain
    PyTorch everything is float32, multiplied in TF32 unless `dtype` is float32. `ended`: called after each
    phase of the loading with its name. Raises CheckpointError, and TooLittleMemory if `gpu_memory` was asked
    for and is too small."""
    if options.load_trt:
        log.warning("load_trt: TensorRT is not supported for CosyVoice3; using the built-in flow estimator")
    if options.n_timesteps is not None:
        config = replace(config, flow=replace(config.flow, n_timesteps=options.n_timesteps))
    flow = DiTFlow.from_checkpoint(model_dir, config, device)
    ended("flow weights")
    if device.type == "cpu":
        limit = MemoLimit(options.memory)
        return lambda: chunk_flow(flow, limit)
    if importlib.util.find_spec("triton") is not None:
        from light_tts.models.flow.dit.pack import pack
        from light_tts.models.flow.packed import share

        ended("imports")
        parts, batch = pack(flow, dtype), options.max_batch_size
        ended("packed weights")
        return share(flow, *parts, batch, options.gpu_memory, options.gpu_memory_is_automatic, ended)
    log.warning("the package triton is not installed: running the flow in plain PyTorch, which is slow")
    if dtype != torch.float32:
        torch.set_float32_matmul_precision("high")
    return lambda: PaddedFlow(flow)
