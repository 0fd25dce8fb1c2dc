"""Reads sound files and measures how long the speech in them is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile

from light_tts.common.audio import AudioError, read_audio, resample

RATE = 16_000  # Hz; input rate of all measures
LONGEST = 600.0  # seconds
FRAME = 0.02  # seconds
AUDIBLE = 0.01  # relative to the loudest frame: -40 dB


@dataclass(frozen=True)
class Sound:
    """wave: (samples,) float32, full scale 1; rate: Hz."""

    wave: np.ndarray
    rate: int

    @property
    def seconds(self) -> float:
        return len(self.wave) / self.rate

    @property
    def wave16k(self) -> np.ndarray:
        return resample(self.wave, self.rate, RATE)

    @property
    def spoken_seconds(self) -> float:
        """Return the duration from the first audible frame to the last; 0 for silence."""
        size = round(FRAME * self.rate)
        frames = self.wave[: len(self.wave) // size * size].reshape(-1, size)
        loudness = np.sqrt(np.mean(np.square(frames), axis=1))
        audible = np.flatnonzero(loudness > AUDIBLE * loudness.max(initial=0.0))
        return float(audible[-1] - audible[0] + 1) * FRAME if len(audible) else 0.0

    def save(self, path: Path) -> None:
        """Write a 16-bit WAV file."""
        soundfile.write(path, self.wave, self.rate, subtype="PCM_16")


@lru_cache
def read_sound(path: Path) -> Sound:
    """Raises OSError, or ValueError naming the file."""
    try:
        return Sound(*read_audio(path.read_bytes(), 0.0, LONGEST))
    except AudioError as error:
        raise ValueError(f"{path}: {error}") from None
