"""Builds the Prompt for the encode stage from a client's voice fields."""

from __future__ import annotations

import asyncio
import hashlib

import msgspec
import numpy as np

from light_tts.common.audio import UNREADABLE, AudioError, read_audio
from light_tts.common.instructions import END_OF_PROMPT
from light_tts.common.whole_chunks import in_whole_chunks
from light_tts.server.core.messages import Prompt, Raw
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.fields import MAX_PROMPT_TEXT, VoiceChoice, check_text, wrong_field
from light_tts.server.httpserver.manager import HttpServerManager
from light_tts.server.httpserver.sized_cache import SizedCache
from light_tts.server.httpserver.voice_prompts import VoicePrompts, sample_bytes
from light_tts.server.httpserver.voices import StoredVoice, VoiceStore

BAD_AUDIO = UNREADABLE
MAX_KEPT_BYTES = 64 * 2**20  # of the uploaded recordings, and their samples, that an HTTP worker keeps
LONGEST_KEPT = 2 * 2**20  # bytes; looking up a recording of this length takes the event loop a millisecond


def prompt_from_samples(samples: np.ndarray, sample_rate: int, text: str) -> Prompt:
    """Return a Prompt. `samples`: (n,) float32, mono."""
    digest = hashlib.sha256(f"{sample_rate} ".encode())
    digest.update(samples.data)
    return Prompt(text=text, key=digest.hexdigest(), sample_rate=sample_rate, audio=Raw.of(samples))


class PromptReader:
    """Reads recordings, uploaded or stored, in threads. Keeps the prompts of those used last: clients upload
    the same recording with each request."""

    def __init__(self, manager: HttpServerManager, voices: VoiceStore) -> None:
        self._manager = manager
        self._settings = manager.settings
        self.voices = voices
        self._named_prompts = VoicePrompts(voices, self._read_voice)
        self._uploaded_prompts: SizedCache[bytes, Prompt] = SizedCache(MAX_KEPT_BYTES)  # by recording

    async def prompt(self, choice: VoiceChoice) -> Prompt:
        """Return the voice that the client chose. Raises RequestError (400) or RequestValidationError
        (422).
        """
        text = choice.prompt_text
        if text is not None:
            check_text("prompt_text", text, MAX_PROMPT_TEXT, may_be_empty=True)
            if text.endswith(END_OF_PROMPT) and not self._manager.takes_instructions:
                raise RequestError(
                    400,
                    "this checkpoint was not trained with instructions and would read them aloud: omit "
                    "the instruction",
                    field="instructions",
                )
        if choice.spk_id is not None:
            if choice.prompt_wav is not None:
                raise RequestError(400, "give spk_id or prompt_wav, not both")
            return await self._named(choice.spk_id, text)
        if choice.prompt_wav is None:
            raise wrong_field(
                "prompt_wav",
                "no voice was given: name one with spk_id (see /spk_list), or send a recording as "
                "prompt_wav with its transcript as prompt_text",
                "missing",
            )
        if text is None:
            raise wrong_field(
                "prompt_text", "goes with prompt_wav: what is said in it; may be empty", "missing"
            )
        return await self.read(choice.prompt_wav, text)

    async def read(self, recording: bytes, text: str) -> Prompt:
        """Decode a recording. Raises RequestError (400) if it is unreadable, too short or too long, or its
        sample rate is too low."""
        prompt = self._uploaded_prompts.get(recording) if len(recording) <= LONGEST_KEPT else None
        if prompt is not None:
            return msgspec.structs.replace(prompt, text=text)
        prompt = await asyncio.to_thread(self._read, recording, text)
        if len(recording) <= LONGEST_KEPT:
            self._uploaded_prompts.keep(recording, prompt, len(recording) + sample_bytes(prompt))
        return prompt

    def _read(self, recording: bytes, text: str) -> Prompt:
        return prompt_from_samples(*self._samples(recording), text)

    def _read_voice(self, voice: StoredVoice) -> Prompt:
        samples, rate = self._samples(voice.recording)
        chunk = self._manager.chunk_seconds
        if voice.aligned and chunk is not None:
            aligned = in_whole_chunks(samples, rate, chunk)
            if len(aligned) <= self._settings.max_prompt_seconds * rate:
                samples = aligned
        return prompt_from_samples(samples, rate, voice.prompt_text)

    def _samples(self, recording: bytes) -> tuple[np.ndarray, int]:
        """Return (samples (n,) float32 mono, sample rate in Hz). Raises RequestError (400)."""
        settings = self._settings
        try:
            samples, rate = read_audio(recording, settings.min_prompt_seconds, settings.max_prompt_seconds)
        except AudioError as error:
            reason = str(error)
            unreadable = reason.startswith(BAD_AUDIO)
            raise RequestError(400, reason if unreadable else f"{BAD_AUDIO}: {reason}") from None
        return np.ascontiguousarray(samples), rate

    async def _named(self, spk_id: str, text: str | None) -> Prompt:
        """Return a stored voice (with `text` in place of its own transcript if given) or a speaker of the
        checkpoint."""
        if spk_id in self._manager.checkpoint_speakers:
            return Prompt(text=text or "", speaker=spk_id)
        prompt = await self._named_prompts.get(spk_id)
        if prompt is None:
            raise RequestError(400, f"unknown spk_id {spk_id!r}; /spk_list lists the voices")
        return prompt if text is None else msgspec.structs.replace(prompt, text=text)
