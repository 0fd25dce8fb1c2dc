"""Who turns mel spectrograms into waves: `Hift` in PyTorch, or its kernels in CUDA graphs on a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from light_tts.common import random
from light_tts.models.vocoder.hift import Hift

NOISE_BLOCK = 32768  # samples


@dataclass(frozen=True)
class SourceNoise:
    """The noise of one item's source: a function of seed, part, and place in the part. first_sample: place of
    the item's first sample."""

    seed: int
    part: int
    first_sample: int

    @property
    def stream(self) -> int:
        return random.stream_of(random.Purpose.SOURCE, self.part)


class Vocoder(Protocol):
    def speak(
        self,
        mel: Tensor,
        lengths: Sequence[int],
        cache_source: Sequence[Tensor | None],
        noises: Sequence[SourceNoise | None],
    ) -> tuple[Tensor, Tensor]:
        """mel: (batch, mel channels, frames) float32 on the device; for each item: its frames, the samples
        that its source shall begin with (None: none), its noise (None: none) -> wave and source, both (batch,
        samples) float32 and the caller's own; beyond an item's end the wave is zero and the source means
        nothing. An item's samples do not depend on its neighbours."""
        ...

    def warm_up(self, items: int) -> None:
        """Do what a first batch of up to `items` would have to wait for."""
        ...


class TorchVocoder:
    """The plain path, on any device."""

    def __init__(self, hift: Hift) -> None:
        self._hift = hift

    @torch.inference_mode()
    def speak(
        self,
        mel: Tensor,
        lengths: Sequence[int],
        cache_source: Sequence[Tensor | None],
        noises: Sequence[SourceNoise | None],
    ) -> tuple[Tensor, Tensor]:
        return self._hift.inference(mel, lengths, cache_source, self._noise(mel, noises))

    def warm_up(self, items: int) -> None:
        """Nothing is waited for."""

    def _noise(self, mel: Tensor, noises: Sequence[SourceNoise | None]) -> Tensor | None:
        if not any(noises):
            return None
        waves, samples = self._hift.m_source.waves, mel.shape[2] * self._hift.samples_per_frame
        places = torch.arange(samples * waves, device=mel.device)
        rows = [
            torch.zeros(samples * waves, device=mel.device)
            if noise is None
            else _normal(noise, places + noise.first_sample * waves)
            for noise in noises
        ]
        return torch.stack(rows).view(len(rows), samples, waves)


def _normal(noise: SourceNoise, places: Tensor) -> Tensor:
    """By blocks that stay in a processor's cache: it takes some fifty operations."""
    blocks = places.split(NOISE_BLOCK)
    return torch.cat([random.normal(noise.seed, noise.stream, block) for block in blocks])


def choose_vocoder(hift: Hift, cached_samples: int, cuda_graphs: bool = True) -> Callable[[], Vocoder]:
    """The fastest that runs where `hift` is. -> makes one for each CUDA stream that computes; they share
    their weights. cached_samples: the most that a source begins with; cuda_graphs: record the kernels of each
    size when it is first met."""
    device = next(hift.parameters()).device
    if device.type != "cuda" or importlib.util.find_spec("triton") is None or hift.n_fft != 4 * hift.hop:
        return lambda: TorchVocoder(hift)
    from light_tts.models.vocoder.network import HiftNetwork
    from light_tts.models.vocoder.runner import HiftRunner

    network = HiftNetwork(hift)
    return lambda: HiftRunner(network, cached_samples, cuda_graphs)
