"""Recordings of a whole number of chunks, without touching a word. numpy only, for the HTTP workers."""

from __future__ import annotations

import numpy as np

FRAME_SECONDS = 0.01
QUIET = 0.01  # of the loudest frame (-40 dB): quieter frames are silence
KEPT_SECONDS = 0.1  # of the silence at either end


def in_whole_chunks(samples: np.ndarray, rate: int, chunk_seconds: float) -> np.ndarray:
    """samples: (n,) float32 at `rate` Hz -> as much of them as fills whole chunks: silence is cut off, at the
    beginning first, since the pause behind the last word keeps it apart from what is spoken next. Where there
    is not enough of it, silence is added in front of the recording up to a whole chunk."""
    chunk = round(chunk_seconds * rate)
    excess = len(samples) % chunk
    before, behind = _silence(samples, rate)
    if excess <= before + behind and excess < len(samples):
        from_start = min(excess, before)
        return samples[from_start : len(samples) - (excess - from_start)]
    return np.concatenate([np.zeros(chunk - excess, samples.dtype), samples])


def _silence(samples: np.ndarray, rate: int) -> tuple[int, int]:
    """How many samples can be cut off at the beginning and at the end."""
    frame = round(FRAME_SECONDS * rate)
    frames = samples[: len(samples) // frame * frame].reshape(-1, frame)
    level = np.sqrt(np.mean(frames.astype(np.float64) ** 2, axis=1))
    (loud,) = np.nonzero(level > QUIET * level.max(initial=0.0))
    if not len(loud):
        return 0, 0
    kept = round(KEPT_SECONDS * rate)
    end = (loud[-1] + 1) * frame
    return max(0, int(loud[0]) * frame - kept), max(0, len(samples) - int(end) - kept)
