"""Who computes the estimator. The flow calls it through one object, chosen when the process starts."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from light_tts.models.flow.unet.estimator import Estimator, EstimatorMasks

log = logging.getLogger(__name__)


class EstimatorBackend(Protocol):
    """One evaluation of the velocity; shapes as in `Estimator.forward`."""

    def __call__(
        self, x: Tensor, masks: EstimatorMasks, mu: Tensor, t: Tensor, spks: Tensor, cond: Tensor
    ) -> Tensor: ...


class TorchEstimator:
    """The built-in path."""

    def __init__(self, module: Estimator) -> None:
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
    """`load_trt`: prefer TensorRT, with an engine for `max_batch_size` requests at once that is kept in
    `model_dir`; where it cannot serve, whatever the cause, one log line says why."""
    if load_trt:
        reason = _missing(device)
        if not reason:
            try:
                from light_tts.models.flow.trt import engine as estimator_trt

                backend = estimator_trt.load(module, device, model_dir, max_batch_size)
                log.info("load_trt: a TensorRT engine serves")
                return backend
            except Exception as error:  # TensorRT is an option: its failure must not end the start
                log.debug("TensorRT cannot be used", exc_info=True)
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        log.warning("load_trt: %s; the built-in flow estimator serves", reason)
    return TorchEstimator(module)


def _missing(device: torch.device) -> str:
    if device.type != "cuda":
        return "this process has no CUDA device"
    if importlib.util.find_spec("tensorrt") is None:
        return "the package tensorrt is not installed"
    return ""
