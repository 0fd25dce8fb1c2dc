"""The vocoder of CosyVoice3 on a GPU, see `padded`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from light_tts.kernels.vocoder.causal_source import Span
from light_tts.kernels.vocoder.source import Draws
from light_tts.models.vocoder.causal_network import Bounds, CausalNetwork
from light_tts.models.vocoder.causal_window import Tail, Window
from light_tts.models.vocoder.interface import CausalItem, CausalState
from light_tts.models.vocoder.padded import (
    MAX_FRAMES,
    ROWS,
    PaddedRunner,
    draws_of,
    frames_of_graph,
    padded_rows,
)

# per row: mel frames, bounds of the new source, decoded frames, seed, stream, first counter, noisy or not
NUMBERS = 8


class CausalRunner(PaddedRunner["_Room"]):
    """Implements `CausalVocoder`. Not thread-safe; several runners may share a network."""

    def __init__(
        self, network: CausalNetwork, cuda_graphs: bool = True, max_frames: int = MAX_FRAMES
    ) -> None:
        super().__init__(partial(_Room, network), network.device, cuda_graphs, max_frames)
        self._network = network
        self.held_back = network.reach.held * network.samples_per_frame

    @torch.inference_mode()
    def speak(self, items: Sequence[CausalItem]) -> list[tuple[Tensor, CausalState | None]]:
        """Implements `CausalVocoder.speak`."""
        chunks = [_Chunk.of(self._network, item) for item in items]
        capacity = frames_of_graph(max([chunk.window.frames for chunk in chunks], default=0) or 1)
        limit = max(self._rows_at_once(capacity))
        results: list[tuple[Tensor, CausalState | None]] = []
        for start in range(0, len(chunks), limit):
            results += self._speak(chunks[start : start + limit], capacity)
        return results

    def _speak(self, chunks: list[_Chunk], capacity: int) -> list[tuple[Tensor, CausalState | None]]:
        """Results are copied, since the next batch overwrites the room."""
        room, rows = self._run(len(chunks), capacity, lambda room, rows: room.fill(chunks, rows, capacity))
        frame = self._network.samples_per_frame
        mel, source, wave = room.views(rows, capacity)
        windows = [chunk.window for chunk in chunks]
        waves = _copies([wave[row, w.done * frame : w.ready * frame] for row, w in enumerate(windows)])
        sources = _copies([source[row, w.drop * frame : w.pitched * frame] for row, w in enumerate(windows)])
        mels = _copies([mel[row, w.drop : w.frames] for row, w in enumerate(windows)])
        turns = room.after[: len(chunks)].clone()
        return [
            (
                waves[row],
                None
                if chunk.item.final
                else Tail(chunk.tail.first_frame + chunk.window.drop, mels[row].T, sources[row], turns[row]),
            )
            for row, chunk in enumerate(chunks)
        ]


@dataclass(frozen=True)
class _Chunk:
    """An item with what it continues."""

    item: CausalItem
    tail: Tail
    window: Window

    @classmethod
    def of(cls, network: CausalNetwork, item: CausalItem) -> _Chunk:
        tail = Tail.before(item, network.waves)
        return cls(item, tail, Window.of(network.reach, tail, item, network.samples_per_frame))

    def numbers(self, network: CausalNetwork) -> tuple[int, ...]:
        window = self.window
        # If more frames follow, the last samples lack windows and are not used.
        decoded = window.ready + (0 if self.item.final else 1) if window.ready > window.done else 0
        first_sample = self.tail.first_frame * network.samples_per_frame
        draws = draws_of(self.item.noise, first_sample, network.waves)
        return (window.frames, window.voiced, window.pitched, decoded, *draws)


class _Room:
    """See `padded.Room`. before, after: sums of turns before and after each item's source."""

    def __init__(self, network: CausalNetwork, frames: int) -> None:
        samples, device = frames * network.samples_per_frame, network.device
        self._mel = torch.zeros(frames * network.mels, device=device)
        self._source = torch.zeros(samples, device=device)
        self._wave = torch.zeros(samples, device=device)
        self.before = torch.zeros(ROWS[-1], network.waves, dtype=torch.float64, device=device)
        self.after = torch.zeros_like(self.before)
        self.numbers = torch.zeros(NUMBERS, ROWS[-1], dtype=torch.int64, device=device)
        self._network = network

    def views(self, rows: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return mel frames (rows, capacity, mel channels), and source and waveform (rows, samples)."""
        network = self._network
        mel = padded_rows(self._mel, rows, capacity * network.mels).view(rows, capacity, network.mels)
        samples = capacity * network.samples_per_frame
        return mel, padded_rows(self._source, rows, samples), padded_rows(self._wave, rows, samples)

    def fill(self, chunks: Sequence[_Chunk], rows: int, capacity: int) -> None:
        mel, source, _ = self.views(rows, capacity)
        for row, chunk in enumerate(chunks):
            tail, window = chunk.tail, chunk.window
            mel[row, : window.kept] = tail.mel.T
            mel[row, window.kept : window.frames] = chunk.item.mel.T
            source[row, : len(tail.source)] = tail.source
        self.before[: len(chunks)] = torch.stack([chunk.tail.turns for chunk in chunks])
        columns = [chunk.numbers(self._network) for chunk in chunks]
        columns += [(0,) * NUMBERS] * (ROWS[-1] - len(chunks))
        numbers = torch.tensor(list(zip(*columns, strict=True)), pin_memory=mel.is_cuda)
        self.numbers.copy_(numbers, non_blocking=True)

    def compute(self, rows: int, capacity: int) -> None:
        """Implements `Room.compute`."""
        known, begin, end, decoded = self.numbers[:4].int()[:, :rows]
        mel, source, wave = self.views(rows, capacity)
        self._network(
            mel,
            Bounds(known, Span(begin, end), decoded),
            self.before[:rows],
            Draws(*self.numbers[4:, :rows]),
            source,
            self.after[:rows],
            wave,
        )


def _copies(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return copies of tensors that differ only in their length, which share memory."""
    return torch.cat(list(parts)).split([len(part) for part in parts])
