"""POST /inference_zero_shot and the list of styles."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fastapi import APIRouter, Request, Response

from light_tts.server.httpserver import prompts
from light_tts.server.httpserver.arrival import Arrival, closed_on_error
from light_tts.server.httpserver.audio_response import AudioResponse, explain
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.fields import (
    SoundChoice,
    SpeechFields,
    TextFields,
    VoiceChoice,
    check_text,
    random_seed,
    speech_options,
)
from light_tts.server.httpserver.manager import HttpServerManager
from light_tts.server.httpserver.openapi import body_of, errors
from light_tts.server.httpserver.request import WantedSpeech
from light_tts.server.httpserver.sound import SoundOut, SoundWishes
from light_tts.server.httpserver.sound.response import SoundResponse
from light_tts.server.httpserver.surface import DirectRoute, HttpArrival

router = APIRouter(route_class=DirectRoute)


@router.post("/inference_zero_shot", openapi_extra=body_of(SpeechFields), response_class=Response)
async def inference_zero_shot(request: Request) -> Response:
    """Speak `tts_text` with the voice of `prompt_wav` or `spk_id`."""
    return await answer(request, "zero_shot", SpeechFields, lambda fields: fields)


Asked = TypeVar("Asked", bound=TextFields)


async def answer(
    request: Request, route: str, model: type[Asked], voice: Callable[[Asked], VoiceChoice]
) -> Response:
    """Return the speech for a request with the fields of `model`; `voice` derives the voice from them. Raises
    RequestError, RequestValidationError, HTTPException or ClientDisconnect."""
    manager: HttpServerManager = request.app.state.manager
    arrival = HttpArrival(request, route)
    with closed_on_error(arrival):
        fields = await arrival.fields(model)
        sound = _sound(fields, manager.sample_rate)
        speech = await _admitted_speech(arrival, fields, voice, request.app.state.prompts)
        call = arrival.submit(speech)
    seed = speech.options.seed
    if sound is not None:
        return SoundResponse(call, sound, explain, {"X-Seed": str(seed)})
    return AudioResponse(call, fields.format, fields.stream, manager.sample_rate, seed)


def _sound(fields: SoundChoice, source_rate: int) -> SoundOut | None:
    """Return the conversion of the samples, or None if they are sent unchanged."""
    if fields.format in ("pcm", "wav") and fields.sample_rate is None and fields.max_pause is None:
        return None
    wishes = SoundWishes(
        fields.format, fields.sample_rate, max_pause=fields.max_pause, whole=not fields.stream
    )
    return SoundOut(wishes, source_rate)


async def _admitted_speech(
    arrival: Arrival,
    fields: Asked,
    voice: Callable[[Asked], VoiceChoice],
    reader: prompts.PromptReader,
) -> WantedSpeech:
    """Validate and admit the request; all client errors are raised here. Reading the recording is expensive,
    so it comes last and is done only for admitted requests."""
    if fields.stream and fields.speed != 1.0:
        raise RequestError(400, "speed change only support non-stream inference mode")
    manager = arrival.manager
    choice = voice(fields)
    style = manager.style_index(choice.tts_model_name)
    text = check_text("tts_text", fields.tts_text, manager.settings.max_text_length)
    options = speech_options(fields, manager.settings.max_part_tokens, random_seed(), fields.speed)
    arrival.admit(options, text, stream=fields.stream)
    prompt = await reader.prompt(choice)
    return WantedSpeech(
        style=style,
        prompt=prompt,
        options=options,
        text=text,
        stream=fields.stream,
    )


@router.get("/query_tts_model", responses=errors())
@router.post("/query_tts_model", responses=errors())
async def query_tts_model(request: Request) -> dict[str, list[str]]:
    """The styles of the checkpoint."""
    return {"tts_models": [style.name for style in request.app.state.manager.styles]}
