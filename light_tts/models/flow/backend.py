"""Selects the flow implementation: packed batches on a GPU; on a CPU one item at a time with cached streams;
padded batches in plain PyTorch with a TensorRT engine, or if Triton is missing."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from light_tts.models.checkpoint.cosyvoice2_config import Config
from light_tts.models.flow.chunked import chunk_flow
from light_tts.models.flow.estimator_backend import TorchEstimator, choose_estimator
from light_tts.models.flow.flow import Flow
from light_tts.models.flow.interface import FlowBackend
from light_tts.models.flow.memos import MemoLimit
from light_tts.models.flow.padded import PaddedFlow
from light_tts.models.flow_options import FlowOptions

log = logging.getLogger(__name__)


def choose_flow(
    model_dir: Path,
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    options: FlowOptions,
    ended: Callable[[str], None] = lambda phase: None,
) -> Callable[[], FlowBackend]:
    """Load the flow of a checkpoint and return a factory that creates a backend per CUDA stream; backends
    share their weights. `ended`: called after each phase of the loading with its name. Raises
    CheckpointError, and TooLittleMemory if `gpu_memory` was asked for and is too small."""
    if options.n_timesteps is not None:
        config = replace(config, flow=replace(config.flow, n_timesteps=options.n_timesteps))
    flow = Flow.from_checkpoint(model_dir, config, device)
    ended("flow weights")
    batch = options.max_batch_size
    estimator = choose_estimator(flow.decoder.estimator, options.load_trt, device, model_dir, batch)
    if device.type == "cuda" and isinstance(estimator, TorchEstimator):
        if importlib.util.find_spec("triton") is not None:
            from light_tts.models.flow.pack import pack
            from light_tts.models.flow.packed import share

            ended("imports")
            parts = pack(flow, dtype)
            ended("packed weights")
            return share(flow, *parts, batch, options.gpu_memory, options.gpu_memory_is_automatic, ended)
        log.warning("the package triton is not installed: running the flow in plain PyTorch, which is slow")
    if device.type == "cpu":
        limit = MemoLimit(options.memory)
        return lambda: chunk_flow(flow, limit)
    flow.to(dtype)
    flow.decoder.backend = estimator
    return lambda: PaddedFlow(flow)
