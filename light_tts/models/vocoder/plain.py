"""The vocoder in plain PyTorch, on any device: the reference for `HiftRunner`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from light_tts.common import random
from light_tts.common.cuda_graphs import GraphCache
from light_tts.models.vocoder.hift import Hift
from light_tts.models.vocoder.interface import MelBatch, SourceNoise

NOISE_BLOCK = 32768  # samples


class TorchVocoder:
    """The PyTorch implementation, on any device."""

    graphs: GraphCache | None = None

    def __init__(self, hift: Hift) -> None:
        self._hift = hift

    @torch.inference_mode()
    def speak(self, batch: MelBatch) -> tuple[Tensor, Tensor]:
        noise = self._noise(batch.mel, batch.noises)
        return self._hift.inference(batch.mel, batch.lengths, batch.cached, noise)

    def warm_up(self, items: int, first: bool = True) -> None:
        """Nothing to prepare."""

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
    """Computed in blocks that fit in a processor's cache, because it takes about fifty operations."""
    blocks = places.split(NOISE_BLOCK)
    return torch.cat([random.normal(noise.seed, noise.stream, block) for block in blocks])
