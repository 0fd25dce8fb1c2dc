"""Storing and deleting named voices, shared by all APIs."""

from __future__ import annotations

import asyncio

from starlette.datastructures import State

from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.fields import MAX_PROMPT_TEXT, check_text
from light_tts.server.httpserver.voices import StoredVoice, check_id


async def store_voice(state: State, name: str, text: str, recording: bytes) -> None:
    """Store a voice, replacing one of the same name; `text` is the transcript of the recording. Raises
    RequestError."""
    check_id(name)
    if name in state.manager.checkpoint_speakers:
        raise RequestError(409, f"{name!r} is a speaker of the checkpoint")
    check_text("prompt_text", text, MAX_PROMPT_TEXT, may_be_empty=True)
    await state.prompts.read(recording, text)
    voice = StoredVoice(text, recording, aligned=state.settings.align_prompt)
    await asyncio.to_thread(state.prompts.voices.add, name, voice)


async def delete_voice(state: State, name: str) -> None:
    """Delete a voice. Raises RequestError (404, 409)."""
    if not await asyncio.to_thread(state.prompts.voices.remove, check_id(name)):
        if name in state.manager.checkpoint_speakers:
            raise RequestError(409, f"{name!r} is a speaker of the checkpoint and cannot be deleted")
        raise RequestError(404, f"there is no voice {name!r}")
