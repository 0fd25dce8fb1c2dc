"""Named voices as prompts: each is read and decoded once, and again after it has been replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from light_tts.server.core.messages import Prompt
from light_tts.server.httpserver.sized_cache import SizedCache
from light_tts.server.httpserver.voices import Stamp, StoredVoice, VoiceStore

MAX_BYTES = 128 * 2**20  # of the samples that an HTTP worker keeps


class VoicePrompts:
    """`read` makes the prompt of a voice; called in a thread. The least recently used are dropped."""

    def __init__(self, store: VoiceStore, read: Callable[[StoredVoice], Prompt]) -> None:
        self._store = store
        self._read = read
        self._kept: SizedCache[str, tuple[Stamp, Prompt]] = SizedCache(MAX_BYTES)

    async def get(self, spk_id: str) -> Prompt | None:
        """Return the prompt of a voice, or None if there is no such voice. Raises RequestError."""
        stamp = self._store.stamp(spk_id)
        kept = self._kept.get(spk_id)
        if kept is not None and kept[0] == stamp:
            return kept[1]
        self._kept.forget(spk_id)
        if stamp is None:
            return None
        prompt = await asyncio.to_thread(self._load, spk_id)
        if prompt is not None:
            self._kept.keep(spk_id, (stamp, prompt), sample_bytes(prompt))
        return prompt

    def _load(self, spk_id: str) -> Prompt | None:
        voice = self._store.get(spk_id)
        return None if voice is None else self._read(voice)


def sample_bytes(prompt: Prompt) -> int:
    """Return the size of the samples of a prompt."""
    return 0 if prompt.audio is None else memoryview(prompt.audio.data).nbytes
