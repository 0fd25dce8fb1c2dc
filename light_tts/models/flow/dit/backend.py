"""Selects the implementation of the flow with a diffusion transformer: on a CPU one item at a time with
cached streams, on a GPU padded batches with CUDA graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from light_tts.models.checkpoint.cosyvoice3_config import Config3
from light_tts.models.flow.chunked import chunk_flow
from light_tts.models.flow.dit.flow import DiTFlow
from light_tts.models.flow.dit.graphed import EulerStep, GraphedFlow
from light_tts.models.flow.interface import FlowBackend
from light_tts.models.flow.memos import MemoLimit
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
    share their weights, which are float32: in half precision this model is unreliable. Unless `dtype` is
    float32, a GPU multiplies in TF32. `ended`: called after each phase of the loading with its name. Raises
    CheckpointError."""
    if options.load_trt:
        log.warning("load_trt: TensorRT is not supported for CosyVoice3; using the built-in flow estimator")
    if options.n_timesteps is not None:
        config = replace(config, flow=replace(config.flow, n_timesteps=options.n_timesteps))
    flow = DiTFlow.from_checkpoint(model_dir, config, device)
    ended("flow weights")
    if device.type == "cpu":
        limit = MemoLimit(options.memory)
        return lambda: chunk_flow(flow, limit)
    if dtype != torch.float32:
        torch.set_float32_matmul_precision("high")
    step = EulerStep(flow.decoder)
    return lambda: GraphedFlow(flow, step)
