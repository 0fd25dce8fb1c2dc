"""Random crops of the corpus, and augmentation that simulates recording conditions. Everything runs on the
device with its own random numbers, so that it can be part of a recorded step."""

from __future__ import annotations

import torch
from torch import Tensor

from training.corpus.corpus import Corpus

GAIN = 3.0  # maximum gain or attenuation factor
NOISE = (1e-5, 3e-3)  # standard deviation; full scale is 1
TILT = 0.4  # of the filter 1 - a / z; 4 dB louder or softer at the lowest frequencies


class Crops:
    """Crops of `samples` samples; they start up to `margin` samples before an utterance, and end up to
    `margin` after it, if it is long enough. `weight`: (utterances,), sampling weights."""

    def __init__(self, corpus: Corpus, weight: Tensor, samples: int, margin: int) -> None:
        self._corpus, self._samples, self._margin = corpus, samples, margin
        self._ends = (weight.double() / weight.double().sum()).cumsum(0)

    def draw(self, batch: int) -> tuple[Tensor, Tensor]:
        """Draw utterance and first sample of each crop: (batch,) int64 both."""
        chance = torch.rand(batch, device=self._ends.device, dtype=torch.float64)
        index = torch.searchsorted(self._ends, chance).clamp(max=len(self._ends) - 1)
        free = (self._corpus.samples[index] - self._samples).clamp(min=0) + 2 * self._margin
        share = torch.rand(batch, device=free.device)
        return index, (share * free).long() - self._margin


def disturbed(wave: Tensor) -> Tensor:
    """wave: (batch, samples) -> the same with random gain and white noise."""
    size = (len(wave), 1)
    gain = GAIN ** _uniform(size, -1.0, 1.0, wave)
    low, high = NOISE
    noise = low * (high / low) ** _uniform(size, 0.0, 1.0, wave)
    return gain * wave + noise * torch.randn_like(wave)


def tilted(wave: Tensor) -> Tensor:
    """wave: (batch, samples) -> the same with a random spectral tilt."""
    before = torch.cat([wave[:, :1], wave[:, :-1]], 1)
    return wave - _uniform((len(wave), 1), -TILT, TILT, wave) * before


def _uniform(size: tuple[int, ...], low: float, high: float, like: Tensor) -> Tensor:
    return low + (high - low) * torch.rand(size, device=like.device)
