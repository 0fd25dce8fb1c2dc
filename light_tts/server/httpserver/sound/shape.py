"""Streaming filters for samples: each takes and returns (n,) float32, full scale 1.

`push` returns what is ready, `finish` the rest. The result does not depend on how the stream is divided.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Protocol

import av
import numpy as np
import soxr

MIN_TEMPO = 0.5  # limit of one atempo filter; several are chained for slower speech
FADE_SECONDS = 0.005
SILENCE = 0.01  # -40 dBFS
_EMPTY = np.zeros(0, np.float32)


class SoundStep(Protocol):
    def push(self, samples: np.ndarray) -> np.ndarray: ...

    def finish(self) -> np.ndarray: ...


class Tempo:
    """Speeds up by a factor of `speed` at the same pitch (FFmpeg's atempo)."""

    def __init__(self, rate: int, speed: float) -> None:
        self._rate = rate
        self._position = 0
        graph = self._graph = av.filter.Graph()
        self._source = graph.add_abuffer(
            format="flt", sample_rate=rate, layout="mono", time_base=Fraction(1, rate)
        )
        filters = max(1, math.ceil(math.log(speed, MIN_TEMPO)))
        each = repr(speed ** (1 / filters))
        nodes = [graph.add("atempo", each) for _ in range(filters)]
        graph.link_nodes(self._source, *nodes, graph.add("abuffersink")).configure()

    def push(self, samples: np.ndarray) -> np.ndarray:
        if not len(samples):
            return _EMPTY
        frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
        frame.sample_rate, frame.pts = self._rate, self._position
        self._position += len(samples)
        self._source.push(frame)
        return self._drain()

    def finish(self) -> np.ndarray:
        self._source.push(None)
        return self._drain()

    def _drain(self) -> np.ndarray:
        pieces = [_EMPTY]
        while True:
            try:
                pieces.append(self._graph.pull().to_ndarray()[0])
            except (av.BlockingIOError, av.EOFError):
                return np.concatenate(pieces)


class Resampler:
    """Converts one sample rate to another."""

    def __init__(self, rate: int, new_rate: int) -> None:
        self._stream = soxr.ResampleStream(rate, new_rate, 1, dtype="float32")

    def push(self, samples: np.ndarray) -> np.ndarray:
        return self._stream.resample_chunk(samples)

    def finish(self) -> np.ndarray:
        return self._stream.resample_chunk(_EMPTY, last=True)


class PauseLimit:
    """Cuts silences longer than `seconds` to `seconds`, at the beginning and inside; the end is unchanged."""

    def __init__(self, rate: int, seconds: float) -> None:
        self._longest = round(rate * seconds)
        self._silent = 0  # samples of the current pause so far

    def push(self, samples: np.ndarray) -> np.ndarray:
        if not len(samples):
            return _EMPTY
        at = np.arange(len(samples))
        loud = np.abs(samples) >= SILENCE
        latest = np.maximum.accumulate(np.where(loud, at, -1 - self._silent))
        pause = at - latest  # 0 for loud samples, else the length of the silence so far
        self._silent = int(pause[-1])
        return samples[pause <= self._longest]

    def finish(self) -> np.ndarray:
        return _EMPTY


class Fade:
    """Fades in the beginning and fades out the end, to avoid clicks."""

    def __init__(self, rate: int) -> None:
        length = max(1, round(rate * FADE_SECONDS))
        self._ramp = ((np.arange(length) + 0.5) / length).astype(np.float32)
        self._begun = 0  # number of samples already faded in
        self._held = _EMPTY  # may turn out to be the end

    def push(self, samples: np.ndarray) -> np.ndarray:
        rising = self._ramp[self._begun : self._begun + len(samples)]
        if len(rising):
            samples = samples.copy()
            samples[: len(rising)] *= rising
            self._begun += len(rising)
        joined = np.concatenate((self._held, samples))
        cut = max(0, len(joined) - len(self._ramp))
        self._held = joined[cut:]
        return joined[:cut]

    def finish(self) -> np.ndarray:
        held, self._held = self._held, _EMPTY
        return held * self._ramp[::-1][len(self._ramp) - len(held) :]
