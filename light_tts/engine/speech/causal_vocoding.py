"""Mel frames to samples with a causal vocoder (CosyVoice3), which continues a part where it stopped. The
phase of its source depends on all frames before, so a stream is resumed by speaking all its chunks again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from light_tts.common.transfer import Download
from light_tts.engine.speech.work_item import SpeechState, WorkItem
from light_tts.models.vocoder.interface import CausalItem, CausalVocoder, SourceNoise


class CausalVocoding:
    """Implements `Vocoding`."""

    replayed: int | None = None

    def __init__(self, vocoder: CausalVocoder) -> None:
        self.held_back = vocoder.held_back
        self._vocoder = vocoder

    def speak(self, items: Sequence[WorkItem], mels: Sequence[Tensor]) -> list[np.ndarray]:
        """Implements `Vocoding.speak`."""
        rows = [row for row, item in enumerate(items) if mels[row].shape[1] or item.state.causal is not None]
        spoken = self._vocode([items[row] for row in rows], [mels[row] for row in rows]) if rows else []
        waves = dict(zip(rows, spoken, strict=True))
        return [waves.get(row, np.zeros(0, np.float32)) for row in range(len(items))]

    def _vocode(self, items: Sequence[WorkItem], mels: Sequence[Tensor]) -> list[np.ndarray]:
        spoken = self._vocoder.speak(
            [
                CausalItem(mel, item.state.causal, item.chunk.final, _noise(item.state))
                for item, mel in zip(items, mels, strict=True)
            ]
        )
        waves = [wave for wave, _ in spoken]
        urgent = any(item.is_first for item in items)
        on_host = Download(torch.cat(waves), urgent).wait().numpy()
        for item, (_, state) in zip(items, spoken, strict=True):
            item.state.causal = state
        return np.split(on_host, np.cumsum([len(wave) for wave in waves[:-1]]))


def _noise(state: SpeechState) -> SourceNoise | None:
    return None if state.seed is None else SourceNoise(state.seed, state.part, first_sample=0)
