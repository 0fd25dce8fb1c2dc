"""The routes of CosyVoice's own server: /inference_sft, /inference_cross_lingual, /inference_instruct and
/inference_instruct2 (/inference_zero_shot is in routes_speech). Its client sends GET with a form."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from pydantic import Field

from light_tts.server.httpserver.fields import Recording, TextFields, VoiceChoice, wrong_field
from light_tts.server.httpserver.openapi import body_of
from light_tts.server.httpserver.routes_speech import answer
from light_tts.server.httpserver.surface import DirectRoute
from light_tts.server.httpserver.wanted_voice import instruction_text

router = APIRouter(route_class=DirectRoute)


class Sft(TextFields):
    """A stored voice."""

    spk_id: str = Field(description="a voice from /spk_list")
    tts_model_name: str = Field("default", description="a style from /query_tts_model")


class CrossLingual(TextFields):
    """The voice of a recording, without its transcript."""

    prompt_wav: Recording
    tts_model_name: str = Field("default", description="a style from /query_tts_model")


class Instruct(TextFields):
    """A stored voice or a recording, and an instruction on how to speak."""

    instruct_text: str = Field(description="how to speak")
    spk_id: str | None = Field(None, description="a voice from /spk_list, or use prompt_wav")
    prompt_wav: Recording | None = Field(
        None, description="recording of the voice: a file in a form, base64 in JSON; or use spk_id"
    )
    tts_model_name: str = Field("default", description="a style from /query_tts_model")


def _instructed(fields: Instruct) -> VoiceChoice:
    if fields.spk_id is None and fields.prompt_wav is None:
        raise wrong_field("spk_id", "no voice was given: name one with spk_id, or send prompt_wav", "missing")
    return VoiceChoice(
        spk_id=fields.spk_id,
        prompt_wav=fields.prompt_wav,
        prompt_text=instruction_text(fields.instruct_text, "instruct_text"),
        tts_model_name=fields.tts_model_name,
    )


@router.api_route(
    "/inference_sft", methods=["GET", "POST"], openapi_extra=body_of(Sft), response_class=Response
)
async def inference_sft(request: Request) -> Response:
    """Speak with a stored voice."""
    return await answer(
        request,
        "sft",
        Sft,
        lambda fields: VoiceChoice(spk_id=fields.spk_id, tts_model_name=fields.tts_model_name),
    )


@router.api_route(
    "/inference_cross_lingual",
    methods=["GET", "POST"],
    openapi_extra=body_of(CrossLingual),
    response_class=Response,
)
async def inference_cross_lingual(request: Request) -> Response:
    """Speak with the voice of a recording in any language."""
    return await answer(
        request,
        "cross_lingual",
        CrossLingual,
        lambda fields: VoiceChoice(
            prompt_wav=fields.prompt_wav, prompt_text="", tts_model_name=fields.tts_model_name
        ),
    )


@router.api_route(
    "/inference_instruct", methods=["GET", "POST"], openapi_extra=body_of(Instruct), response_class=Response
)
@router.api_route(
    "/inference_instruct2", methods=["GET", "POST"], openapi_extra=body_of(Instruct), response_class=Response
)
async def inference_instruct(request: Request) -> Response:
    """Speak according to an instruction."""
    return await answer(request, "instruct", Instruct, _instructed)
