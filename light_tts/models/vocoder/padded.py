"""Vocoders on a GPU: batches are padded to one of a few sizes, each of which is one CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from light_tts.common.cuda_graphs import GraphCache, SizedWork
from light_tts.kernels.compile_ahead import compile_ahead
from light_tts.models.vocoder.interface import SourceNoise

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
WARM_FRAMES = (64, 96, 128, 160, 224, 256)
MAX_FRAMES = 8192  # maximum mel frames of a graph: 32 items of 256


class Room(Protocol):
    """Tensors at fixed addresses: inputs and results of batches of at most so many mel frames. numbers: the
    lengths of items, among others; a row of zeros is no item."""

    numbers: Tensor

    def compute(self, rows: int, capacity: int) -> None:
        """Queue the work for `rows` items padded to `capacity` mel frames."""
        ...


AnyRoom = TypeVar("AnyRoom", bound=Room)


class PaddedRunner(Generic[AnyRoom]):
    """Not thread-safe. make_room: returns a room for so many mel frames."""

    def __init__(
        self, make_room: Callable[[int], AnyRoom], device: torch.device, cuda_graphs: bool, max_frames: int
    ) -> None:
        self._make_room = make_room
        self._device = device
        self._max_frames = max_frames
        self._room = make_room(max_frames)
        self.graphs = GraphCache(device, cuda_graphs)
        # replaces the default stream, which cannot be recorded
        self._stream = torch.cuda.Stream(device) if self.graphs.enabled else None

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
                self._room.compute(rows, frames)

        if first:
            compile_ahead(self._device, rehearse)
        for size in (sizes[-1], *sizes):  # those recorded later reuse the memory of the largest
            self.graphs.plan(size, partial(self._work, *size))
        if first:
            with self._recordable_stream():
                for size in sizes:
                    if size[0] == 1:
                        self.graphs.record(size)

    def _rows_at_once(self, capacity: int) -> list[int]:
        return [rows for rows in ROWS if rows == 1 or rows * capacity <= self._max_frames]

    def _run(self, items: int, capacity: int, fill: Callable[[AnyRoom, int], None]) -> tuple[AnyRoom, int]:
        """Queue the work for items padded to `capacity` mel frames. fill: writes the inputs for a number of
        rows. Returns where the results are, and the number of rows."""
        rows = next(rows for rows in ROWS if rows >= items)
        if rows * capacity <= self._max_frames:
            with self._recordable_stream():
                work = self.graphs.use((rows, capacity), partial(self._work, rows, capacity))
                fill(self._room, rows)
                work.run()
            return self._room, rows
        # a very long item: launch overhead is negligible compared with the work
        room = self._make_room(rows * capacity)
        fill(room, rows)
        room.compute(rows, capacity)
        return room, rows

    def _work(self, rows: int, capacity: int) -> SizedWork:
        # recorded with empty rows: those of an earlier batch may be longer than this size
        return SizedWork(partial(self._room.compute, rows, capacity), self._room.numbers.zero_)

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


def frames_of_graph(frames: int) -> int:
    """Return the padded size in which a batch of this many mel frames is computed."""
    step = 32 if frames <= 256 else 64 if frames <= 1024 else 256
    return -(-frames // step) * step


def padded_rows(flat: Tensor, rows: int, width: int) -> Tensor:
    return flat[: rows * width].view(rows, width)


def draws_of(noise: SourceNoise | None, first_sample: int, waves: int) -> tuple[int, int, int, int]:
    """Return seed, stream and first counter as int64, and whether there is noise."""
    return (
        (0, 0, 0, 0)
        if noise is None
        else (
            _signed(noise.seed),
            _signed(noise.stream),
            first_sample * waves,
            1,
        )
    )


def _signed(value: int) -> int:
    """Return the low 64 bits as int64."""
    return (value + 2**63) % 2**64 - 2**63
