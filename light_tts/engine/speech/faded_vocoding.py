"""Mel frames to samples with a vocoder that sees frames on both sides (CosyVoice2).

The vocoder also gets the last frames of the previous chunk, its source continues the previous one, and the
overlap is cross-faded, so that chunk boundaries are inaudible. What a chunk passes to the next is its `Tail`,
which depends only on this chunk and the previous one, so a stream is resumed by speaking its last two chunks
again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from light_tts.common.transfer import Download
from light_tts.engine.speech.work_item import Tail, WorkItem
from light_tts.models.vocoder.interface import MelBatch, SourceNoise, Vocoder

OVERLAP_FRAMES = 8  # mel frames shared by two chunks
REPLAYED_CHUNKS = 2  # number of chunks to speak again in order to continue after them


class FadedVocoding:
    """Implements `Vocoding`."""

    replayed: int | None = REPLAYED_CHUNKS

    def __init__(
        self, vocoder: Vocoder, frames_per_token: int, samples_per_frame: int, device: torch.device
    ) -> None:
        self.held_back = OVERLAP_FRAMES * samples_per_frame
        self._vocoder = vocoder
        self._frames_per_token = frames_per_token
        self._samples_per_frame = samples_per_frame
        # float64, like NumPy's window in the reference
        window = torch.from_numpy(np.hamming(2 * self.held_back)).to(device)
        self._fade_in, self._fade_out = window[: self.held_back], window[self.held_back :]

    def speak(self, items: Sequence[WorkItem], mels: Sequence[Tensor]) -> list[np.ndarray]:
        """Implements `Vocoding.speak`."""
        filled = [row for row, mel in enumerate(mels) if mel.shape[1]]
        spoken: list[np.ndarray] = []
        if filled:
            spoken = self._vocode([items[row] for row in filled], [mels[row] for row in filled])
        waves = dict(zip(filled, spoken, strict=True))
        return [waves[row] if row in waves else _held_back(item) for row, item in enumerate(items)]

    def _vocode(self, items: Sequence[WorkItem], mels: Sequence[Tensor]) -> list[np.ndarray]:
        states = [item.state for item in items]
        tails = [state.tail for state in states]
        mels = [
            mel if tail is None else torch.cat([tail.mel, mel], dim=1)
            for mel, tail in zip(mels, tails, strict=True)
        ]
        lengths = [mel.shape[1] for mel in mels]
        batch = pad_sequence([mel.T for mel in mels], batch_first=True).transpose(1, 2).contiguous()
        sources = [None if tail is None else tail.source for tail in tails]
        noises = [self._noise(item) for item in items]
        wave, source = self._vocoder.speak(MelBatch(batch, lengths, sources, noises))
        self._cross_fade(wave, tails)
        samples = [length * self._samples_per_frame for length in lengths]
        download = Download(wave, urgent=any(item.is_first for item in items))
        following = self._tails(mels, wave, source, samples)  # computed while the samples are copied
        on_host = download.wait().numpy()
        for item, tail in zip(items, following, strict=True):
            item.state.tail = None if item.chunk.final else tail
        return [
            on_host[row, : length - (0 if item.chunk.final else self.held_back)]
            for row, (item, length) in enumerate(zip(items, samples, strict=True))
        ]

    def _cross_fade(self, wave: Tensor, tails: Sequence[Tail | None]) -> None:
        """Cross-fade in place the beginning of each item that continues another. wave: (batch, samples)"""
        rows = [row for row, tail in enumerate(tails) if tail is not None]
        if rows:
            old = torch.stack([tail.speech for tail in tails if tail is not None])
            new = wave[rows, : self.held_back]
            wave[rows, : self.held_back] = (new * self._fade_in + old * self._fade_out).to(wave.dtype)

    def _tails(
        self, mels: Sequence[Tensor], wave: Tensor, source: Tensor, samples: Sequence[int]
    ) -> list[Tail | None]:
        """Return copies of what each item passes to the next, so that the batch need not be kept. None for
        items that are too short."""
        rows = [row for row, mel in enumerate(mels) if mel.shape[1] >= OVERLAP_FRAMES]
        found: list[Tail | None] = [None] * len(mels)
        if rows:
            ends = [slice(samples[row] - self.held_back, samples[row]) for row in rows]
            mel = torch.stack([mels[row][:, -OVERLAP_FRAMES:] for row in rows])
            source = torch.stack([source[row, end] for row, end in zip(rows, ends, strict=True)])
            speech = torch.stack([wave[row, end] for row, end in zip(rows, ends, strict=True)])
            for index, row in enumerate(rows):
                found[row] = Tail(mel[index], source[index], speech[index])
        return found

    def _noise(self, item: WorkItem) -> SourceNoise | None:
        """Return the noise of the source as a function of seed, part and position in the part."""
        state = item.state
        if state.seed is None:
            return None
        first = item.chunk.start * self._frames_per_token - (OVERLAP_FRAMES if state.tail else 0)
        return SourceNoise(state.seed, state.part, first * self._samples_per_frame)


def _held_back(item: WorkItem) -> np.ndarray:
    """Return the held-back samples once no token is left."""
    tail = item.state.tail
    return np.zeros(0, np.float32) if tail is None else tail.speech.cpu().numpy()
