"""Named voices: POST /add_spk, GET /spk_list, DELETE /spk/{id}."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from light_tts.server.httpserver.errors import RequestError
from light_tts.server.httpserver.fields import NewVoiceFields, read_body
from light_tts.server.httpserver.manager import HttpServerManager
from light_tts.server.httpserver.openapi import body_of, errors
from light_tts.server.httpserver.voice_changes import delete_voice, store_voice

router = APIRouter()


@router.post(
    "/add_spk", openapi_extra=body_of(NewVoiceFields, speaks=False, more=(409,)), response_model=None
)
async def add_spk(request: Request) -> dict[str, str] | Response:
    """Store a voice under a name, replacing one of the same name."""
    manager: HttpServerManager = request.app.state.manager
    timeout = manager.settings.request_timeout
    try:
        fields = await asyncio.wait_for(read_body(request, NewVoiceFields), timeout)
    except asyncio.TimeoutError:
        raise RequestError(408, "the request's body did not arrive in time") from None
    except ClientDisconnect:
        return Response(status_code=400)
    await store_voice(request.app.state, fields.spk_id, fields.prompt_text, fields.prompt_wav)
    return {"message": "Ok", "spk_id": fields.spk_id}


@router.get("/spk_list", responses=errors())
async def spk_list(request: Request) -> dict[str, list[str]]:
    """List the voices. `spk_ids`: every name that requests may use; `voices`: those created with /add_spk;
    `checkpoint_speakers`: those in the checkpoint."""
    speakers = request.app.state.manager.checkpoint_speakers
    voices = await asyncio.to_thread(request.app.state.prompts.voices.names)
    return {
        "spk_ids": sorted({*speakers, *voices}),
        "voices": voices,
        "checkpoint_speakers": speakers,
    }


@router.delete("/spk/{spk_id}", responses=errors(404, 409))
async def delete_spk(request: Request, spk_id: str) -> dict[str, str]:
    """Delete a voice that was stored."""
    await delete_voice(request.app.state, spk_id)
    return {"message": "Ok"}
