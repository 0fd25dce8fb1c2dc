"""The features of a voice that the models use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PromptFeatures:
    """Features of a prompt recording.

    speech_token: (n,) int32, 25 Hz; mel: (2n, 80) float32, 50 Hz, aligned with the tokens; embedding: (192,)
    float32, of the speaker. A voice without a recording has n = 0.
    """

    speech_token: np.ndarray
    mel: np.ndarray
    embedding: np.ndarray
