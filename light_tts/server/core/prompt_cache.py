"""Features of prompts, computed once per distinct recording and shared between processes.

Each entry is one file in shared memory, written under a temporary name and then renamed, never changed
after. One encode process owns an entry: only it adds, pins and removes (unlinks). A reader that has attached
keeps its mapping after an unlink, so processes share no lock, and nothing in use is ever overwritten.
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

# magic, tokens, mel frames, mel bins, embedding size; the arrays follow in this order, 4 bytes a value
_HEADER = struct.Struct("<8s4i")
_MAGIC = b"LTTSPF01"


def attach(segment: str | os.PathLike[str]) -> PromptFeatures:
    """The features in `segment` as read-only views of the shared memory; valid as long as they are kept.

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


def write_segment(path: Path, features: PromptFeatures) -> None:
    """Write `features` so that a reader sees the whole entry or none."""
    partial = path.with_suffix(".partial")
    header = _HEADER.pack(_MAGIC, len(features.speech_token), *features.mel.shape, len(features.embedding))
    try:
        with open(partial, "wb") as file:
            file.write(header)
            file.write(np.ascontiguousarray(features.speech_token, np.int32))
            file.write(np.ascontiguousarray(features.mel, np.float32))
            file.write(np.ascontiguousarray(features.embedding, np.float32))
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class CachedPrompt:
    """An entry as its owner hands it out."""

    key: str
    segment: str
    features: PromptFeatures


@dataclass
class _Entry:
    future: Future[CachedPrompt]
    jobs: set[str] = field(default_factory=set)  # pins

    @property
    def evictable(self) -> bool:
        return not self.jobs and self.future.done()


class SharedSpeechCache:
    """The owner's side: at most `capacity` entries, least recently used out first. Thread-safe.

    A pinned entry is never removed: while all are pinned there can be more than `capacity`. Complete files
    that an earlier process with the same `owner` index left are adopted, half-written ones removed.
    """

    def __init__(self, directory: Path, owner: int, capacity: int, executor: Executor) -> None:
        self._directory = directory
        self._prefix = f"prompt-{owner}-"
        self._capacity = capacity
        self._executor = executor
        self._lock = threading.RLock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._pins: dict[str, str] = {}  # job -> key
        self._adopt()

    def get_or_compute(
        self, key: str, job: str, compute: Callable[[], PromptFeatures]
    ) -> tuple[Future[CachedPrompt], bool]:
        """Pin `key` for `job` and return the entry to come, and whether it was there or under way already.

        `compute` runs in the executor, once however many jobs ask; its exception reaches all that wait, is
        not cached, and ends their pins. `key` (hex digits) names the file.
        """
        if not key or not set(key) <= set("0123456789abcdef"):
            raise ValueError(f"prompt key {key!r} is not a hash in hexadecimal digits")
        with self._lock:
            self.release(job)
            entry = self._entries.get(key)
            known = entry is not None
            if entry is None:
                entry = self._entries[key] = _Entry(Future())
            entry.jobs.add(job)
            self._pins[job] = key
            self._entries.move_to_end(key)
            self._evict()
        if not known:
            try:
                self._executor.submit(self._fill, key, entry, compute)
            except RuntimeError as error:  # the executor is shut down
                self._forget(key, entry, error)
        return entry.future, known

    def release(self, job: str) -> None:
        """End the pin of `job`, if it has one."""
        with self._lock:
            key = self._pins.pop(job, None)
            if key is not None:
                self._entries[key].jobs.discard(job)
                self._evict()

    def __len__(self) -> int:
        return len(self._entries)

    def pinned(self) -> int:
        """How many jobs hold a pin."""
        return len(self._pins)

    def _fill(self, key: str, entry: _Entry, compute: Callable[[], PromptFeatures]) -> None:
        with self._lock:
            if not entry.jobs:  # all that wanted it were aborted before its turn came
                del self._entries[key]
                entry.future.cancel()
                return
        try:
            cached = self._store(key, compute())
        except BaseException as error:
            self._forget(key, entry, error)
        else:
            entry.future.set_result(cached)
            with self._lock:  # every job that wanted it may have gone meanwhile
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

    def _forget(self, key: str, entry: _Entry, error: BaseException) -> None:
        with self._lock:
            del self._entries[key]
            for job in entry.jobs:
                del self._pins[job]
        entry.future.set_exception(error)

    def _evict(self) -> None:
        while len(self._entries) > self._capacity and self._evict_one():
            pass

    def _evict_one(self) -> bool:
        """Remove the least recently used entry that nobody needs; False if there is none."""
        with self._lock:
            key = next((key for key, entry in self._entries.items() if entry.evictable), None)
            if key is None:
                return False
            del self._entries[key]
            self._path(key).unlink(missing_ok=True)
            return True

    def _path(self, key: str) -> Path:
        return self._directory / f"{self._prefix}{key}.prompt"

    def _adopt(self) -> None:
        for partial in self._directory.glob(f"{self._prefix}*.partial"):
            partial.unlink(missing_ok=True)
        paths = sorted(
            self._directory.glob(f"{self._prefix}*.prompt"), key=lambda path: path.stat().st_mtime_ns
        )
        for path in paths:
            key, entry = path.stem.removeprefix(self._prefix), _Entry(Future())
            try:
                entry.future.set_result(CachedPrompt(key, str(path), attach(path)))
            except ValueError:
                path.unlink(missing_ok=True)
            else:
                self._entries[key] = entry
        self._evict()
