"""Named voices as prompts: each is read and decoded once, and again after it has been replaced."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from light_tts.server.core.messages import Prompt
from light_tts.server.httpserver.voices import Stamp, StoredVoice, VoiceStore

MAX_BYTES = 128 * 2**20  # of the samples that an HTTP worker keeps


class VoicePrompts:
    """`read` makes the prompt of a voice; called in a thread. The least recently used are dropped."""

    def __init__(self, store: VoiceStore, read: Callable[[StoredVoice], Prompt]) -> None:
        self._store = store
        self._read = read
        self._kept: OrderedDict[str, tuple[Stamp, Prompt]] = OrderedDict()
        self._bytes = 0

    async def get(self, spk_id: str) -> Prompt | None:
        """Return the prompt of a voice, or None if there is no such voice. Raises RequestError."""
        stamp = self._store.stamp(spk_id)
        kept = self._forget(spk_id)
        if stamp is None:
            return None
        if kept is not None and kept[0] == stamp:
            self._keep(spk_id, stamp, kept[1])
            return kept[1]
        prompt = await asyncio.to_thread(self._load, spk_id)
        if prompt is not None:
            self._keep(spk_id, stamp, prompt)
        return prompt

    def _load(self, spk_id: str) -> Prompt | None:
        voice = self._store.get(spk_id)
        return None if voice is None else self._read(voice)

    def _keep(self, spk_id: str, stamp: Stamp, prompt: Prompt) -> None:
        self._forget(spk_id)  # another request may have read it meanwhile
        self._kept[spk_id] = stamp, prompt
        self._bytes += _size(prompt)
        while self._bytes > MAX_BYTES:
            self._forget(next(iter(self._kept)))

    def _forget(self, spk_id: str) -> tuple[Stamp, Prompt] | None:
        kept = self._kept.pop(spk_id, None)
        if kept is not None:
            self._bytes -= _size(kept[1])
        return kept


def _size(prompt: Prompt) -> int:
    return 0 if prompt.audio is None else memoryview(prompt.audio.data).nbytes
