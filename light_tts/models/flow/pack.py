"""The weights of CosyVoice2's flow for the packed one."""

from __future__ import annotations

import torch

from light_tts.models.flow.flow import Flow
from light_tts.models.flow.packed_encoder import PackedEncoder
from light_tts.models.flow.unet.packed import PackedEstimator


def pack(flow: Flow, dtype: torch.dtype) -> tuple[PackedEstimator, PackedEncoder]:
    """Return estimator and encoder of a flow in float32, with weights in `dtype`."""
    decoder = flow.decoder
    estimator = PackedEstimator(decoder.estimator, decoder.steps, decoder.guidance, dtype)
    return estimator, PackedEncoder(flow, dtype)
