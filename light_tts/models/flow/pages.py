"""Who has which pages of the memory of earlier frames: streams, voices that streams share, and batches that
the device has not finished."""

from __future__ import annotations

import threading
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from light_tts.models.flow.memos import Memo


class Lease:
    """The right to `pages`, in the order of their frames. They are given back when nobody refers to it any
    more."""

    def __init__(self, pages: tuple[int, ...]) -> None:
        self.pages = pages


@dataclass(frozen=True)
class Past:
    """The first chunks of a stream or of a voice. mel: of their frames those behind the prompt, (frames,
    mels); ready: the pages are written when this has happened; None: they are."""

    lease: Lease
    mel: Tensor
    ready: torch.cuda.Event | None


class PagePool:
    """Counts how many leases a page is in. Where pages run short, voices that nobody speaks in make room, the
    one used longest ago first; streams keep what they have. Thread-safe."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))
        self._leases: Counter[int] = Counter()  # by page
        self._ended: deque[tuple[int, ...]] = deque()  # finalizers run anywhere: they must not take the lock
        self._in_flight: deque[tuple[torch.cuda.Event, Lease]] = deque()
        self._voices: weakref.WeakKeyDictionary[Memo, None] = weakref.WeakKeyDictionary()  # last used last
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        with self._lock:
            self._settle()
            return len(self._free)

    def lease(self, shared: Sequence[int], more: int = 0) -> Lease:
        """`shared`, pages of a lease that lives, and behind them up to `more` that are free."""
        with self._lock:
            self._settle()
            if more > len(self._free):
                self._make_room(more)
            new = [self._free.pop() for _ in range(min(more, len(self._free)))]
            lease = Lease((*shared, *new))
            self._leases.update(lease.pages)
        weakref.finalize(lease, self._ended.append, lease.pages).atexit = False
        return lease

    def use_voice(self, memo: Memo, past: Past) -> None:
        """Keep this for the voice that `memo` belongs to, or say that it was used."""
        with self._lock:
            self._voices.pop(memo, None)
            memo.content = past
            self._voices[memo] = None

    def hold(self, lease: Lease, until: torch.cuda.Event) -> None:
        """The device reads or writes these pages until then."""
        with self._lock:
            self._in_flight.append((until, lease))

    def _make_room(self, count: int) -> None:
        for memo in list(self._voices):
            if len(self._free) >= count:
                return
            pages = memo.content.lease.pages
            if all(self._leases[page] == 1 for page in pages):
                self._voices.pop(memo)
                memo.content = None
                self._settle()

    def _settle(self) -> None:
        """Take back the pages of leases that have ended."""
        while self._in_flight and self._in_flight[0][0].query():
            self._in_flight.popleft()
        while self._ended:
            for page in self._ended.popleft():
                self._leases[page] -= 1
                if self._leases[page] == 0:
                    self._free.append(page)
