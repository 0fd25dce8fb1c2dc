"""Naturalness on a scale of 1 to 5: DistillMOS, a small network that predicts listener ratings."""

from __future__ import annotations

import contextlib
import io
import sys
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np


@cache
def _model() -> Any:
    # distillmos imports torchaudio only for its command line, and torchaudio's wheels load only with the
    # PyTorch build they were made for.
    sys.modules["torchaudio"] = ModuleType("torchaudio")
    try:
        from distillmos import ConvTransformerSQAModel
    finally:
        del sys.modules["torchaudio"]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the location of its weights
        return ConvTransformerSQAModel().eval()


def naturalness(wave16k: np.ndarray) -> float:
    """Return the MOS of (samples,) float32 at 16 kHz."""
    import torch

    with torch.inference_mode():
        return float(_model()(torch.from_numpy(wave16k)[None]))
