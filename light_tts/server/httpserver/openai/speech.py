"""POST /v1/audio/speech"""

from __future__ import annotations

import re

import msgspec
from fastapi import APIRouter, Request, Response

from light_tts.server.httpserver.arrival import Arrival, closed_on_error
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.fields import check_text, random_seed, speech_options
from light_tts.server.httpserver.live_words import check_word_times
from light_tts.server.httpserver.manager import HttpServerManager
from light_tts.server.httpserver.openai.errors import explain
from light_tts.server.httpserver.openai.events import EventResponse
from light_tts.server.httpserver.openai.fields import CreateSpeech
from light_tts.server.httpserver.openapi import body_of
from light_tts.server.httpserver.request import WantedSpeech
from light_tts.server.httpserver.sound import SoundOut, SoundWishes
from light_tts.server.httpserver.sound.response import SoundResponse
from light_tts.server.httpserver.surface import HttpArrival, route_class
from light_tts.server.httpserver.wanted_voice import wanted_voice

ROUTE = "openai_speech"
_HARMLESS = re.compile(r"[\w.\-]{1,64}", re.ASCII)

router = APIRouter(route_class=route_class(explain))


@router.post("/v1/audio/speech", openapi_extra=body_of(CreateSpeech, more=(404,)), response_class=Response)
async def create_speech(request: Request) -> Response:
    """OpenAI's speech request: audio in one of six formats, streamed or complete, or as server-sent
    events.
    """
    manager: HttpServerManager = request.app.state.manager
    arrival = HttpArrival(request, ROUTE)
    with closed_on_error(arrival):
        fields = await arrival.fields(CreateSpeech)
        sound = SoundOut(wishes(fields), manager.sample_rate)
        speech = await admitted_speech(arrival, fields, request)
        call = arrival.submit(speech)
    headers = {"X-Seed": str(speech.options.seed), **ignored(fields)}
    answer = EventResponse if fields.events else SoundResponse
    return answer(call, sound, explain, headers, fields.word_timestamps)


def wishes(fields: CreateSpeech) -> SoundWishes:
    return SoundWishes(
        format=fields.response_format,
        sample_rate=fields.sample_rate,
        speed=fields.speed,
        max_pause=fields.max_pause,
        whole=fields.whole,
    )


async def admitted_speech(arrival: Arrival, fields: CreateSpeech, request: Request) -> WantedSpeech:
    """Admit the request and return what to speak. Raises RequestError. Expensive work comes last and is done
    only for admitted requests."""
    state = request.app.state
    manager: HttpServerManager = state.manager
    style = state.names.style(fields.model)
    text = check_text("input", fields.input, manager.settings.max_text_length)
    if fields.word_timestamps:
        if not (fields.events or fields.whole):
            raise RequestError(
                400,
                "word_timestamps: requires stream_format sse, or stream false: an audio stream cannot carry "
                "word times",
                field="word_timestamps",
            )
        check_word_times(manager, style, fields.max_pause)
    options = speech_options(fields, manager.settings.max_part_tokens, random_seed())
    options = msgspec.structs.replace(options, report=fields.events, word_times=fields.word_timestamps)
    arrival.admit(options, text, stream=not fields.whole)
    prompt = await wanted_voice(
        state,
        voice=fields.voice,
        recording=fields.ref_audio,
        recording_text=fields.ref_text,
        instructions=fields.instructions,
    )
    return WantedSpeech(style=style, prompt=prompt, options=options, text=text, stream=not fields.whole)


def ignored(fields: CreateSpeech) -> dict[str, str]:
    """Return a header that names the ignored fields."""
    names = [name for name in fields.unknown if _HARMLESS.fullmatch(name)][:20]
    return {"X-Ignored-Fields": ", ".join(names)} if names else {}
