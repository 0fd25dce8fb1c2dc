"""How natural it sounds, 1 to 5: DistillMOS, a small network's guess of what listeners would say."""

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
    # distillmos imports torchaudio for its command line alone, and torchaudio's wheels load only beside the
    # build of PyTorch that they were made for.
    sys.modules["torchaudio"] = ModuleType("torchaudio")
    try:
        from distillmos import ConvTransformerSQAModel
    finally:
        del sys.modules["torchaudio"]
    with contextlib.redirect_stdout(io.StringIO()):  # it says where its weights are
        return ConvTransformerSQAModel().eval()


def naturalness(wave16k: np.ndarray) -> float:
    """MOS of (samples,) float32 at 16 kHz."""
    import torch

    with torch.inference_mode():
        return float(_model()(torch.from_numpy(wave16k)[None]))
