"""Converts speech tokens to samples chunk by chunk: flow and vocoder, overlapped so that chunk boundaries are
inaudible.

For each chunk the flow runs over all tokens so far, and the new mel frames are kept. The vocoder also gets
the last frames of the previous chunk, its source continues the previous one, and the overlap is cross-faded.
What a chunk passes to the next is its `Tail`, which depends only on this chunk and the previous one, so a
stream is resumed by speaking its last two chunks again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from light_tts.common.cuda_graphs import GraphCache
from light_tts.common.prompt_features import PromptFeatures
from light_tts.common.transfer import Download
from light_tts.engine.speech.chunk_planner import Chunk
from light_tts.models.flow.interface import FlowBackend, FlowItem
from light_tts.models.flow.memos import Memo
from light_tts.models.vocoder.interface import MelBatch, SourceNoise, Vocoder

OVERLAP_FRAMES = 8  # mel frames shared by two chunks
REPLAYED_CHUNKS = 2  # number of chunks to speak again in order to continue after them


@dataclass(frozen=True)
class Voice:
    """A prompt. speech_token: (n,) int32 on the host; mel: (frames, mel channels) and embedding: (size,) on
    the device; memo: used by the flow."""

    speech_token: np.ndarray
    mel: Tensor
    embedding: Tensor
    memo: Memo = field(default_factory=Memo)

    @classmethod
    def of(cls, features: PromptFeatures, device: torch.device | str) -> Voice:
        """Create a voice from a copy of the features: shared memory may be read-only."""

        def on_device(array: np.ndarray) -> Tensor:
            return torch.tensor(array, dtype=torch.float32).to(device)

        tokens = np.array(features.speech_token, dtype=np.int32)
        return cls(tokens, on_device(features.mel), on_device(features.embedding))


@dataclass(frozen=True)
class Tail:
    """State passed to the next chunk. mel: (mel channels, OVERLAP_FRAMES); source, speech: (samples,) for
    these frames; the speech has not been delivered yet."""

    mel: Tensor
    source: Tensor
    speech: Tensor


@dataclass
class SpeechState:
    """State of one part. `seed` and `part` determine the noise of the source; seed None: no noise. `speed`
    other than 1 is for parts that are one chunk. memo: used by the flow."""

    voice: Voice
    seed: int | None
    part: int = 0
    speed: float = 1.0
    tail: Tail | None = None
    memo: Memo = field(default_factory=Memo)


@dataclass(frozen=True)
class WorkItem:
    """Speak `chunk` of a part. tokens: the part's ids from its start, at least up to `chunk.context_end`, all
    below the flow's vocabulary size. `stream`: whether the part is spoken in chunks."""

    state: SpeechState
    tokens: Sequence[int]
    chunk: Chunk
    stream: bool


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
        self, flow: FlowBackend, vocoder: Vocoder, rates: Rates, full_last_chunk: bool, device: torch.device
    ) -> None:
        self.flow = flow
        self.sample_rate = rates.sample_rate
        self.frames_per_token = rates.frames_per_token
        self.samples_per_frame = rates.samples_per_frame
        self.overlap = OVERLAP_FRAMES * self.samples_per_frame
        self._vocoder = vocoder
        self._full_last_chunk = full_last_chunk
        # float64, like NumPy's window in the reference
        window = torch.from_numpy(np.hamming(2 * self.overlap)).to(device)
        self._fade_in, self._fade_out = window[: self.overlap], window[self.overlap :]

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

    def samples(self, chunk: Chunk) -> int:
        """Return the number of samples of the part that have been delivered after a chunk of a stream (at
        speed 1)."""
        total = chunk.end * self.frames_per_token * self.samples_per_frame
        return total if chunk.final else total - self.overlap

    @torch.inference_mode()
    def speak(self, items: Sequence[WorkItem]) -> list[np.ndarray]:
        """Return the new samples of each chunk, float32. States are updated only if everything succeeds."""
        filled = [item for item in items if item.chunk.end > item.chunk.start]
        spoken = iter(self._vocode(filled, self._mels(filled)) if filled else ())
        return [next(spoken) if item.chunk.end > item.chunk.start else _held_back(item) for item in items]

    def _mels(self, items: Sequence[WorkItem]) -> list[Tensor]:
        """Return the new mel frames of each item: (mel channels, frames)."""
        mels = self.flow([self._flow_item(item) for item in items])
        found = []
        for item, mel in zip(items, mels, strict=True):
            start, end = (edge * self.frames_per_token for edge in (item.chunk.start, item.chunk.end))
            found.append(self._at_speed(mel[start:end].T, item.state.speed))
        return found

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
        samples = [length * self.samples_per_frame for length in lengths]
        download = Download(wave)
        following = self._tails(mels, wave, source, samples)  # computed while the samples are copied
        on_host = download.wait().numpy()
        for item, tail in zip(items, following, strict=True):
            item.state.tail = None if item.chunk.final else tail
        return [
            on_host[row, : length - (0 if item.chunk.final else self.overlap)]
            for row, (item, length) in enumerate(zip(items, samples, strict=True))
        ]

    def _cross_fade(self, wave: Tensor, tails: Sequence[Tail | None]) -> None:
        """Cross-fade in place the beginning of each item that continues another. wave: (batch, samples)"""
        rows = [row for row, tail in enumerate(tails) if tail is not None]
        if rows:
            old = torch.stack([tail.speech for tail in tails if tail is not None])
            new = wave[rows, : self.overlap]
            wave[rows, : self.overlap] = (new * self._fade_in + old * self._fade_out).to(wave.dtype)

    def _tails(
        self, mels: Sequence[Tensor], wave: Tensor, source: Tensor, samples: Sequence[int]
    ) -> list[Tail | None]:
        """Return copies of what each item passes to the next, so that the batch need not be kept. None for
        items that are too short."""
        rows = [row for row, mel in enumerate(mels) if mel.shape[1] >= OVERLAP_FRAMES]
        found: list[Tail | None] = [None] * len(mels)
        if rows:
            ends = [slice(samples[row] - self.overlap, samples[row]) for row in rows]
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
        first = item.chunk.start * self.frames_per_token - (OVERLAP_FRAMES if state.tail else 0)
        return SourceNoise(state.seed, state.part, first * self.samples_per_frame)

    def _at_speed(self, mel: Tensor, speed: float) -> Tensor:
        """Resample mel: (mel channels, frames) to max(1, int(frames / speed)) frames."""
        if speed == 1.0:
            return mel
        size = max(1, int(mel.shape[1] / speed))
        return F.interpolate(mel[None], size=size, mode="linear")[0]


def _held_back(item: WorkItem) -> np.ndarray:
    """Return the held-back samples once no token is left."""
    tail = item.state.tail
    return np.zeros(0, np.float32) if tail is None else tail.speech.cpu().numpy()


def to_pcm16(wave: np.ndarray) -> np.ndarray:
    """Convert float32 in (-1, 1) to int16, rounding toward zero."""
    return (wave * 32768).astype(np.int16)
