"""Selects the implementation of the estimator when the process starts."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from light_tts.models.flow.masks import EstimatorMasks
from light_tts.models.flow.unet.estimator import Estimator

log = logging.getLogger(__name__)


class EstimatorBackend(Protocol):
    """One evaluation of the velocity field; shapes as in `Estimator.forward`, which those of all families
    share."""

    def __call__(
        self, x: Tensor, masks: EstimatorMasks, mu: Tensor, t: Tensor, spks: Tensor, cond: Tensor
    ) -> Tensor: ...


class TorchEstimator:
    """The PyTorch implementation."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(
        self, x: Tensor, masks: EstimatorMasks, mu: Tensor, t: Tensor, spks: Tensor, cond: Tensor
    ) -> Tensor:
        return self._module(x, masks, mu, t, spks, cond)


def choose_estimator(
    module: Estimator,
    load_trt: bool,
    device: torch.device,
    model_dir: Path | None = None,
    max_batch_size: int = 1,
) -> EstimatorBackend:
    """Return the estimator. `load_trt`: prefer TensorRT, with an engine for `max_batch_size` concurrent
    requests that is kept in `model_dir`; if that fails for any reason, one log line says why."""
    if load_trt:
        reason = _missing(device)
        if not reason:
            try:
                from light_tts.models.flow.trt import engine as estimator_trt

                backend = estimator_trt.load(module, device, model_dir, max_batch_size)
                log.info("load_trt: using a TensorRT engine")
                return backend
            except Exception as error:  # TensorRT is optional: its failure must not prevent the start
                log.debug("TensorRT cannot be used", exc_info=True)
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        log.warning("load_trt: %s; using the built-in flow estimator", reason)
    return TorchEstimator(module)


def _missing(device: torch.device) -> str:
    if device.type != "cuda":
        return "this process has no CUDA device"
    if importlib.util.find_spec("tensorrt") is None:
        return "the package tensorrt is not installed"
    return ""
