"""Converts speech tokens to samples chunk by chunk: flow and vocoder.

For each chunk the flow runs over all tokens so far, and the new mel frames are kept. How the vocoder
continues from the previous chunk depends on its kind, see `Vocoding`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from light_tts.common.cuda_graphs import GraphCache
from light_tts.engine.speech.causal_vocoding import CausalVocoding
from light_tts.engine.speech.faded_vocoding import FadedVocoding
from light_tts.engine.speech.vocoding import Vocoding
from light_tts.engine.speech.work_item import WorkItem
from light_tts.models.flow.interface import FlowBackend, FlowItem
from light_tts.models.vocoder.interface import CausalVocoder, Vocoder


class Rates(Protocol):
    """Rates of a model family, for counting samples."""

    @property
    def sample_rate(self) -> int: ...

    @property
    def frames_per_token(self) -> int: ...

    @property
    def samples_per_frame(self) -> int: ...


class Token2Wav:
    """Flow and vocoder of one model. `flow` and `vocoder`: see models/flow/backend.py and
    models/vocoder/backend.py. `full_last_chunk`: compute the last chunk of a stream with full attention (the
    official schedule with growing chunks) rather than with the chunk mask like the others."""

    def __init__(
        self,
        flow: FlowBackend,
        vocoder: Vocoder | CausalVocoder,
        rates: Rates,
        full_last_chunk: bool,
        device: torch.device,
    ) -> None:
        self.flow = flow
        self.sample_rate = rates.sample_rate
        self.frames_per_token = rates.frames_per_token
        self._vocoder = vocoder
        self._vocoding = _vocoding(vocoder, rates, device)
        self._full_last_chunk = full_last_chunk

    @property
    def held_back(self) -> int:
        """See `Vocoding`."""
        return self._vocoding.held_back

    @property
    def replayed(self) -> int | None:
        """See `Vocoding`."""
        return self._vocoding.replayed

    def warm_up(self, items: int, first: bool = True) -> None:
        """Do in advance what a first chunk would have to wait for; `record_next` does the rest for batches of
        up to `items` chunks. `first`: this is the first of the instances that share weights."""
        self.flow.warm_up(items, first)
        self._vocoder.warm_up(items, first)

    @property
    def recorded(self) -> int:
        """Number of CUDA graphs."""
        return sum(len(graphs) for graphs in self._graphs())

    @property
    def unrecorded(self) -> int:
        """Number of CUDA graphs that can still be recorded."""
        return sum(graphs.unrecorded for graphs in self._graphs())

    def record_next(self) -> None:
        """Record one more CUDA graph, of the flow first."""
        next((graphs for graphs in self._graphs() if graphs.record_next()), None)

    def _graphs(self) -> list[GraphCache]:
        return [graphs for graphs in (self.flow.graphs, self._vocoder.graphs) if graphs is not None]

    def streaming(self, item: WorkItem) -> bool:
        """Return whether the flow uses the chunk mask; only items that agree share a batch of the flow."""
        return item.stream and not (item.chunk.final and self._full_last_chunk)

    def frames(self, item: WorkItem) -> int:
        """Return the number of mel frames that the flow computes for a chunk, including its look-ahead."""
        voice, state = item.state.voice, item.state
        frames = self.frames_per_token * (len(voice.speech_token) + item.chunk.context_end)
        return frames - (self.flow.cached_frames(voice.memo, state.memo) if self.streaming(item) else 0)

    @torch.inference_mode()
    def speak(self, items: Sequence[WorkItem]) -> list[np.ndarray]:
        """Return the new samples of each chunk, float32. States are updated only if everything succeeds."""
        return self._vocoding.speak(items, self._mels(items))

    def _mels(self, items: Sequence[WorkItem]) -> list[Tensor]:
        """Return the new mel frames of each item: (mel channels, frames), empty without new tokens."""
        filled = [item for item in items if item.chunk.end > item.chunk.start]
        mels = iter(self.flow([self._flow_item(item) for item in filled]) if filled else ())
        return [
            self._new_frames(item, next(mels))
            if item.chunk.end > item.chunk.start
            else item.state.voice.mel[:0].T
            for item in items
        ]

    def _new_frames(self, item: WorkItem, mel: Tensor) -> Tensor:
        """mel: (frames, mel channels) of the whole part -> those of the chunk, (mel channels, frames)."""
        start, end = (edge * self.frames_per_token for edge in (item.chunk.start, item.chunk.end))
        return self._at_speed(mel[start:end].T, item.state.speed)

    def _flow_item(self, item: WorkItem) -> FlowItem:
        voice = item.state.voice
        return FlowItem(
            prompt=voice.speech_token,
            prompt_mel=voice.mel,
            embedding=voice.embedding,
            tokens=item.tokens[: item.chunk.context_end],
            streaming=self.streaming(item),
            finalize=item.chunk.final,
            voice_memo=voice.memo,
            stream_memo=item.state.memo,
        )

    def _at_speed(self, mel: Tensor, speed: float) -> Tensor:
        """Resample mel: (mel channels, frames) to max(1, int(frames / speed)) frames."""
        if speed == 1.0:
            return mel
        size = max(1, int(mel.shape[1] / speed))
        return F.interpolate(mel[None], size=size, mode="linear")[0]


def _vocoding(vocoder: Vocoder | CausalVocoder, rates: Rates, device: torch.device) -> Vocoding:
    if isinstance(vocoder, CausalVocoder):
        return CausalVocoding(vocoder)
    return FadedVocoding(vocoder, rates.frames_per_token, rates.samples_per_frame, device)


def to_pcm16(wave: np.ndarray) -> np.ndarray:
    """Convert float32 in (-1, 1) to int16, rounding toward zero."""
    return (wave * 32768).astype(np.int16)
