"""Runs batches of chunks on the device, several in flight, each in a thread (and CUDA stream) of its own.

On a GPU a batch is one padded run. On the CPU each chunk is computed alone in exactly its own shape, so that
its samples are bit for bit those of any other run of the same request.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from light_tts.models.cosyvoice2.token2wav import Token2Wav, WorkItem, to_pcm16


class DeviceLost(Exception):
    """The device answers no more: only a new process can go on."""


@dataclass(frozen=True)
class Task:
    """A chunk to speak, and whose it is."""

    item: WorkItem
    owner: Any


@dataclass(frozen=True)
class Ended:
    """A batch that has ended after `seconds`. `outcomes`: for each of `tasks` its samples (int16), or the
    error that ended it."""

    tasks: Sequence[Task]
    outcomes: list[np.ndarray | Exception]
    seconds: float


@dataclass(frozen=True)
class _Seat:
    """What a thread computes with."""

    model: Token2Wav
    stream: torch.cuda.Stream | None

    def context(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)


class Engine:
    """`models`: one for each batch in flight; `max_batch_size`: tasks in a batch on a GPU. `wake` is called
    from a worker thread when a batch has ended."""

    def __init__(
        self, models: Sequence[Token2Wav], device: torch.device, max_batch_size: int, wake: Callable[[], None]
    ) -> None:
        parallel = len(models)
        self.model = models[0]  # for questions that all answer alike
        self.padded = device.type == "cuda"
        self.batch_limit = max_batch_size if self.padded else 1
        self._device = device
        self._free = parallel
        self._wake = wake
        self._ended: queue.SimpleQueue[Future[Ended]] = queue.SimpleQueue()
        self._seats = [_Seat(model, torch.cuda.Stream(device) if self.padded else None) for model in models]
        self._free_seats: queue.SimpleQueue[_Seat] = queue.SimpleQueue()
        for seat in self._seats:
            self._free_seats.put(seat)
        self._threads = ThreadPoolExecutor(parallel, "speak", self._init_thread)
        self._thread = threading.local()

    @property
    def has_room(self) -> bool:
        return self._free > 0

    def start(self, batch: Sequence[Task]) -> None:
        """Begin a batch; there must be room."""
        self._free -= 1
        self._threads.submit(self._run, batch).add_done_callback(self._end)

    def ended(self) -> list[Ended]:
        """All batches that have ended since the last call. Raises DeviceLost."""
        ended: list[Ended] = []
        with contextlib.suppress(queue.Empty):
            while True:
                ended.append(self._ended.get_nowait().result())
                self._free += 1
        return ended

    def close(self) -> None:
        """Leave what is in flight to its end, unheard."""
        self._wake = lambda: None
        self._threads.shutdown(wait=False, cancel_futures=True)

    def warm_up(self) -> None:
        """Do before the first batch what it would have to wait for."""
        for seat in self._seats:
            with seat.context():
                seat.model.warm_up(self.batch_limit)
        if self.padded:
            torch.cuda.synchronize(self._device)

    def _init_thread(self) -> None:
        self._thread.seat = self._free_seats.get_nowait()
        if self.padded:
            torch.cuda.set_device(self._device)

    def _end(self, future: Future[Ended]) -> None:
        self._ended.put(future)
        self._wake()

    def _run(self, batch: Sequence[Task]) -> Ended:
        started = time.monotonic()
        with self._thread.seat.context():
            outcomes = self._speak([task.item for task in batch])
        return Ended(batch, outcomes, time.monotonic() - started)

    def _speak(self, items: Sequence[WorkItem]) -> list[np.ndarray | Exception]:
        """An error of a batch is looked for in its halves: memory may suffice for those, and what is wrong
        with one item must not hurt the others."""
        try:
            return [_pcm_or_error(wave) for wave in self._thread.seat.model.speak(items)]
        except Exception as error:
            self._recover(error)
            if len(items) == 1:
                return [error]
        middle = len(items) // 2
        return self._speak(items[:middle]) + self._speak(items[middle:])

    def _recover(self, error: Exception) -> None:
        if not self.padded:
            return
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            return
        try:
            torch.cuda.synchronize(self._device)
        except Exception as lost:
            raise DeviceLost(f"{self._device}: {lost}") from error


def _pcm_or_error(wave: np.ndarray) -> np.ndarray | Exception:
    if not np.isfinite(wave).all():
        return ArithmeticError("the model made samples that are no numbers")
    return to_pcm16(wave)
