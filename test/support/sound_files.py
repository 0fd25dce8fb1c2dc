"""Decodes sound files of any format."""

from __future__ import annotations

import io

import av
import numpy as np


def decode(audio: bytes) -> tuple[np.ndarray, int]:
    """Every sample of a sound file of any format, (n,) float32 mono, and its rate. Raises where any of it
    cannot be decoded."""
    with av.open(io.BytesIO(audio)) as file:
        to_float = av.AudioResampler(format="flt", layout="mono")
        frames = [part for frame in file.decode(audio=0) for part in to_float.resample(frame)]
        frames += to_float.resample(None)
        return np.concatenate([frame.to_ndarray()[0] for frame in frames]), frames[0].sample_rate


def seconds(audio: bytes) -> float:
    samples, rate = decode(audio)
    return len(samples) / rate
