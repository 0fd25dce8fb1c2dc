"""Speech tokens of a recording."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from light_tts.models.checkpoint.inputs import COSYVOICE2_INPUTS
from light_tts.models.frontend.features import whisper_log_mel
from light_tts.models.frontend.onnx import OnnxModel

FILE_NAME = COSYVOICE2_INPUTS.speech_tokenizer


class OnnxSpeechTokenizer:
    def __init__(self, model_dir: Path, file_name: str = FILE_NAME) -> None:
        self._model = OnnxModel(model_dir / file_name, inputs=2)

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """samples: (n,) float32 at 16 kHz. Returns about n / 640 ids, (tokens,) int32, 25 per second."""
        mel = whisper_log_mel(samples)
        length = np.array([mel.shape[1]], np.int32)
        return self._model.run([mel[None], length]).reshape(-1).astype(np.int32)
