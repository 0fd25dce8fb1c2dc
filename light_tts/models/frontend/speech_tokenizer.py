"""Speech tokens of a recording (speech_tokenizer_v2.onnx)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from light_tts.models.frontend.features import whisper_log_mel
from light_tts.models.frontend.onnx import OnnxModel

FILE_NAME = "speech_tokenizer_v2.onnx"


class OnnxSpeechTokenizer:
    def __init__(self, model_dir: Path) -> None:
        self._model = OnnxModel(model_dir / FILE_NAME, inputs=2)

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """samples: (n,) float32 at 16 kHz. Returns about n / 640 ids, (tokens,) int32, 25 per second."""
        mel = whisper_log_mel(samples)
        length = np.array([mel.shape[1]], np.int32)
        return self._model.run([mel[None], length]).reshape(-1).astype(np.int32)
