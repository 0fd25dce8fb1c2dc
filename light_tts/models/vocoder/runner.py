"""The vocoder on a GPU: batches are padded to one of a few sizes, each of which is one CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from light_tts.common.cuda_graphs import GraphCache, SizedWork
from light_tts.kernels.compile_ahead import compile_ahead
from light_tts.kernels.vocoder.source import Cached, Draws
from light_tts.models.vocoder.interface import MelBatch
from light_tts.models.vocoder.network import HiftNetwork

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
NUMBERS = 6  # per row: length, seed, stream, first counter, noisy or not, cached samples
WARM_FRAMES = (64, 96, 128, 160, 224, 256)
MAX_FRAMES = 8192  # maximum mel frames of a graph: 32 items of 256


class HiftRunner:
    """Not thread-safe; several runners may share a network. cached_samples: maximum length of a cached
    source."""

    def __init__(
        self,
        network: HiftNetwork,
        cached_samples: int,
        cuda_graphs: bool = True,
        max_frames: int = MAX_FRAMES,
    ) -> None:
        device = network.device
        self._network = network
        self._max_frames = max_frames
        self._cached_samples = cached_samples
        self._room = _Room(self._network, max_frames, cached_samples, device)
        self.graphs = GraphCache(device, cuda_graphs)
        # replaces the default stream, which cannot be recorded
        self._stream = torch.cuda.Stream(device) if self.graphs.enabled else None

    @torch.inference_mode()
    def speak(self, batch: MelBatch) -> tuple[Tensor, Tensor]:
        """Implements `Vocoder.speak`."""
        items, _, frames = batch.mel.shape
        wave = batch.mel.new_empty(items, frames * self._network.samples_per_frame)
        source = torch.empty_like(wave)
        limit = max(self._rows_at_once(frames_of_graph(frames)))
        for start in range(0, items, limit):
            rows = slice(start, start + limit)
            self._speak(batch.rows(rows), wave[rows], source[rows])
        return wave, source

    @torch.inference_mode()
    def warm_up(self, items: int, first: bool = True) -> None:
        """Plan the graphs of batches of up to `items` chunks of a stream, or short parts: few rows first.
        Other sizes are added when they are used. The first runner also compiles the kernels, and records
        what a single chunk needs."""
        sizes = [
            (rows, frames)
            for rows in ROWS
            for frames in WARM_FRAMES
            if rows in self._rows_at_once(frames) and rows < 2 * items
        ]

        # the tiles of kernels depend on the number of frames of the whole batch
        shapes = {rows * frames: (rows, frames) for rows, frames in sizes}

        def rehearse() -> None:
            for rows, frames in shapes.values():
                self._room.compute(self._network, rows, frames)

        if first:
            compile_ahead(self._network.device, rehearse)
        for size in (sizes[-1], *sizes):  # those recorded later reuse the memory of the largest
            self.graphs.plan(size, partial(self._work, *size))
        if first:
            with self._recordable_stream():
                for size in sizes:
                    if size[0] == 1:
                        self.graphs.record(size)

    def _rows_at_once(self, capacity: int) -> list[int]:
        return [rows for rows in ROWS if rows == 1 or rows * capacity <= self._max_frames]

    def _speak(self, batch: MelBatch, wave: Tensor, source: Tensor) -> None:
        mel = batch.mel
        capacity = frames_of_graph(mel.shape[2])
        rows = next(rows for rows in ROWS if rows >= len(mel))
        fits = rows * capacity <= self._max_frames
        room = self._room
        if fits:
            with self._recordable_stream():
                work = self.graphs.use((rows, capacity), partial(self._work, rows, capacity))
                room.fill(batch, rows, capacity)
                work.run()
        else:  # a very long item: launch overhead is negligible compared with the work
            room = _Room(self._network, rows * capacity, self._cached_samples, mel.device)
            room.fill(batch, rows, capacity)
            room.compute(self._network, rows, capacity)
        for own, results in ((wave, room.wave), (source, room.source)):
            padded = _rows(results, rows, capacity * self._network.samples_per_frame)
            own.copy_(padded[: len(own), : own.shape[1]])

    def _work(self, rows: int, capacity: int) -> SizedWork:
        # recorded with empty rows: those of an earlier batch may be longer than this size
        return SizedWork(partial(self._room.compute, self._network, rows, capacity), self._room.numbers.zero_)

    @contextlib.contextmanager
    def _recordable_stream(self) -> Iterator[None]:
        """Context manager in which the current stream is not the default one."""
        if self._stream is None or torch.cuda.current_stream() != torch.cuda.default_stream():
            yield
            return
        default = torch.cuda.current_stream()
        self._stream.wait_stream(default)
        with torch.cuda.stream(self._stream):
            yield
        default.wait_stream(self._stream)


class _Room:
    """Tensors at fixed addresses: inputs and results for up to `frames` mel frames."""

    def __init__(self, network: HiftNetwork, frames: int, cached_samples: int, device: torch.device) -> None:
        samples = frames * network.samples_per_frame
        self.mel = torch.zeros(frames * network.mels, device=device)
        self.wave = torch.zeros(samples, device=device)
        self.source = torch.zeros(samples, device=device)
        self.cached = torch.zeros(ROWS[-1], cached_samples, device=device)
        self.numbers = torch.zeros(NUMBERS, ROWS[-1], dtype=torch.int64, device=device)
        self._waves = network.waves

    def fill(self, batch: MelBatch, rows: int, capacity: int) -> None:
        mel = batch.mel
        items, channels, frames = mel.shape
        _rows(self.mel, rows, capacity * channels).view(rows, capacity, channels)[:items, :frames] = mel.mT
        columns: list[tuple[int, ...]] = []
        for length, cached, noise in zip(batch.lengths, batch.cached, batch.noises, strict=True):
            count = 0 if cached is None else len(cached)
            if noise is None:
                columns.append((length, 0, 0, 0, 0, count))
            else:
                place = noise.first_sample * self._waves
                columns.append((length, _signed(noise.seed), _signed(noise.stream), place, 1, count))
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

    def compute(self, network: HiftNetwork, rows: int, capacity: int) -> None:
        length, seed, stream, counter, noisy, cached = self.numbers[:, :rows]
        samples = capacity * network.samples_per_frame
        network(
            _rows(self.mel, rows, capacity * network.mels).view(rows, capacity, network.mels),
            length.int(),
            Draws(seed, stream, counter, noisy),
            Cached(self.cached[:rows], cached),
            _rows(self.source, rows, samples),
            _rows(self.wave, rows, samples),
        )


def frames_of_graph(frames: int) -> int:
    """Return the padded size in which a batch of this many mel frames is computed."""
    step = 32 if frames <= 256 else 64 if frames <= 1024 else 256
    return -(-frames // step) * step


def _rows(flat: Tensor, rows: int, width: int) -> Tensor:
    return flat[: rows * width].view(rows, width)


def _signed(value: int) -> int:
    """Return the low 64 bits as int64."""
    return (value + 2**63) % 2**64 - 2**63
