"""The choice of what computes the flow: packed batches on a GPU; on a CPU one item at a time, streams with a
memory; padded batches in plain PyTorch around a TensorRT engine, or where Triton is missing."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from light_tts.models.checkpoint.config import Config
from light_tts.models.flow.chunked import chunk_flow
from light_tts.models.flow.estimator_backend import TorchEstimator, choose_estimator
from light_tts.models.flow.flow import Flow
from light_tts.models.flow.interface import FlowBackend
from light_tts.models.flow.memos import MemoLimit
from light_tts.models.flow.padded import PaddedFlow

log = logging.getLogger(__name__)


def choose_flow(
    model_dir: Path,
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    load_trt: bool,
    max_batch_size: int,
    memory: int,
    gpu_memory: int = 0,
) -> Callable[[], FlowBackend]:
    """Loads the flow of a checkpoint. -> makes a backend for each CUDA stream that computes; they share their
    weights. `load_trt`: the estimator as a TensorRT engine, where that is possible; `memory`, `gpu_memory`:
    bytes that may be kept of voices and streams on a CPU and on a GPU (0: nothing is). Raises
    CheckpointError, and TooLittleMemory where `gpu_memory` is too little or too much."""
    flow = Flow.from_checkpoint(model_dir, config, device)
    estimator = choose_estimator(flow.decoder.estimator, load_trt, device, model_dir, max_batch_size)
    if device.type == "cuda" and isinstance(estimator, TorchEstimator):
        if importlib.util.find_spec("triton") is not None:
            from light_tts.models.flow.packed import share

            return share(flow, dtype, max_batch_size, gpu_memory)
        log.warning("the package triton is not installed: the flow runs in plain PyTorch, slowly")
    if device.type == "cpu":
        limit = MemoLimit(memory)
        return lambda: chunk_flow(flow, limit)
    flow.to(dtype)
    flow.decoder.backend = estimator
    return lambda: PaddedFlow(flow)
