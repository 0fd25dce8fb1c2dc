"""The cache of prompts in an HTTP worker."""

from __future__ import annotations

import asyncio
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from light_tts.server.core.settings import Settings
from light_tts.server.httpserver import prompts
from light_tts.server.httpserver.sized_cache import SizedCache
from light_tts.server.httpserver.voices import VoiceStore


def wav_bytes(seconds: float) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(int(seconds * 24_000), np.float32), 24_000, format="WAV")
    return file.getvalue()


def test_least_recently_used_values_are_dropped() -> None:
    cache: SizedCache[str, int] = SizedCache(10)
    cache.keep("a", 1, 4)
    cache.keep("b", 2, 4)
    assert cache.get("a") == 1
    cache.keep("c", 3, 4)
    assert [cache.get(key) for key in "abc"] == [1, None, 3]


def test_a_replaced_value_counts_once() -> None:
    cache: SizedCache[str, int] = SizedCache(10)
    for value in range(5):
        cache.keep("a", value, 6)
    cache.keep("b", 9, 4)
    assert [cache.get(key) for key in "ab"] == [4, 9]


def test_a_value_above_the_limit_is_not_kept() -> None:
    cache: SizedCache[str, int] = SizedCache(10)
    cache.keep("a", 1, 11)
    assert cache.get("a") is None
    cache.forget("a")


def test_an_uploaded_recording_is_decoded_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    decoded = []
    read_audio = prompts.read_audio
    monkeypatch.setattr(prompts, "read_audio", lambda *args: decoded.append(1) or read_audio(*args))
    manager: Any = SimpleNamespace(settings=Settings(model_dir="x"))
    reader = prompts.PromptReader(manager, VoiceStore(tmp_path))

    async def read() -> None:
        first = await reader.read(wav_bytes(1.0), "one")
        again = await reader.read(wav_bytes(1.0), "two")
        other = await reader.read(wav_bytes(1.5), "one")
        assert (first.text, again.text) == ("one", "two")
        assert first.key == again.key != other.key
        assert again.audio is first.audio

    asyncio.run(read())
    assert len(decoded) == 2
