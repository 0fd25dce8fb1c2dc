"""The supervisor's list of HTTP workers. gunicorn starts them; they announce themselves and are watched."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import multiprocess

from light_tts.common import process
from light_tts.server.core import messages
from light_tts.server.core.counters import SLOTS, ActiveRequests
from light_tts.server.core.rundir import RunDir

log = logging.getLogger("light_tts.supervisor")


@dataclass
class _Worker:
    address: str
    pid: int
    slot: int


class HttpWorkers:
    """The running HTTP workers. `on_gone(address)` is called as soon as one has ended."""

    def __init__(self, run_dir: RunDir, active: ActiveRequests, on_gone: Callable[[str], None]) -> None:
        self._run_dir = run_dir
        self._active = active
        self._on_gone = on_gone
        self._workers: dict[int, _Worker] = {}  # by pidfd

    def __len__(self) -> int:
        return len(self._workers)

    def addresses(self) -> list[str]:
        return [worker.address for worker in self._workers.values()]

    def on_hello(self, message: messages.WorkerHello) -> int | None:
        """Register a worker; return its slot in the shared counters, or None if it has already ended."""
        pidfd = process.open_pidfd(message.pid)
        if pidfd is None:
            return None
        slot = min(set(range(SLOTS)) - {worker.slot for worker in self._workers.values()})
        self._active.clear(slot)
        self._workers[pidfd] = _Worker(message.address, message.pid, slot)
        asyncio.get_running_loop().add_reader(pidfd, self._ended, pidfd)
        return slot

    def _ended(self, pidfd: int) -> None:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
        worker = self._workers.pop(pidfd)
        log.info("HTTP worker %d is gone", worker.pid)
        self._active.clear(worker.slot)
        self._run_dir.forget_process(worker.pid)
        multiprocess.mark_process_dead(worker.pid)
        self._on_gone(worker.address)
