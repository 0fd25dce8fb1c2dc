"""HTTP workers that have died lately: what is still under way of their jobs must not be begun."""

from __future__ import annotations

import time
from collections.abc import Callable

REMEMBERED_SECONDS = 30.0  # how long their messages may still arrive; later the address may be another's


class GoneWorkers:
    """Messages of different senders may overtake each other, so a job can arrive after the news that its
    worker is gone."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._died: dict[str, float] = {}  # by reply address

    def add(self, address: str) -> None:
        self._died[address] = self._clock()

    def __contains__(self, address: str) -> bool:
        horizon = self._clock() - REMEMBERED_SECONDS
        self._died = {gone: died for gone, died in self._died.items() if died > horizon}
        return address in self._died
