"""POST /v1/text-to-speech/{voice_id} and /stream, GET /v1/voices"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict, Field

from light_tts.server.httpserver.arrival import closed_on_error
from light_tts.server.httpserver.elevenlabs.common import DEFAULT_FORMAT, VoiceSettings, explain, wishes
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.fields import Drawing, check_text, random_seed, speech_options
from light_tts.server.httpserver.openapi import body_of, errors
from light_tts.server.httpserver.request import WantedSpeech
from light_tts.server.httpserver.sound import SoundOut
from light_tts.server.httpserver.sound.response import SoundResponse
from light_tts.server.httpserver.surface import HttpArrival, route_class
from light_tts.server.httpserver.wanted_voice import wanted_voice

router = APIRouter(route_class=route_class(explain))


class TextToSpeech(Drawing):
    """The supported fields of ElevenLabs' request; others are ignored."""

    model_config = ConfigDict(extra="ignore")

    text: str = Field(description="what to say")
    voice_settings: VoiceSettings | None = Field(
        None, description="of these, speed (0.25 to 4) has a meaning here"
    )


@router.post(
    "/v1/text-to-speech/{voice_id}", openapi_extra=body_of(TextToSpeech, more=(404,)), response_class=Response
)
async def convert(request: Request, voice_id: str, output_format: str = DEFAULT_FORMAT) -> Response:
    """Return the complete speech in one piece."""
    return await spoken_answer(request, voice_id, output_format, whole=True)


@router.post(
    "/v1/text-to-speech/{voice_id}/stream",
    openapi_extra=body_of(TextToSpeech, more=(404,)),
    response_class=Response,
)
async def stream(request: Request, voice_id: str, output_format: str = DEFAULT_FORMAT) -> Response:
    """Stream the speech as it is generated."""
    return await spoken_answer(request, voice_id, output_format, whole=False)


async def spoken_answer(
    request: Request,
    voice_id: str,
    output_format: str,
    whole: bool,
    kind: type[SoundResponse] = SoundResponse,
) -> Response:
    """Return the audio response for a request. Raises RequestError, RequestValidationError, HTTPException or
    ClientDisconnect."""
    state = request.app.state
    manager = state.manager
    arrival = HttpArrival(request, "elevenlabs_speech")
    with closed_on_error(arrival):
        fields = await arrival.fields(TextToSpeech)
        sound = SoundOut(wishes(output_format, fields.voice_settings, whole), manager.sample_rate)
        text = check_text("text", fields.text, manager.settings.max_text_length)
        options = speech_options(fields, manager.settings.max_part_tokens, random_seed())
        voice = await known_voice(state, voice_id)
        options = msgspec.structs.replace(options, word_times=kind is not SoundResponse)
        arrival.admit(options, text, stream=not whole)
        prompt = await wanted_voice(state, voice)
        call = arrival.submit(
            WantedSpeech(style=0, prompt=prompt, options=options, text=text, stream=not whole)
        )
    return kind(call, sound, explain, {"X-Seed": str(options.seed)})


async def known_voice(state: Any, voice_id: str) -> str:
    """Return the voice with this id. Raises RequestError (404)."""
    try:
        return await state.names.voice(voice_id)
    except RequestError as error:
        raise RequestError(404, error.message, field="voice_id") from None


@router.get("/v1/voices", responses=errors())
async def voices(request: Request) -> dict[str, Any]:
    """List the voices."""
    state = request.app.state
    stored = set(await asyncio.to_thread(state.prompts.voices.names))
    return {"voices": [_voice(name, name in stored) for name in await state.names.voices()]}


@router.get("/v1/voices/{voice_id}", responses=errors(404))
async def voice(request: Request, voice_id: str) -> dict[str, Any]:
    """Return one voice."""
    state = request.app.state
    stored = await asyncio.to_thread(state.prompts.voices.names)
    name = await known_voice(state, voice_id)
    return _voice(name, name in stored)


def _voice(name: str, stored: bool) -> dict[str, Any]:
    return {"voice_id": name, "name": name, "category": "cloned" if stored else "premade", "labels": {}}
