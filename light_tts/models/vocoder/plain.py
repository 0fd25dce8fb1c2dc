"""The vocoder in plain PyTorch, on any device: the reference for `HiftRunner`."""

from __future__ import annotations

import torch
from torch import Tensor

from light_tts.common import random
from light_tts.common.cuda_graphs import GraphCache
from light_tts.models.vocoder.hift import Hift
from light_tts.models.vocoder.interface import MelBatch
from light_tts.models.vocoder.noise import source_noise


class TorchVocoder:
    """The PyTorch implementation, on any device."""

    graphs: GraphCache | None = None

    def __init__(self, hift: Hift) -> None:
        self._hift = hift

    @torch.inference_mode()
    def speak(self, batch: MelBatch) -> tuple[Tensor, Tensor]:
        samples, waves = batch.mel.shape[2] * self._hift.samples_per_frame, self._hift.m_source.waves
        noise = source_noise(random.normal, batch.noises, samples, waves, batch.mel.device)
        return self._hift.inference(batch.mel, batch.lengths, batch.cached, noise)

    def warm_up(self, items: int, first: bool = True) -> None:
        """Nothing to prepare."""
