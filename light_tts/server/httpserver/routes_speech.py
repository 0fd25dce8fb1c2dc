"""POST /inference_zero_shot and the names of the styles."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response

from light_tts.server.httpserver import prompts
from light_tts.server.httpserver.audio_response import AudioResponse
from light_tts.server.httpserver.call import SpeechCall
from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.fields import (
    SpeechFields,
    check_text,
    random_seed,
    read_body,
    speech_options,
)
from light_tts.server.httpserver.manager import HttpServerManager
from light_tts.server.httpserver.openapi import body_of
from light_tts.server.httpserver.request import Speech
from light_tts.server.httpserver.surface import arriving

router = APIRouter()


@router.post("/inference_zero_shot", openapi_extra=body_of(SpeechFields), response_class=Response)
async def inference_zero_shot(request: Request) -> Response:
    """Speak `tts_text` with the voice of `prompt_wav` or `spk_id`. 16-bit mono PCM, or WAV."""
    manager: HttpServerManager = request.app.state.manager
    call = SpeechCall(manager, "zero_shot")
    request.state.request_id = call.id
    with arriving(call):
        fields = await asyncio.wait_for(read_body(request, SpeechFields), call.remaining)
        speech = await _admitted_speech(call, fields, request.app.state.prompts, manager)
        request.state.upload.release()
        call.submit(speech)
    return AudioResponse(call, fields.format, fields.stream, manager.sample_rate, speech.options.seed)


async def _admitted_speech(
    call: SpeechCall, fields: SpeechFields, reader: prompts.PromptReader, manager: HttpServerManager
) -> Speech:
    """Everything that can be wrong with a request is found here. The costly part, reading the recording,
    comes last and only for a request that has been admitted."""
    if fields.stream and fields.speed != 1.0:
        raise RequestError(400, "speed change only support non-stream inference mode")
    style = manager.style_index(fields.tts_model_name)
    text = check_text("tts_text", fields.tts_text, manager.settings.max_text_length)
    options = speech_options(fields, manager.settings.max_part_tokens, random_seed())
    call.admit(options, text)
    prompt = await reader.prompt(fields)
    return Speech(
        style=style,
        prompt=prompt,
        options=options,
        text=text,
        stream=fields.stream,
    )


@router.get("/query_tts_model")
@router.post("/query_tts_model")
async def query_tts_model(request: Request) -> dict[str, list[str]]:
    return {"tts_models": [style.name for style in request.app.state.manager.styles]}
