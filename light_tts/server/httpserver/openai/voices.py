"""Named voices: GET and POST /v1/audio/voices, DELETE /v1/audio/voices/{name}"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field

from light_tts.server.httpserver.fields import BodyFields, Recording, read_body
from light_tts.server.httpserver.openai.errors import explain
from light_tts.server.httpserver.openapi import body_of, errors
from light_tts.server.httpserver.surface import route_class
from light_tts.server.httpserver.voice_changes import delete_voice, store_voice

router = APIRouter(route_class=route_class(explain))


class NewVoice(BodyFields):
    """vLLM-Omni's fields for a new voice."""

    recordings = frozenset({"audio_sample"})

    name: str = Field(description="letters, digits, _, - and .")
    audio_sample: Recording
    ref_text: str = Field("", description="transcript of audio_sample; without it only the timbre is used")
    consent: str = Field("", description="id of the speaker's consent; not stored")
    speaker_description: str = Field("", description="not kept")


@router.get("/v1/audio/voices", responses=errors())
async def voices(request: Request) -> dict[str, Any]:
    """List the voices. `voices`: all names that requests may use, including OpenAI's; `uploaded_voices`:
    those created with POST or /add_spk."""
    state = request.app.state
    own = [{"id": name, "name": name} for name in await state.names.voices()]
    aliases = await state.names.aliases()
    named = [{"id": alias, "name": f"{alias} ({voice})"} for alias, voice in aliases.items()]
    uploaded = await asyncio.to_thread(state.prompts.voices.names)
    return {"voices": own + named, "uploaded_voices": [{"name": name} for name in uploaded]}


@router.post("/v1/audio/voices", openapi_extra=body_of(NewVoice, speaks=False, more=(409,)))
async def add_voice(request: Request) -> dict[str, Any]:
    """Store a voice under a name; one of that name is replaced."""
    fields = await read_body(request, NewVoice)
    await store_voice(request.app.state, fields.name, fields.ref_text, fields.audio_sample)
    size = len(fields.audio_sample)
    return {"success": True, "voice": {"id": fields.name, "name": fields.name, "file_size": size}}


@router.delete("/v1/audio/voices/{name}", responses=errors(404, 409))
async def remove_voice(request: Request, name: str) -> dict[str, Any]:
    """Delete a voice that was stored."""
    await delete_voice(request.app.state, name)
    return {"success": True, "message": f"voice {name!r} has been deleted"}
