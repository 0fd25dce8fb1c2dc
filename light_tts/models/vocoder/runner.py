"""The vocoder of CosyVoice2 on a GPU, see `padded`."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from light_tts.kernels.vocoder.source import Cached, Draws
from light_tts.models.vocoder.interface import MelBatch
from light_tts.models.vocoder.network import HiftNetwork
from light_tts.models.vocoder.padded import (
    MAX_FRAMES,
    ROWS,
    PaddedRunner,
    draws_of,
    frames_of_graph,
    padded_rows,
)

NUMBERS = 6  # per row: length, seed, stream, first counter, noisy or not, cached samples


class HiftRunner(PaddedRunner["_Room"]):
    """Not thread-safe; several runners may share a network. cached_samples: maximum length of a cached
    source."""

    def __init__(
        self,
        network: HiftNetwork,
        cached_samples: int,
        cuda_graphs: bool = True,
        max_frames: int = MAX_FRAMES,
    ) -> None:
        make_room = partial(_Room, network, cached_samples)
        super().__init__(make_room, network.device, cuda_graphs, max_frames)
        self._samples_per_frame = network.samples_per_frame

    @torch.inference_mode()
    def speak(self, batch: MelBatch) -> tuple[Tensor, Tensor]:
        """Implements `Vocoder.speak`."""
        items, _, frames = batch.mel.shape
        wave = batch.mel.new_empty(items, frames * self._samples_per_frame)
        source = torch.empty_like(wave)
        capacity = frames_of_graph(frames)
        limit = max(self._rows_at_once(capacity))
        for start in range(0, items, limit):
            rows = slice(start, start + limit)
            self._speak(batch.rows(rows), capacity, wave[rows], source[rows])
        return wave, source

    def _speak(self, batch: MelBatch, capacity: int, wave: Tensor, source: Tensor) -> None:
        room, rows = self._run(len(batch.mel), capacity, lambda room, rows: room.fill(batch, rows, capacity))
        for own, results in ((wave, room.wave), (source, room.source)):
            padded = padded_rows(results, rows, capacity * self._samples_per_frame)
            own.copy_(padded[: len(own), : own.shape[1]])


class _Room:
    """See `padded.Room`."""

    def __init__(self, network: HiftNetwork, cached_samples: int, frames: int) -> None:
        samples, device = frames * network.samples_per_frame, network.device
        self.mel = torch.zeros(frames * network.mels, device=device)
        self.wave = torch.zeros(samples, device=device)
        self.source = torch.zeros(samples, device=device)
        self.cached = torch.zeros(ROWS[-1], cached_samples, device=device)
        self.numbers = torch.zeros(NUMBERS, ROWS[-1], dtype=torch.int64, device=device)
        self._network = network

    def fill(self, batch: MelBatch, rows: int, capacity: int) -> None:
        mel = batch.mel
        items, channels, frames = mel.shape
        padded_rows(self.mel, rows, capacity * channels).view(rows, capacity, channels)[:items, :frames] = (
            mel.mT
        )
        columns: list[tuple[int, ...]] = []
        for length, cached, noise in zip(batch.lengths, batch.cached, batch.noises, strict=True):
            first_sample = 0 if noise is None else noise.first_sample
            draws = draws_of(noise, first_sample, self._network.waves)
            columns.append((length, *draws, 0 if cached is None else len(cached)))
        columns += [(0,) * NUMBERS] * (ROWS[-1] - items)
        numbers = torch.tensor(list(zip(*columns, strict=True)), pin_memory=mel.is_cuda)
        self.numbers.copy_(numbers, non_blocking=True)
        if any(cached is not None for cached in batch.cached):
            width = self.cached.shape[1]
            empty = mel.new_zeros(width)
            self.cached[:items] = torch.stack(
                [
                    empty if cached is None else F.pad(cached, (0, width - len(cached)))
                    for cached in batch.cached
                ]
            )

    def compute(self, rows: int, capacity: int) -> None:
        """Implements `Room.compute`."""
        network = self._network
        length, seed, stream, counter, noisy, cached = self.numbers[:, :rows]
        samples = capacity * network.samples_per_frame
        network(
            padded_rows(self.mel, rows, capacity * network.mels).view(rows, capacity, network.mels),
            length.int(),
            Draws(seed, stream, counter, noisy),
            Cached(self.cached[:rows], cached),
            padded_rows(self.source, rows, samples),
            padded_rows(self.wave, rows, samples),
        )
