"""HTTP workers that died recently; jobs of theirs that arrive late must not be started."""

from __future__ import annotations

import time
from collections.abc import Callable

REMEMBERED_SECONDS = 30.0  # how long late messages are expected; after that the address may have been reused


class GoneWorkers:
    """Reply addresses of dead HTTP workers. Messages from different senders may be reordered, so a job can
    arrive after the notice that its worker is gone."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._died: dict[str, float] = {}  # time of death by reply address

    def add(self, address: str) -> None:
        self._died[address] = self._clock()

    def __contains__(self, address: str) -> bool:
        horizon = self._clock() - REMEMBERED_SECONDS
        self._died = {gone: died for gone, died in self._died.items() if died > horizon}
        return address in self._died
