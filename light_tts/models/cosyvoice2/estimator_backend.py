"""Who computes the estimator. The flow calls it through one object, chosen when the process starts."""

from __future__ import annotations

import importlib.util
import logging
from typing import Protocol

import torch
from torch import Tensor

from light_tts.models.cosyvoice2.estimator import Estimator, EstimatorMasks

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


def choose_estimator(module: Estimator, load_trt: bool, device: torch.device) -> EstimatorBackend:
    """`load_trt`: prefer TensorRT; where it cannot serve, one log line says why."""
    if load_trt:
        if device.type != "cuda":
            reason = "this process has no CUDA device"
        elif importlib.util.find_spec("tensorrt") is None:
            reason = "the package tensorrt is not installed"
        else:
            reason = "this version has no TensorRT engine"
        log.warning("load_trt: %s; the built-in flow estimator serves", reason)
    return TorchEstimator(module)
