"""The weights of CosyVoice3's flow for the packed one."""

from __future__ import annotations

import torch

from light_tts.models.flow.dit.flow import DiTFlow
from light_tts.models.flow.dit.packed import PackedDiT
from light_tts.models.flow.dit.packed_encoder import PackedDiTEncoder


def pack(flow: DiTFlow, dtype: torch.dtype) -> tuple[PackedDiT, PackedDiTEncoder]:
    """Return estimator and encoder of a flow in float32, with weights in `dtype`."""
    decoder = flow.decoder
    estimator = PackedDiT(decoder.estimator, decoder.steps, decoder.guidance, dtype)
    return estimator, PackedDiTEncoder(flow, dtype)
