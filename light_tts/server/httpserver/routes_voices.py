"""Named voices: POST /add_spk, GET /spk_list, DELETE /spk/{id}."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.fields import MAX_PROMPT_TEXT, NewVoiceFields, check_text, read_body
from light_tts.server.httpserver.manager import HttpServerManager
from light_tts.server.httpserver.openapi import body_of
from light_tts.server.httpserver.prompts import PromptReader
from light_tts.server.httpserver.voices import Voice, check_id

router = APIRouter()


@router.post("/add_spk", openapi_extra=body_of(NewVoiceFields), response_model=None)
async def add_spk(request: Request) -> dict[str, str] | Response:
    """Store a voice under a name; one of that name is replaced."""
    manager: HttpServerManager = request.app.state.manager
    reader: PromptReader = request.app.state.prompts
    timeout = manager.settings.request_timeout
    try:
        fields = await asyncio.wait_for(read_body(request, NewVoiceFields), timeout)
    except asyncio.TimeoutError:
        raise RequestError(408, "the request's body did not arrive in time") from None
    except ClientDisconnect:
        return Response(status_code=400)
    check_id(fields.spk_id)
    if fields.spk_id in manager.checkpoint_speakers:
        raise RequestError(409, f"{fields.spk_id!r} is a speaker of the checkpoint")
    check_text("prompt_text", fields.prompt_text, MAX_PROMPT_TEXT, may_be_empty=True)
    await reader.read(fields.prompt_wav, fields.prompt_text)
    voice = Voice(fields.prompt_text, fields.prompt_wav)
    await asyncio.to_thread(reader.voices.add, fields.spk_id, voice)
    return {"message": "Ok", "spk_id": fields.spk_id}


@router.get("/spk_list")
async def spk_list(request: Request) -> dict[str, list[str]]:
    """`spk_ids`: every name that requests may use; `voices`: those made by /add_spk; `checkpoint_speakers`:
    those that came with the model."""
    speakers = request.app.state.manager.checkpoint_speakers
    voices = await asyncio.to_thread(request.app.state.prompts.voices.names)
    return {
        "spk_ids": sorted({*speakers, *voices}),
        "voices": voices,
        "checkpoint_speakers": speakers,
    }


@router.delete("/spk/{spk_id}")
async def delete_spk(request: Request, spk_id: str) -> dict[str, str]:
    if not await asyncio.to_thread(request.app.state.prompts.voices.remove, check_id(spk_id)):
        if spk_id in request.app.state.manager.checkpoint_speakers:
            raise RequestError(409, f"{spk_id!r} is a speaker of the checkpoint and cannot be deleted")
        raise RequestError(404, f"there is no voice {spk_id!r}")
    return {"message": "Ok"}
