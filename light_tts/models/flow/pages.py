"""Allocation of the pages with cached state: to streams, to voices that streams share, and to batches that
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
    """Ownership of `pages`, in the order of their frames. They are freed when the last reference to the lease
    is gone."""

    def __init__(self, pages: tuple[int, ...]) -> None:
        self.pages = pages


@dataclass(frozen=True)
class CachedPast:
    """The first chunks of a stream or a voice. mel: of their frames those after the prompt, (frames, mels);
    ready: event after which the pages are written, None: they are written already."""

    lease: Lease
    mel: Tensor
    ready: torch.cuda.Event | None


class PagePool:
    """Counts the leases of each page. When pages run short, the least recently used voices that are not in
    use are evicted; streams keep theirs. Thread-safe."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))
        self._leases: Counter[int] = Counter()  # per page
        # finalizers may run anywhere, so they must not take the lock
        self._ended: deque[tuple[int, ...]] = deque()
        self._in_flight: deque[tuple[torch.cuda.Event, Lease]] = deque()
        # most recently used last
        self._voices: weakref.WeakKeyDictionary[Memo, None] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        with self._lock:
            self._settle()
            return len(self._free)

    def lease(self, shared: Sequence[int], more: int = 0) -> Lease:
        """Return a lease of `shared`, pages of a live lease, followed by up to `more` free pages."""
        with self._lock:
            self._settle()
            if more > len(self._free):
                self._make_room(more)
            new = [self._free.pop() for _ in range(min(more, len(self._free)))]
            lease = Lease((*shared, *new))
            self._leases.update(lease.pages)
        weakref.finalize(lease, self._ended.append, lease.pages).atexit = False
        return lease

    def use_voice(self, memo: Memo, past: CachedPast) -> None:
        """Cache this state for the voice of `memo`, or record that it was used."""
        with self._lock:
            self._voices.pop(memo, None)
            memo.content = past
            self._voices[memo] = None

    def hold(self, lease: Lease, until: torch.cuda.Event) -> None:
        """Keep these pages from being reused until the event, because the device reads or writes them."""
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
        """Free the pages of leases that have ended."""
        while self._in_flight and self._in_flight[0][0].query():
            self._in_flight.popleft()
        while self._ended:
            for page in self._ended.popleft():
                self._leases[page] -= 1
                if self._leases[page] == 0:
                    self._free.append(page)
