"""Runs batches of chunks on the device, several concurrently, each in its own thread and CUDA stream.

On a GPU a batch is one run. On the CPU each chunk is computed alone in its exact shape, so that its samples
are bit-identical to any other run of the same request.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from light_tts.common import gpu
from light_tts.engine.speech.token2wav import Token2Wav, to_pcm16
from light_tts.engine.speech.work_item import WorkItem


class DeviceLost(Exception):
    """The device no longer responds; only a new process can continue."""


@dataclass(frozen=True)
class Task:
    """A chunk to speak and its owner."""

    item: WorkItem
    owner: Any


@dataclass(frozen=True)
class Ended:
    """A batch that ended after `seconds`. `outcomes`: for each of `tasks` its samples (int16), or the error
    that ended it."""

    tasks: Sequence[Task]
    outcomes: list[np.ndarray | Exception]
    seconds: float


class Lane:
    """A thread and a CUDA stream of the given priority, which run one batch at a time."""

    def __init__(self, model: Token2Wav, device: torch.device, priority: int) -> None:
        self.model = model
        self.urgent = priority == gpu.URGENT
        self._device = device
        self._stream = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device, priority=priority)
        self.thread = ThreadPoolExecutor(1, "speak", initializer=self._begin)

    def _begin(self) -> None:
        """Use the stream for all work of the thread."""
        if self._stream is not None:
            torch.cuda.set_device(self._device)
            torch.cuda.set_stream(self._stream)

    def context(self) -> contextlib.AbstractContextManager:
        """Return the context for work on the stream from another thread, while the lane's has none."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


class SpeechEngine:
    """Runs batches on its lanes. `models`: one per concurrent batch; if there are several, the first has the
    urgent lane. `max_batch_size`: tasks per batch on a GPU. `wake`: called from a worker thread when a batch
    has ended."""

    def __init__(
        self, models: Sequence[Token2Wav], device: torch.device, max_batch_size: int, wake: Callable[[], None]
    ) -> None:
        self.model = models[0]  # for properties that all models share
        self.on_gpu = device.type == "cuda"
        self.batch_limit = max_batch_size if self.on_gpu else 1
        self.device = device
        self._wake = wake
        self._ended: queue.SimpleQueue[tuple[Lane, Future[Ended]]] = queue.SimpleQueue()
        alone = len(models) == 1
        priorities = [gpu.LANGUAGE_MODEL if alone else gpu.URGENT, *[gpu.BULK] * (len(models) - 1)]
        self._lanes = [
            Lane(model, device, priority) for model, priority in zip(models, priorities, strict=True)
        ]
        self.free_lanes = list(self._lanes)

    @property
    def idle(self) -> bool:
        return len(self.free_lanes) == len(self._lanes)

    def start(self, lane: Lane, batch: Sequence[Task]) -> None:
        """Start a batch on a free lane."""
        self.free_lanes.remove(lane)
        lane.thread.submit(self._run, lane, batch).add_done_callback(lambda future: self._end(lane, future))

    def ended(self) -> list[Ended]:
        """Return all batches that have ended since the last call. Raises DeviceLost."""
        ended: list[Ended] = []
        with contextlib.suppress(queue.Empty):
            while True:
                lane, future = self._ended.get_nowait()
                ended.append(future.result())
                self.free_lanes.append(lane)
                self.free_lanes.sort(key=self._lanes.index)
        return ended

    def close(self) -> None:
        """Stop; batches in progress finish, but their results are dropped."""
        self._wake = lambda: None
        for lane in self._lanes:
            lane.thread.shutdown(wait=False, cancel_futures=True)

    def warm_up(self) -> None:
        """Do in advance what would delay the first chunk."""
        for number, lane in enumerate(self._lanes):
            with lane.context():
                lane.model.warm_up(self.batch_limit, first=number == 0)
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    @property
    def recorded(self) -> int:
        """Number of CUDA graphs. No lane may be busy."""
        return sum(lane.model.recorded for lane in self._lanes)

    @property
    def unrecorded(self) -> int:
        """Number of CUDA graphs that `record_next` can still record. No lane may be busy."""
        return sum(lane.model.unrecorded for lane in self._lanes)

    def record_next(self) -> None:
        """Record one more CUDA graph, and wait for it. No lane may be busy."""
        lane = next(lane for lane in self._lanes if lane.model.unrecorded)
        lane.thread.submit(lane.model.record_next).result()

    def _end(self, lane: Lane, future: Future[Ended]) -> None:
        self._ended.put((lane, future))
        self._wake()

    def _run(self, lane: Lane, batch: Sequence[Task]) -> Ended:
        started = time.monotonic()
        outcomes = self._speak(lane.model, [task.item for task in batch])
        return Ended(batch, outcomes, time.monotonic() - started)

    def _speak(self, model: Token2Wav, items: Sequence[WorkItem]) -> list[np.ndarray | Exception]:
        """Speak a batch. If it fails, retry in halves: there may be enough memory for those, and an invalid
        item must not affect the others."""
        try:
            return [_pcm_or_error(wave) for wave in model.speak(items)]
        except Exception as error:
            self._recover(error)
            if len(items) == 1:
                return [error]
        middle = len(items) // 2
        return self._speak(model, items[:middle]) + self._speak(model, items[middle:])

    def _recover(self, error: Exception) -> None:
        if not self.on_gpu:
            return
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            return
        try:
            torch.cuda.synchronize(self.device)
        except Exception as lost:
            raise DeviceLost(f"{self.device}: {lost}") from error


def _pcm_or_error(wave: np.ndarray) -> np.ndarray | Exception:
    if not np.isfinite(wave).all():
        return ArithmeticError("the model produced samples that are not finite")
    return to_pcm16(wave)
