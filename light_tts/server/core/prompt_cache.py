"""Prompt features, computed once per distinct recording and shared between processes.

Each entry is one file in shared memory, written under a temporary name, then renamed and never modified. One
encode process owns an entry: only it adds, pins and unlinks it. A reader that has attached keeps its mapping
after an unlink, so processes share no lock and memory in use is never overwritten.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from light_tts.common.prompt_features import PromptFeatures
from light_tts.common.shared_file import map_file

# magic, tokens, mel frames, mel bins, embedding size; then the arrays in this order, 4 bytes per value
_HEADER = struct.Struct("<8s4i")
_MAGIC = b"LTTSPF01"


def attach(segment: str | os.PathLike[str]) -> PromptFeatures:
    """Return the features in `segment` as read-only views of shared memory, valid as long as they are
    referenced.

    Raises FileNotFoundError if the owner has removed the entry, ValueError if the file is not an entry.
    """
    with open(segment, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < _HEADER.size:
            raise ValueError(f"{segment}: not a prompt entry")
        data = map_file(file.fileno(), size)
    magic, tokens, frames, bins, embedding = _HEADER.unpack_from(data)
    if magic != _MAGIC or len(data) != _HEADER.size + 4 * (tokens + frames * bins + embedding):
        raise ValueError(f"{segment}: not a prompt entry")
    values = np.frombuffer(data, np.float32, offset=_HEADER.size)
    mel_end = tokens + frames * bins
    return PromptFeatures(
        speech_token=values[:tokens].view(np.int32),
        mel=values[tokens:mel_end].reshape(frames, bins),
        embedding=values[mel_end:],
    )


def segment_path(directory: Path, owner: int, key: str) -> Path:
    """Return the path of the entry of `key`, which exists if the encode process with index `owner` has it."""
    return directory / f"prompt-{owner}-{key}.prompt"


def write_segment(path: Path, features: PromptFeatures) -> None:
    """Write `features` atomically: a reader sees the whole entry or none."""
    partial = path.with_suffix(".partial")
    header = _HEADER.pack(_MAGIC, len(features.speech_token), *features.mel.shape, len(features.embedding))
    try:
        with open(partial, "wb") as file:
            file.write(header)
            file.write(np.ascontiguousarray(features.speech_token, np.int32).data)
            file.write(np.ascontiguousarray(features.mel, np.float32).data)
            file.write(np.ascontiguousarray(features.embedding, np.float32).data)
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class CachedPrompt:
    """A cache entry as returned by its owner."""

    key: str
    segment: str
    features: PromptFeatures


@dataclass
class _CacheEntry:
    future: Future[CachedPrompt]
    jobs: set[str] = field(default_factory=set)  # jobs that pin the entry

    @property
    def evictable(self) -> bool:
        return not self.jobs and self.future.done()


class SharedSpeechCache:
    """The owner's side of the cache: at most `capacity` entries with LRU eviction. Thread-safe.

    Pinned entries are never removed, so there can be more than `capacity` while all are pinned. Complete
    files left by an earlier process with the same `owner` index are adopted, partial ones removed.
    """

    def __init__(self, directory: Path, owner: int, capacity: int, executor: Executor) -> None:
        self._directory = directory
        self._owner = owner
        self._capacity = capacity
        self._executor = executor
        self._lock = threading.RLock()
        self._entries: OrderedDict[str, _CacheEntry] = OrderedDict()  # least recently used first
        self._pins: dict[str, str] = {}  # job -> key
        self._adopt()

    def get_or_compute(
        self, key: str, job: str, compute: Callable[[], PromptFeatures]
    ) -> tuple[Future[CachedPrompt], bool]:
        """Pin `key` for `job`; return a future of the entry, and whether it was cached or already being
        computed.

        `compute` runs in the executor, once even if several jobs ask. Its exception is passed to all waiting
        jobs, is not cached, and releases their pins. `key` (hex digits) names the file.
        """
        if not key or not set(key) <= set("0123456789abcdef"):
            raise ValueError(f"prompt key {key!r} is not a hash in hexadecimal digits")
        with self._lock:
            self.release(job)
            entry = self._entries.get(key)
            known = entry is not None
            if entry is None:
                entry = self._entries[key] = _CacheEntry(Future())
            entry.jobs.add(job)
            self._pins[job] = key
            self._entries.move_to_end(key)
            self._evict()
        if not known:
            try:
                self._executor.submit(self._fill, key, entry, compute)
            except RuntimeError as error:  # the executor has been shut down
                self._forget(key, entry, error)
        return entry.future, known

    def release(self, job: str) -> None:
        """Release the pin of `job`, if any."""
        with self._lock:
            key = self._pins.pop(job, None)
            if key is not None:
                self._entries[key].jobs.discard(job)
                self._evict()

    def __len__(self) -> int:
        return len(self._entries)

    def pinned(self) -> int:
        """Number of jobs that hold a pin."""
        return len(self._pins)

    def _fill(self, key: str, entry: _CacheEntry, compute: Callable[[], PromptFeatures]) -> None:
        with self._lock:
            if not entry.jobs:  # all jobs that wanted it were aborted before it was started
                del self._entries[key]
                entry.future.cancel()
                return
        try:
            cached = self._store(key, compute())
        except BaseException as error:
            self._forget(key, entry, error)
        else:
            entry.future.set_result(cached)
            with self._lock:  # every job that wanted it may have been aborted in the meantime
                self._evict()

    def _store(self, key: str, features: PromptFeatures) -> CachedPrompt:
        path = self._path(key)
        while True:
            try:
                write_segment(path, features)
                return CachedPrompt(key, str(path), attach(path))
            except OSError as error:
                if error.errno != errno.ENOSPC or not self._evict_one():
                    raise

    def _forget(self, key: str, entry: _CacheEntry, error: BaseException) -> None:
        with self._lock:
            del self._entries[key]
            for job in entry.jobs:
                del self._pins[job]
        entry.future.set_exception(error)

    def _evict(self) -> None:
        while len(self._entries) > self._capacity and self._evict_one():
            pass

    def _evict_one(self) -> bool:
        """Remove the least recently used unpinned entry; return False if there is none."""
        with self._lock:
            key = next((key for key, entry in self._entries.items() if entry.evictable), None)
            if key is None:
                return False
            del self._entries[key]
            self._path(key).unlink(missing_ok=True)
            return True

    def _path(self, key: str) -> Path:
        return segment_path(self._directory, self._owner, key)

    def _adopt(self) -> None:
        entries = self._path("*")
        for partial in self._directory.glob(entries.with_suffix(".partial").name):
            partial.unlink(missing_ok=True)
        paths = sorted(self._directory.glob(entries.name), key=lambda path: path.stat().st_mtime_ns)
        for path in paths:
            key, entry = path.stem.rpartition("-")[2], _CacheEntry(Future())
            try:
                entry.future.set_result(CachedPrompt(key, str(path), attach(path)))
            except ValueError:
                path.unlink(missing_ok=True)
            else:
                self._entries[key] = entry
        self._evict()
